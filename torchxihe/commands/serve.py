"""Serve the page: watch runs, and talk to models."""

import contextlib
import ipaddress
import secrets
import socket
from pathlib import Path

from torchxihe.errors import UserError
from torchxihe.parsers import parse

LEAST_TOKEN = 16
NEEDED = ("starlette", "uvicorn", "anyio")


def main(args: list[str]) -> None:
    """Serve until Ctrl-C. Raises UserError."""
    options = parse("serve", args)
    try:
        import uvicorn  # optional

        # These import starlette, which is optional, too.
        from torchxihe.page.catalog import Catalog
        from torchxihe.page.models import Models
        from torchxihe.page.server import build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        raise UserError(f"serve: {error.name} is not installed; pip install 'torchxihe[serve]'") from None
    token, hosts = choose_token(options.host, options.token)
    catalog = Catalog(options.directories or [Path("runs")])
    listening = listen(options.host, options.port)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'?token={token}' if token else ''}"
    print(f"serving {', '.join(map(str, catalog.directories))} at {address}  (Ctrl-C ends it)", flush=True)
    app = build_app(catalog, Models(), token, hosts)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=100,
        timeout_graceful_shutdown=3, lifespan="off", ws="none",
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # is how it ends
        uvicorn.Server(config).run([listening])


def choose_token(host: str, token: str) -> tuple[str, frozenset[str]]:
    """The token that requests must have ("": none), and the names that their Host header may have (none: any).

    Raises UserError for a token that is too short to be secret.
    """
    if token and (len(token) < LEAST_TOKEN or not all(c.isascii() and (c.isalnum() or c in "-_.~") for c in token)):
        raise UserError(f"--token: must have at least {LEAST_TOKEN} characters, letters, digits, '-', '_', '.' and '~'")
    if is_loopback(host):
        return token, frozenset({"localhost", "127.0.0.1", "::1", host})
    return token or secrets.token_urlsafe(24), frozenset()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Not decided by resolving a name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError."""
    if not 0 <= port < 2**16:  # getaddrinfo takes it modulo 2^16
        raise UserError(f"--port {port}: must be from 0 (any free one) to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {why}; choose another, or --port 0 for any free port") from None
    return listening
