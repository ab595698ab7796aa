"""Conversations to tokens by the tokenizer's chat template, and which of the tokens carry a loss.

A template (Jinja, in the dialect of `transformers`) renders messages as one text. The messages of the assistant in it
carry the loss, up to and including the special token that ends the turn. Where they begin is marked by
`{% generation %}` if the template has it; otherwise it is the end of the prompt for that message. Of other roles
(`data.loss_roles`), the content carries a loss, and a special token that follows it.
"""

import itertools
import re
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchxihe.data.prepare.conversations import Message
from torchxihe.data.prepare.render import BEGIN, END, Rendered, Renderer, RenderError
from torchxihe.data.prepare.rows import Problem
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE, Encoder, encodable, read_meta
from torchxihe.errors import UserError
from torchxihe.utils.records import DamagedError, read_bounded, read_record

ASSISTANT = "assistant"
LITERAL = "\ud802"
"""Before each character of a message that spells a special token. Like the marks BEGIN and END it is a lone surrogate,
which no message has: `encodable` replaces them by question marks."""

PROBE = [{"role": "user", "content": "some text"}, {"role": "assistant", "content": "more text"}]
TOOL_PROBE = [
    {"role": "user", "content": "some text"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "x00000001", "function": {"name": "probe_call", "arguments": {}}}],
    },
    {"role": "tool", "name": "probe_call", "tool_call_id": "x00000001", "content": "probe_result"},
    {"role": "assistant", "content": "more text"},
]
TOOL_PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "probe_tool",
            "description": "none",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
]
TOOL_PROBE_TEXTS = {"the tools": "probe_tool", "their calls": "probe_call", "their results": "probe_result"}
"""What a template that knows tools writes of the probe."""


