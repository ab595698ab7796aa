"""Conversations to tokens: the tokenizer's chat template at work, and which of the tokens carry a loss.

A template (Jinja, in the dialect of `transformers`) turns messages into one text. What the assistant says in it, up to
and with the special token that ends its turn, carries the loss. The template says itself where that is if it has
`{% generation %}`; otherwise it begins where the prompt for the assistant's message would end.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchxihe.data.prepare.rows import Row
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE, Encoder, encodable, read_meta
from torchxihe.errors import UserError

Message = dict[str, str]
"""`role` ("system", "user" or "assistant") and `content`."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

# What a template's output is marked with while it is taken apart. No text holds these: messages with lone surrogates
# get question marks for them.
BEGIN, END, LITERAL = "\ud800", "\ud801", "\ud802"
"""Before and after what the assistant says; before each character of a message that spells a special token."""

PROBE = [{"role": "user", "content": "some text"}, {"role": "assistant", "content": "more text"}]


class Part(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    special: bool
    """Whether it is a special token that the template wrote."""
    loss: bool
    """Whether its tokens carry a loss."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which a template marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (it is the base class's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END


def read_messages(row: Row, column: str) -> tuple[list[Message], str]:
    """The conversation in `column` of a row, and why there is none ("" if there is).

    A list of `{"role", "content"}`, or of ShareGPT's `{"from", "value"}` with "human" and "gpt".
    """
    if row.bad:
        return [], row.bad
    value = row.columns.get(column)
    if not isinstance(value, list):
        return [], f"column {column!r} is {'missing' if value is None else 'not a list of messages'}"
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return [], "a message is not an object"
        # Columns of both spellings, one of them empty, are what merged data sets have.
        role, content = (
            message[a] if message.get(a) is not None else message.get(b)
            for a, b in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            return [], "a role is not system, user or assistant"
        if not isinstance(content, str):
            return [], "a message's content is not a string"
        messages.append({"role": ROLES[role], "content": content})
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return [], "no message is the assistant's"
    if roles[roles[0] == "system"] != "user":
        return [], "the first message is not the user's"
    return messages, ""


class Chat:
    """A tokenizer and its chat template."""

    def __init__(self, folder: Path) -> None:
        """`folder`: one that `obtain` has filled. Raises UserError if nobody can be taught by its template."""
        file = folder / CHAT_TEMPLATE_FILE
        if not file.exists():
            raise UserError(f"{folder}: there is no {CHAT_TEMPLATE_FILE} in it; train with data.format = 'chat'")
        self._encoder = Encoder(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        named = {name: value for name, value in settings.items() if name.endswith("_token")}
        self._names = {n: v["content"] if isinstance(v, dict) else v for n, v in named.items() if v is not None}
        eos_id = read_meta(folder).eos_id
        self._names.setdefault("eos_token", next((t for t, i in self._encoder.special.items() if i == eos_id), ""))
        longest_first = sorted(map(re.escape, self._encoder.special), key=len, reverse=True)
        self._special = re.compile(f"(?<!{LITERAL})({'|'.join(longest_first)})")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(file.read_text(encoding="utf-8"))
            self._end = self._find_end()
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"tokenizer.chat_template: {error}") from None
        self.end_of_turn = self._encoder.special[self._end]
        """Id of the token that ends what the assistant says."""
        parts, _ = self.parts(PROBE)
        if self.encode(parts)[0].tolist() != self._encoder.encode_with_special("".join(part.text for part in parts)):
            raise UserError(
                "tokenizer.path: its tokenizer.json encodes text after a special token in another way than by itself "
                "(a prefix blank, or special tokens that take blanks with them), which chats do not support"
            )

    def _find_end(self) -> str:
        """The special token that the template writes after what the assistant says."""
        text = self._template_text(PROBE)
        said = re.split(f"[{BEGIN}{END}]", text)[1] if BEGIN in text else text[self._start(text, PROBE[:1]) :]
        found = self._special.search(said.partition(PROBE[1]["content"])[2])
        if not found:
            raise ValueError(
                "no special token ends what the assistant says, so that no model could learn to stop; write "
                "{{ eos_token }} after its content, within {% generation %} if there is that"
            )
        return found[0]

    def parts(self, messages: list[Message]) -> tuple[list[Part], str]:
        """The conversation as the template writes it, in order, and why it cannot be had ("" if it can)."""
        literal = [{**message, "content": self._literal(message["content"])} for message in messages]
        try:
            text = self._template_text(literal)
            if BEGIN in text:
                pieces = enumerate(re.split(f"[{BEGIN}{END}]", text))  # what is not marked, and what is, in turn
                return [part for i, piece in pieces for part in self._split(piece, loss=i % 2 == 1)], ""
            asked = [literal[:i] for i, message in enumerate(literal) if message["role"] == "assistant"]
            starts = [self._start(text, before) for before in asked]
            parts = self._split(text[: starts[0]], loss=False)
            for start, end in itertools.pairwise([*starts, len(text)]):
                parts += self._turn(text[start:end])
        except (TemplateError, TypeError, ValueError) as error:  # TypeError: `+` of a string and nothing, say
            return [], f"the chat template refuses it: {error}"
        return parts, ""

    def encode(self, parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, uint32, and which of them carry a loss, bool. A token that is partly the assistant's does."""
        ids, loss = [], []
        for special, group in itertools.groupby(parts, key=lambda part: part.special):
            texts, _, losses = zip(*group, strict=True)
            if special:
                ids.append(np.array([self._encoder.special[text] for text in texts], np.uint32))
                loss.append(np.array(losses, bool))
            else:
                tokens, spans = self._encoder.encode_with_spans("".join(texts))
                before = np.concatenate([[0], np.cumsum(np.repeat(losses, [len(text) for text in texts]))])
                ids.append(tokens)
                loss.append(before[spans[:, 1]] > before[spans[:, 0]])
        return np.concatenate(ids), np.concatenate(loss)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids that the assistant's answer to `messages` follows on. Raises UserError."""
        literal = [{**message, "content": self._literal(message["content"])} for message in messages]
        try:
            text = re.sub(f"[{BEGIN}{END}]", "", self._template_text(literal, prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template refuses it: {error}") from None
        return self.encode(self._split(text, loss=False))[0].tolist()

    def _start(self, text: str, before: list[Message]) -> int:
        """Where in a rendered conversation the assistant's answer to the messages `before` begins."""
        prompt = self._template_text(before, prompt=True)
        if not text.startswith(prompt):
            raise ValueError(
                "its prompt for an answer is not how it begins the conversation with that answer; mark the assistant's "
                "words by {% generation %} in a file for tokenizer.chat_template"
            )
        return len(prompt)

    def _turn(self, text: str) -> list[Part]:
        """Text that begins with what the assistant says: learned up to and with the end of the turn."""
        parts = self._split(text, loss=True)
        last = next((i for i, part in enumerate(parts) if part.special and part.text == self._end), -1)
        if last < 0:
            raise ValueError(f"a turn of the assistant's does not end with {self._end}")
        return parts[: last + 1] + [part._replace(loss=False) for part in parts[last + 1 :]]

    def _template_text(self, messages: list[Message], prompt: bool = False) -> str:
        return self._template.render(
            messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **self._names
        )

    def _literal(self, text: str) -> str:
        """`text` with marks, by which the special tokens that it spells remain text."""
        return self._special.sub(lambda found: "".join(LITERAL + char for char in found[0]), encodable(text))

    def _split(self, text: str, loss: bool) -> list[Part]:
        """`text` cut at its special tokens, without the marks of `_literal`."""
        pieces = enumerate(self._special.split(text))
        return [Part(piece.replace(LITERAL, ""), i % 2 == 1, loss) for i, piece in pieces if piece]


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """`transformers`' filter; jinja2's own escapes what HTML would not bear."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
