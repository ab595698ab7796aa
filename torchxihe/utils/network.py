"""Network interfaces of this host: which of them reaches the others."""

import contextlib
import ipaddress
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torchxihe.errors import UserError

SIOCGIFADDR = 0x8915
ANYWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses for documentation (RFC 5737, 3849), which every default route covers; nothing is sent to them."""
UNREACHABLE_SECONDS = 45.0
"""How long an endpoint may give no answer at all. One that refuses connections is waited for: it is being started."""


@dataclass(frozen=True)
class Link:
    """How this host is reached by the others."""

    interface: str
    address: str
    is_own: bool
    """Whether the rendezvous endpoint is an address of this host."""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """host:port, [IPv6]:port. Raises UserError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"RDZV_ENDPOINT={endpoint}: must be host:port")
    return host.strip("[]"), int(port)


def addresses() -> list[tuple[str, str]]:
    """(interface, address) of this host: the first IPv4 address of each, then those of IPv6."""
    import fcntl  # not on Windows, where this module is imported, too

    found: list[tuple[str, str]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(reply[20:24])))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, name = line.split()
        found.append((name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))))
    return found


def find_link(endpoint: str) -> Link:
    """The interface by which this host reaches `endpoint`, or the one that GLOO_SOCKET_IFNAME names. Raises UserError.

    gloo and NCCL bind to what the hostname resolves to, on Debian a loopback address. An endpoint that is this host's
    own name resolves to one, too: then it is the interface of the default route.
    """
    host, port = split_endpoint(endpoint)
    wanted, known = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0], addresses()
    with contextlib.suppress(OSError):  # not resolved yet: `wait_for` says so if it stays that way
        target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][4][0]
        source = _source(str(target), port)
        loopback = ipaddress.ip_address(str(target)).is_loopback
        is_own = loopback or source == target
        if loopback and host not in ("localhost", str(target)):
            source = ""
        if not wanted and (name := next((name for name, address in known if address == source), "")):
            return Link(name, source, is_own)
        return _chosen(wanted, known, is_own, endpoint)
    return _chosen(wanted, known, False, endpoint)


def _chosen(wanted: str, known: list[tuple[str, str]], is_own: bool, endpoint: str) -> Link:
    """The interface that the user names, else that of the default route, else the only one."""
    if wanted:
        address = next((address for name, address in known if name == wanted), "")
        if not address:
            names = ", ".join(dict.fromkeys(name for name, _ in known))
            raise UserError(
                f"GLOO_SOCKET_IFNAME={wanted}: host {socket.gethostname()} has no such interface with an address; "
                f"it has {names}"
            )
        return Link(wanted, address, is_own)
    sources = {_source(target, 9) for target in ANYWHERE}
    for name, address in known:
        if address in sources:
            return Link(name, address, is_own)
    outside = [(name, address) for name, address in known if not ipaddress.ip_address(address).is_loopback]
    outside = [(name, address) for name, address in outside if not ipaddress.ip_address(address).is_link_local]
    if len(outside) == 1:
        return Link(*outside[0], is_own)
    names = ", ".join(name for name, _ in outside) or "none but the loopback"
    raise UserError(
        f"RDZV_ENDPOINT={endpoint}: host {socket.gethostname()} cannot tell which interface reaches the other hosts "
        f"({names}); give an address instead of a name, or set GLOO_SOCKET_IFNAME"
    )


def _source(target: str, port: int) -> str:
    """The address that packets from here to `target` bear; "" if there is no route."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((target, port))
        return str(probe.getsockname()[0])
    return ""


def use_link(link: Link) -> None:
    """Have gloo and NCCL use it, where the user has not chosen otherwise."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", link.interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={link.interface}")  # without "=" a prefix


def is_open(address: str, port: int, timeout: float) -> bool:
    """Whether something listens there; raises OSError if there is no answer."""
    try:
        socket.create_connection((address, port), timeout).close()
    except ConnectionRefusedError:
        return False
    return True


def wait_for(endpoint: str, seconds: float, link: Link) -> None:
    """Wait until something listens at `endpoint`. Raises UserError after 45 s without any answer, or after `seconds`.

    A refused connection is an answer: the other host has not started yet.
    """
    host, port = split_endpoint(endpoint)
    here = f"host {socket.gethostname()} ({link.address}, {link.interface})"
    start = last_answer = time.monotonic()
    said = 0.0
    while True:
        now, why = time.monotonic(), "nothing listens there"
        try:
            if is_open(host, port, 5.0):
                return
            last_answer = now
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            if time.monotonic() - last_answer > UNREACHABLE_SECONDS:
                remedy = "check the address, the network and the firewall of its host"
                raise UserError(f"RDZV_ENDPOINT={endpoint}: {here} does not reach it: {why}; {remedy}") from None
        if now - start > seconds:
            raise UserError(f"RDZV_ENDPOINT={endpoint}: {here}: {why} after {seconds:.0f} s; start its host, too")
        if now - said > 60 and now - start > 3:
            hint = "its host has not started, or a firewall refuses"
            print(f"{here} waits for RDZV_ENDPOINT={endpoint}: {why} yet; {hint}", file=sys.stderr, flush=True)
            said = now
        time.sleep(0.5)


def job_name() -> str:
    """RDZV_ID, which distinguishes runs that use one store."""
    return os.environ.get("RDZV_ID") or os.environ.get("PET_RDZV_ID") or "torchxihe"