class Part(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    special: bool
    """Whether it is a special token that the template wrote."""
    loss: bool
    """Whether its tokens carry a loss."""


class Chat:
    """A tokenizer and its chat template."""

    def __init__(self, folder: Path, roles: tuple[str, ...] = (ASSISTANT,)) -> None:
        """`folder`: one that `obtain` has filled; `roles`: whose messages carry a loss.

        Raises UserError if its template cannot be used for training.
        """
        self._roles = roles
        file = folder / CHAT_TEMPLATE_FILE
        if not file.exists():
            raise UserError(f"{folder}: it has no {CHAT_TEMPLATE_FILE}; train with data.format = 'chat'")
        self._encoder = Encoder(folder)
        eos_id = read_meta(folder).eos_id
        eos_token = next((token for token, index in self._encoder.special.items() if index == eos_id), "")
        longest_first = sorted(map(re.escape, self._encoder.special), key=len, reverse=True)
        self._special = re.compile(f"(?<!{LITERAL})({'|'.join(longest_first) or '(?!)'})")
        try:
            names = {"eos_token": eos_token, **_special_tokens(folder / "tokenizer_config.json")}
            template = read_bounded(file).decode()
        except (OSError, DamagedError, UnicodeDecodeError) as error:
            raise UserError(f"{folder}: its chat template or tokenizer_config.json is damaged: {error}") from None
        try:
            self._renderer = Renderer(template, names)
            self._end = self._find_end()
        except (RenderError, _UnusableError) as error:
            raise UserError(f"tokenizer.chat_template: {error}") from None
        self.end_of_turn = self._encoder.special[self._end]
        """Id of the token that ends a message of the assistant."""
        parts, problem = self.parts(PROBE)
        if problem:
            raise UserError(f"tokenizer.chat_template: {problem.detail}")
        if self.encode(parts)[0].tolist() != self._encoder.encode_with_special("".join(part.text for part in parts)):
            raise UserError(
                "tokenizer.path: its tokenizer.json encodes text after a special token differently than on its own (a "
                "prefix space, or special tokens that strip spaces), which chats do not support"
            )

    def _find_end(self) -> str:
        """The special token that the template writes after a message of the assistant."""
        text, starts, _ = self._renderer(PROBE, answers=[1])
        answer = re.split(f"[{BEGIN}{END}]", text)[1] if BEGIN in text else text[_checked(starts)[0] :]
        found = self._special.search(answer.partition(PROBE[1]["content"])[2])
        if not found:
            raise _UnusableError(
                "no special token ends the messages of the assistant, so a model could not learn to stop; write "
                "{{ eos_token }} after their content, inside of {% generation %} if the template has it"
            )
        return found[0]

    def parts(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[Part], Problem | None]:
        """The conversation as the template renders it, in order; or [] and why it cannot be rendered.

        Raises UserError if the template exceeds a limit of time, memory or length.
        """
        learned = [i for i, message in enumerate(messages) if message["role"] in self._roles]
        answers = [i for i in learned if messages[i]["role"] == ASSISTANT]
        others = [i for i in learned if messages[i]["role"] != ASSISTANT]
        try:
            if lost := self._unwritten(messages, tools):
                return [], Problem("the chat template does not write tools", f"it leaves out {lost}")
            written, tools = self._literal(messages), self._literal(tools)
            rendered = self._renderer(written, answers=answers, others=others, tools=tools)
            spans = self._answers(rendered) if answers else []
            spans += [self._content(rendered, n, written[i]) for n, i in enumerate(others)]
        except (RenderError, _UnusableError) as error:
            return [], Problem("the chat template refuses it", str(error))
        parts, at = list[Part](), 0
        for start, end in sorted(spans):
            parts += self._split(rendered.text[at:start], loss=False) + self._split(rendered.text[start:end], loss=True)
            at = end
        return parts + self._split(rendered.text[at:], loss=False), None

    def encode(self, parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, uint32 [n], and which of them carry a loss, bool [n]: those with a character that does."""
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
        """Token ids that end where the assistant's answer to `messages` begins. Raises UserError."""
        try:
            text = self._renderer(self._literal(messages), prompt=True).text
        except RenderError as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None
        return self.encode(self._split(text, loss=False))[0].tolist()

    def _answers(self, rendered: Rendered) -> list[tuple[int, int]]:
        """Where the messages of the assistant are in the text, each with the end of its turn. Raises _UnusableError."""
        text = rendered.text
        if BEGIN in text:
            return [found.span() for found in re.finditer(f"{BEGIN}[^{END}]*{END}", text)]
        spans = []
        for start, end in itertools.pairwise([*_checked(rendered.starts), len(text)]):
            last = next((found for found in self._special.finditer(text, start, end) if found[0] == self._end), None)
            if last is None:
                raise _UnusableError(f"a turn of the assistant does not end with {self._end}")
            spans.append((start, last.end()))
        return spans

    def _content(self, rendered: Rendered, number: int, message: Message) -> tuple[int, int]:
        """Where the content of the message `others[number]` is in the text, with the special token that ends it.

        It is the last of what the conversation up to this message, rendered alone, has before special tokens. Raises
        _UnusableError.
        """
        (end, rest), content = rendered.ends[number], message["content"].strip()
        if not content:
            return end, end
        before = self._special.sub(lambda found: "\0" * len(found[0]), rendered.text[:end])
        start = -1 if self._special.sub("", rest).strip() else before.rfind(content)
        if start < 0:
            role = message["role"]
            raise _UnusableError(f"it does not write messages of {role!r} as they are; remove it from data.loss_roles")
        after = re.compile(f"{re.escape(content)}\\s*").match(rendered.text, start)
        assert after
        following = self._special.match(rendered.text, after.end(), end)
        return start, following.end() if following else start + len(content)

    def _unwritten(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """What of the tools in a conversation the template leaves out; "" if nothing."""
        roles = {message["role"] for message in messages}
        has = tools, any("tool_calls" in message for message in messages), "tool" in roles
        if not any(has):
            return ""
        return ", ".join(what for what, here in zip(TOOL_PROBE_TEXTS, has, strict=True) if here and what in self._lost)

    @cached_property
    def _lost(self) -> list[str]:
        """What the template leaves out of `TOOL_PROBE`."""
        text = self._renderer(TOOL_PROBE, tools=TOOL_PROBE_TOOLS).text
        return [what for what, written in TOOL_PROBE_TEXTS.items() if written not in text]

    def _literal(self, value: Any) -> Any:
        """`value` with marks inside of the special tokens that its texts spell, so that they are encoded as text."""
        if isinstance(value, dict):
            return {self._literal(key): self._literal(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._literal(entry) for entry in value]
        if not isinstance(value, str):
            return value
        return self._special.sub(lambda found: "".join(LITERAL + char for char in found[0]), encodable(value))

    def _split(self, text: str, loss: bool) -> list[Part]:
        """`text` cut at its special tokens, without the marks of `_literal` and of `{% generation %}`."""
        pieces = enumerate(self._special.split(re.sub(f"[{BEGIN}{END}]", "", text)))
        return [Part(piece.replace(LITERAL, ""), i % 2 == 1, loss) for i, piece in pieces if piece]


class _UnusableError(Exception):
    """What a template renders cannot be divided into prompts and answers."""


def _checked(starts: list[int]) -> list[int]:
    """Where answers begin. Raises _UnusableError if one is -1."""
    if -1 in starts:
        raise _UnusableError(
            "its prompt for an answer is not how it begins the conversation with that answer; mark the text of the "
            "assistant by {% generation %} in a file for tokenizer.chat_template"
        )
    return starts


def _special_tokens(settings: Path) -> dict[str, Any]:
    """What a tokenizer_config.json names `..._token`, which templates can read. Raises DamagedError, OSError."""
    named = {n: v for n, v in read_record(settings, dict[str, Any]).items() if n.endswith("_token")}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in tokens.items() if value is not None}
