"""The page's server: runs and models below the given directories, over HTTP.

Every answer to a bad request is one line of text. A request is bounded in size before it is parsed.
"""

import contextlib
import functools
import hashlib
import hmac
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from anyio import CancelScope, to_thread
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from torchxihe.data.prepare.conversations import Message
from torchxihe.errors import UserError
from torchxihe.model.generate import Sampling, check_sampling
from torchxihe.page.catalog import Catalog, Model
from torchxihe.page.charts import draw_panels
from torchxihe.page.models import BusyError, Models, Slot, Ticket, stream
from torchxihe.page.report import STATIC, content_policy, report_html
from torchxihe.page.run_files import RunFiles, samples
from torchxihe.utils.records import DamagedError, Record, parse_record

LARGEST_BODY = 2**18
"""Bytes of a request's body."""
LONGEST_QUERY = 2**13
MOST_RUNS = 12
"""Runs that are shown together."""
MOST_FILES = 64
"""Runs whose metrics are kept in memory."""
TAIL = 2**20
"""Bytes at the end of a log in which samples are looked for."""
COOKIE = "torchxihe_token"
POLICY = "default-src 'self'; img-src data:; style-src-attr 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'"
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


class Said(Record):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=100_000)]


class Ask(Record):
    """The body of a request for text."""

    model: Annotated[str, Field(max_length=4096)]
    prompt: Annotated[str, Field(max_length=100_000)] = ""
    messages: Annotated[list[Said], Field(max_length=200)] = Field(default_factory=list)
    """A conversation that is answered instead of continuing `prompt`."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 200
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.8
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 50
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Pieces(StreamingResponse):
    """A stream that is closed whatever ends it: a reader that went away stops the model."""

    def __init__(self, slot: Slot, ticket: Ticket, pieces: Any) -> None:
        self.lines, self.ticket = stream(slot, ticket, pieces), ticket
        super().__init__(self.lines, media_type="application/x-ndjson")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await self.lines.aclose()
            self.ticket.leave()


class Guard:
    """Lets a request through that names the right host and, if there is one, has the token."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        """hosts: names that the Host header may have; none: any, because the token decides."""
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse."""
        if scope["type"] == "http" and (refused := self._check(Request(scope))):
            await refused(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    def _check(self, request: Request) -> Response | None:
        """The refusal, or the redirection that takes the token out of the address."""
        if len(request.scope["query_string"]) > LONGEST_QUERY:
            return _line(400, f"the query has more than {LONGEST_QUERY} characters")
        # Otherwise a web page whose name resolves to this machine could read everything (DNS rebinding).
        if self.hosts and _host(request.headers.get("host", "")) not in self.hosts:
            return _line(
                400, "the Host header does not name this server; open the address that torchxihe serve printed"
            )
        # Nor may another site's page send requests with the cookie.
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return _line(400, "the request comes from another site's page")
        if not self.token:
            return None
        if self._is_token(request.query_params.get("token", "")) and request.method == "GET":
            response = RedirectResponse("/", 303, HEADERS)
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return response
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if self._is_token(given if kind.lower() == "bearer" else request.cookies.get(COOKIE, "")):
            return None
        return _line(401, "a token is needed; open the address that torchxihe serve printed")

    def _is_token(self, given: str) -> bool:
        """Compared in a time that tells nothing of the token."""
        return hmac.compare_digest(given.encode(), self.token.encode())


def _host(header: str) -> str:
    """A Host header without the port."""
    return header.partition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]


def _line(status: int, why: str) -> PlainTextResponse:
    return PlainTextResponse(" ".join(why.split())[:400] + "\n", status, HEADERS)


