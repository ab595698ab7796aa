"""Rendering chat templates in a process of its own, with limits.

A template comes with a tokenizer that somebody else may have published. It is a program: it can loop without end, raise
any exception, or build a text of any size inside a single call that Python cannot interrupt. Only a process can be
limited in all of that. It is kept for all conversations, so a rendering costs one write and one read on a pipe.
"""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchxihe.errors import UserError

SECONDS = 10
"""CPU time of one rendering at most, in seconds."""
MEMORY_MIB = 1024
"""Address space of the process at most, in MiB."""
CHARACTERS, CHARACTERS_PER_CHARACTER = 2**24, 16
"""Length of a rendered text at most: a constant, and more by the length of the messages."""

BEGIN, END = "\ud800", "\ud801"
"""Mark `{% generation %}` and `{% endgeneration %}` in a rendered text."""

_TOO_MUCH_MEMORY, _TOO_LONG = 3, 4
"""Exit codes of the process."""
_LENGTH = struct.Struct("<?Q")
"""Before every message: whether it is a result (or an error's text), and its length in bytes."""


class RenderError(Exception):
    """The template raised an error, or cannot be compiled. The message is one line of at most 300 characters."""


class Rendered(NamedTuple):
    """What a template makes of messages."""

    text: str
    starts: list[int]
    """Where the messages `answers` begin in it: at the end of the prompt for each (-1: the text does not begin with
    that prompt). Empty if the text has generation marks."""
    ends: list[tuple[int, str]]
    """For each of the messages `others`: how far the conversation up to and including it, rendered alone, is the
    beginning of the text, and the rest of what was rendered."""


class Renderer:
    """A template, compiled in a process that ends with this object."""

    def __init__(self, template: str, names: dict[str, Any]) -> None:
        """`names`: what the template can read besides the messages. Raises RenderError if it cannot be compiled."""
        path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchxihe.data.prepare.render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is handled by this process
        )
        weakref.finalize(self, _end, self._process)
        self._ask([template, names, SECONDS])

    def __call__(
        self,
        messages: list[dict[str, Any]],
        prompt: bool = False,
        answers: Sequence[int] = (),
        others: Sequence[int] = (),
        tools: list[dict[str, Any]] | None = None,
    ) -> Rendered:
        """The rendered text, and where the messages `answers` and `others` (indices) are in it.

        `prompt`: end with the prompt for an answer. Raises RenderError for an error of the template, and UserError if
        it exceeds a limit.
        """
        return Rendered(*self._ask([messages, prompt, answers, others, tools]))

    def _ask(self, request: object) -> Any:
        """Send a request and return the reply."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # the process has ended, which the reply tells
            _send(self._process.stdin, request)
        try:
            good, reply = _receive(self._process.stdout)
        except EOFError:
            limits = {
                -signal.SIGPROF: f"takes more than {SECONDS:,} s of CPU time",
                _TOO_MUCH_MEMORY: f"takes more than {MEMORY_MIB:,} MiB of memory",
                _TOO_LONG: f"gives more than {CHARACTERS:,} characters",
            }
            code = self._process.wait()
            why = limits.get(code, f"ends its process with code {code}")
            remedy = "name another template as tokenizer.chat_template"
            raise UserError(f"tokenizer.chat_template: rendering a conversation {why}; {remedy}") from None
        if not good:
            raise RenderError(reply)
        return reply


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):
            stream.close()
    process.wait()


def _send(stream: IO[bytes], value: object, good: bool = True) -> None:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(_LENGTH.pack(good, len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[bool, Any]:
    """The next message. Raises EOFError if the other process has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    good, length = _LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return good, json.loads(data.decode("utf-8", "surrogatepass"))


# The process


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which a template marks the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012 (it is the base class's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """`transformers`' filter; that of jinja2 escapes characters for HTML. `chat.LITERAL` stays a mark."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent).replace("\\ud802", "\ud802")


Render = Callable[[list[dict[str, Any]], bool, list[dict[str, Any]] | None], str]


def _compile(source: str, names: dict[str, Any]) -> Render:
    """The template as a function of messages, `add_generation_prompt` and tools."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    template = environment.from_string(source)

    def render(messages: list[dict[str, Any]], prompt: bool, tools: list[dict[str, Any]] | None) -> str:
        return template.render(messages=messages, add_generation_prompt=prompt, tools=tools, documents=None, **names)

    return render


def _render(
    render: Render,
    seconds: int,
    messages: list[dict[str, Any]],
    prompt: bool,
    answers: list[int],
    others: list[int],
    tools: list[dict[str, Any]] | None,
) -> Rendered:
    """See `Renderer.__call__`. Ends the process if a text is too long, or takes too long."""
    most = CHARACTERS + CHARACTERS_PER_CHARACTER * len(json.dumps([messages, tools], ensure_ascii=False))

    def limited(messages: list[dict[str, Any]], prompt: bool) -> str:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        text = render(messages, prompt, tools)
        if len(text) > most:
            os._exit(_TOO_LONG)
        return text

    text = limited(messages, prompt)
    starts = []
    if BEGIN not in text:
        for answer in answers:
            asked = limited(messages[:answer], True)
            starts.append(len(asked) if text.startswith(asked) else -1)
    ends = []
    for other in others:
        alone = limited(messages[: other + 1], False)
        differs = (i for i, (a, b) in enumerate(zip(alone, text, strict=False)) if a != b)
        same = len(alone) if text.startswith(alone) else next(differs, len(text))
        ends.append((same, alone[same:]))
    return Rendered(text, starts, ends)


def _serve() -> None:
    """Answer requests until the other process ends. The timer's signal, SIGPROF, ends this one even within one call of
    a C function."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for kind, limit in ((resource.RLIMIT_AS, MEMORY_MIB * 2**20), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # there is a lower limit already, or the system has none
            resource.setrlimit(kind, (limit, limit))
    render, seconds = None, SECONDS
    while True:
        try:
            _, request = _receive(sys.stdin.buffer)
            if render is None:
                template, names, seconds = request
                signal.setitimer(signal.ITIMER_PROF, seconds)
                render, reply = _compile(template, names), None
            else:
                reply = _render(render, seconds, *request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(sys.stdout.buffer, reply)
        except EOFError:
            return
        except MemoryError:
            os._exit(_TOO_MUCH_MEMORY)
        except Exception as error:  # of the template, which is a program: of any type
            signal.setitimer(signal.ITIMER_PROF, 0)
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            _send(sys.stdout.buffer, f"{kind}{' '.join(str(error)[:3000].split())}"[:300], good=False)


if __name__ == "__main__":
    _serve()
