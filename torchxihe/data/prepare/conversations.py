"""Rows as conversations: messages with tool calls (OpenAI), ShareGPT, and Alpaca's columns."""

import json
from typing import Any, NamedTuple

from torchxihe.data.prepare.rows import Columns, Problem, Row, column_problem, kind_of, listed

Message = dict[str, Any]
"""`role` ("system", "user", "assistant" or "tool") and `content`, a string; `tool_calls` of the assistant, each
{"type": "function", "function": {"name", "arguments"}}, arguments an object; `name` and `tool_call_id` of a tool."""

DEFAULT = "messages"
"""The column of an unchanged option: other columns that conversations are usually in are read, too."""
SHARE_GPT = "conversations"
ALPACA = ("instruction", "input", "output", "system")
TOOLS = "tools"

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class Conversation(NamedTuple):
    """A row's messages, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Each {"type": "function", "function": {"name", ...}}."""


class _BadError(Exception):
    """Why a row is no conversation."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.problem = Problem(reason, detail)


def columns_of(column: str) -> Columns:
    """The columns to read for `data.sources.messages`."""
    if column != DEFAULT:
        return Columns([column], [TOOLS])
    return Columns([], [DEFAULT, SHARE_GPT, *ALPACA, TOOLS])


def read_conversation(row: Row, column: str) -> tuple[Conversation, Problem | None]:
    """The conversation in `column` of a row, or an empty one and the reason why there is none.

    A list of {"role", "content"}, or of ShareGPT's {"from", "value"}. In a row without the default column, ShareGPT's
    column is read, or Alpaca's: the user says `instruction` and `input`, the assistant `output`.
    """
    if row.bad:
        return Conversation([]), Problem(row.bad)
    value = row.columns.get(column)
    if value is None and column == DEFAULT:
        value = row.columns.get(SHARE_GPT)
        value = _read_alpaca(row.columns) if value is None else value
    if not isinstance(value, list):
        return Conversation([]), column_problem(row, column, "a list of messages")
    try:
        messages = [_read_message(message, number) for number, message in enumerate(value, 1)]
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise _BadError("no message has the role assistant", f"the roles are {listed(roles)}")
        if roles[roles[0] == "system"] != "user":
            raise _BadError("the first message is not the user's", f"the roles are {listed(roles)}")
        return Conversation(messages, _read_tools(row.columns.get(TOOLS))), None
    except _BadError as error:
        return Conversation([]), error.problem


def _read_alpaca(columns: dict[str, Any]) -> list[Message] | None:
    """The messages of Alpaca's columns; None if they are not there."""
    request, more, answer, system = (columns.get(name) for name in ALPACA)
    if request is None or answer is None:
        return None
    said = f"{request}\n\n{more}" if isinstance(request, str) and isinstance(more, str) and more.strip() else request
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _read_message(message: Any, number: int) -> Message:
    """One message. Raises _BadError."""
    if not isinstance(message, dict):
        raise _BadError("a message is not an object", f"message {number} is {kind_of(message)}")
    # Merged data sets have columns of both spellings, one of them empty.
    role, content = (
        message[a] if message.get(a) is not None else message.get(b)
        for a, b in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in ROLES:
        raise _BadError("a role is not system, user, assistant or tool", _found(role, message, number))
    calls = message.get("tool_calls")
    if role == "function_call":
        calls, content = _parsed(content), None
    read: Message = {"role": ROLES[role], "content": "" if calls and content is None else content}
    if not isinstance(read["content"], str):
        raise _BadError("the content of a message is not a string", _found(content, message, number))
    if calls:
        if read["role"] != "assistant":
            raise _BadError("a message that is not the assistant's calls tools", f"message {number}")
        read["tool_calls"] = [_read_call(call, number) for call in (calls if isinstance(calls, list) else [calls])]
    if read["role"] == "tool":
        read |= {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    return read


def _read_call(call: Any, number: int) -> dict[str, Any]:
    """One entry of `tool_calls`, whose arguments may be JSON in a string. Raises _BadError."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    arguments = _parsed(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise _BadError("a tool call has no name or no object of arguments", f"message {number}")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


def _read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of functions, or JSON of one; None if it is empty. Raises _BadError."""
    tools = _parsed(value) if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _BadError("column 'tools' is not a list of functions", f"it is {kind_of(value)}")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(
        isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in wrapped
    ):
        raise _BadError("column 'tools' has a function without a name")
    return wrapped


def _parsed(value: Any) -> Any:
    """What a string of JSON means; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _found(value: object, message: dict[str, Any], number: int) -> str:
    """What a message has instead of what is wanted."""
    if value is None:
        return f"message {number} has {listed(name for name in message if message[name] is not None)}"
    return f"message {number}: {repr(value[:40]) if isinstance(value, str) else kind_of(value)}"