class Server:
    """The answers."""

    def __init__(self, catalog: Catalog, models: Models) -> None:
        self.catalog, self.models = catalog, models
        self._files: OrderedDict[str, RunFiles] = OrderedDict()

    async def page(self, request: Request) -> Response:
        """A file of the page, by its name."""
        name = request.path_params.get("name", "index.html")
        if name not in _static():
            raise HTTPException(404, "no such page")
        return FileResponse(_static()[name], headers=HEADERS | {"Content-Security-Policy": POLICY})

    async def listed(self, request: Request) -> Response:
        """All runs with their states, and all models."""
        return _unless_known(request, await to_thread.run_sync(self._list))

    def _list(self) -> dict[str, Any]:
        runs, models = self.catalog.find()
        return {
            "runs": [self._describe(name, path) for name, path in runs.items()],
            "models": [{"name": m.name, "home": m.home, "step": m.step, "chat": m.chat} for m in models.values()],
        }

    def _describe(self, name: str, path: Path) -> dict[str, Any]:
        """A run in the list."""
        train, _ = self._open(name, path).metrics()
        status = self._open(name, path).status(train)
        last = {key: train[-1].get(key) for key in ("loss", "tokens_per_second")} if train else {}
        return {
            "name": name,
            "state": status.state,
            "step": status.step,
            "total": status.total,
            "updated": status.updated,
            **{key: value for key, value in last.items() if value is not None and math.isfinite(value)},
        }

    async def watched(self, request: Request) -> Response:
        """Panels and samples of the runs that the query names."""
        names, query = list(dict.fromkeys(request.query_params.getlist("run"))), request.query_params
        by, smooth = query.get("by", "step"), query.get("smooth", "1")
        if not 0 < len(names) <= MOST_RUNS:
            raise HTTPException(400, f"run: name 1 to {MOST_RUNS} runs")
        if by not in ("step", "tokens", "time"):
            raise HTTPException(400, "by: must be step, tokens or time")
        if not (smooth.isascii() and smooth.isdigit() and 1 <= int(smooth[:9]) <= 10_000):
            raise HTTPException(400, "smooth: must be a number from 1 to 10000")
        return _unless_known(request, await to_thread.run_sync(self._watch, names, by, int(smooth[:9])))

    def _watch(self, names: list[str], by: str, smooth: int) -> dict[str, Any]:
        opened = self._runs(names)
        shown = _short(names)
        panels = draw_panels({shown[name]: files.metrics() for name, files in opened.items()}, by, smooth)
        newest = []
        for name, files in opened.items():
            for step, text in samples(files.messages(TAIL, ranks=1))[-3:]:
                newest.append({"run": shown[name], "step": step, "text": text})
        return {"panels": panels, "samples": newest}

    async def report(self, request: Request) -> Response:
        """The report of a run."""
        [files] = (await to_thread.run_sync(self._runs, [request.query_params.get("run", "")])).values()
        text = await to_thread.run_sync(report_html, str(files.directory), files)
        script = (STATIC / "hover.js").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=HEADERS | {"Content-Security-Policy": content_policy(script)})

    async def generate(self, request: Request) -> Response:
        """Text as lines of JSON; see `stream`."""
        ask = parse_record(await _body(request), Ask)
        model = await to_thread.run_sync(self._model, ask.model)
        if ask.messages and not model.chat:
            raise HTTPException(400, f"messages: {model.name} has no chat template; send a prompt")
        sampling = Sampling(
            max_tokens=ask.max_tokens, temperature=ask.temperature, top_k=ask.top_k, top_p=ask.top_p, seed=ask.seed
        )
        check_sampling(sampling)
        messages: list[Message] = [{"role": said.role, "content": said.content} for said in ask.messages]
        slot, ticket = self.models.join(model.version)
        try:
            pieces = await self.models.begin(slot, model.path, messages or ask.prompt, sampling)
        except BaseException:
            ticket.leave()
            raise
        response = Pieces(slot, ticket, pieces)
        response.headers.update(HEADERS)
        return response

    def _runs(self, names: list[str]) -> dict[str, RunFiles]:
        """Runs that the catalog lists. Raises HTTPException."""
        runs, _ = self.catalog.find()
        if any(name not in runs for name in names):
            raise HTTPException(404, "run: no such run in the given directories")
        return {name: self._open(name, runs[name]) for name in names}

    def _model(self, name: str) -> Model:
        """A model that the catalog lists. Raises HTTPException."""
        model = self.catalog.find()[1].get(name)
        if model is None:
            raise HTTPException(404, "model: no such checkpoint or export in the given directories")
        return model

    def _open(self, name: str, path: Path) -> RunFiles:
        """The reader of a run, which remembers what it has read."""
        files = self._files.setdefault(name, RunFiles(path, self.catalog.inside))
        with contextlib.suppress(KeyError):  # another thread has removed it
            self._files.move_to_end(name)
            while len(self._files) > MOST_FILES:
                self._files.popitem(last=False)
        return files


@functools.cache
def _static() -> dict[str, Path]:
    """The page's files by name."""
    return {file.name: file for file in STATIC.iterdir() if file.is_file()}


def _short(names: list[str]) -> dict[str, str]:
    """Each run's name in legends: its directory's, or its path if several directories have that name."""
    last = [Path(name).name for name in names]
    return {name: short if last.count(short) == 1 and short else name for name, short in zip(names, last, strict=True)}


def _unless_known(request: Request, value: dict[str, Any]) -> Response:
    """The value as JSON; nothing if the browser has it already."""
    text = json.dumps(value)
    tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(text, media_type="application/json", headers=headers)


async def _body(request: Request) -> bytes:
    """The body of a request. Raises HTTPException if it is too long or not declared to be JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(400, "the content type must be application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise HTTPException(400, f"the body has more than {LARGEST_BODY} bytes")
    return body


def build_app(catalog: Catalog, models: Models, token: str = "", hosts: frozenset[str] = frozenset()) -> ASGIApp:
    """The application. token: "": none is needed; hosts: what the Host header may name, none: anything."""
    server = Server(catalog, models)
    answers: dict[Any, Callable[[Request, Any], Response]] = {
        HTTPException: lambda request, error: _line(error.status_code, error.detail),
        DamagedError: lambda request, error: _line(400, f"the body: {error}"),
        UserError: lambda request, error: _line(400, str(error)),
        OSError: lambda request, error: _line(404, f"a file cannot be read: {error.strerror}"),
        BusyError: lambda request, error: _line(503, str(error)),
    }
    routes = [
        Route("/", server.page),
        Route("/static/{name}", server.page),
        Route("/api/list", server.listed),
        Route("/api/watch", server.watched),
        Route("/api/generate", server.generate, methods=["POST"]),
        Route("/report", server.report),
    ]
    app = Starlette(routes=routes, exception_handlers=answers)
    app.router.redirect_slashes = False
    return Guard(app, token, hosts)
