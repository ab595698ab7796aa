"""Conversations as people have them: Alpaca, ShareGPT, tool calls of OpenAI; rendered as by `transformers`."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_chat import BYTES, CHATML, IM, chat_config, conversation, make_chat, write_lines
from torchxihe.data.prepare.conversations import read_conversation
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.prepare.rows import Row
from torchxihe.errors import UserError

# The parts of Qwen's and Hermes' templates that concern tools.
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ (call.function.arguments | tojson(ASCII)) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("CONTENT", "{{ m['content'] + '<|im_end|>' }}")


def call(name: str, arguments: Any, **more: str) -> dict[str, Any]:
    return {"type": "function", **more, "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Ünïcode <|im_end|>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain in <|im_start|> and Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("weather", {"city": "<|im_start|>", "n": 1}), call("weather", {"city": "Köln"})],
    },
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "wet"},
    {"role": "assistant", "content": "No; yes."},
]


def only_read(columns: dict[str, Any], column: str = "messages") -> Any:
    read, problem = read_conversation(Row("here", columns), column)
    assert problem is None, problem
    return read


@pytest.mark.parametrize("ascii_only", [False, True])
def test_tools_and_calls_are_rendered_as_by_transformers(tmp_path: Path, ascii_only: bool) -> None:
    """But for the special tokens that texts spell, which are text here. The calls and the answer are learned, results
    are not. Seen to fail without `tools`, and with texts inside calls that were not marked."""
    transformers: Any = pytest.importorskip("transformers")
    template = TOOLS_TEMPLATE.replace("ASCII", "true" if ascii_only else "")
    if ascii_only:
        template = template.replace("tojson(true)", "tojson(ensure_ascii=true)")
    chat = make_chat(tmp_path / "tokenizer", IM, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    parts, problem = chat.parts(*only_read({"messages": MESSAGES, "tools": TOOLS}))
    assert problem is None
    text = theirs.apply_chat_template(MESSAGES, tools=TOOLS, tokenize=False)
    assert "".join(part.text for part in parts) == text and text.count("weather") == 3
    assert [part.text for part in parts if part.special].count("<|im_start|>") == 5
    learned = "".join(part.text for part in parts if part.loss)
    start = text.index("\n<tool_call>")
    end = text.index("<|im_end|>", start) + len("<|im_end|>")
    assert learned == text[start:end] + "No; yes.<|im_end|>"
    ordinary = json.loads(json.dumps(MESSAGES).replace("<|im_start|>", "X"))
    described = json.loads(json.dumps(TOOLS).replace("<|im_end|>", "Y"))
    ids = chat.encode(chat.parts(*only_read({"messages": ordinary, "tools": described}))[0])[0].tolist()
    assert ids == theirs.apply_chat_template(ordinary, tools=described, return_dict=False)


def test_all_spellings_of_calls_are_the_same(tmp_path: Path) -> None:
    expected = only_read({"messages": MESSAGES, "tools": TOOLS})
    assert expected == (MESSAGES, TOOLS)
    as_text = json.loads(json.dumps(MESSAGES))
    as_text[1]["content"] = None
    for entry in as_text[1]["tool_calls"]:
        entry["function"]["arguments"] = json.dumps(entry["function"]["arguments"])
    assert only_read({"messages": as_text, "tools": json.dumps([TOOLS[0]["function"]])}) == expected
    calls = [entry["function"] for entry in MESSAGES[1]["tool_calls"]]
    names = {"user": "human", "tool": "observation", "assistant": "gpt"}
    share_gpt = [{"from": names[m["role"]], "value": m["content"]} for m in MESSAGES]
    share_gpt[1] = {"from": "function_call", "value": json.dumps(calls)}
    assert only_read({"conversations": share_gpt, "tools": TOOLS}) == expected
    assert only_read({"other": share_gpt, "tools": TOOLS}, "other") == expected
    named = {"role": "tool", "content": "dry", "tool_call_id": "a", "name": "weather"}
    openai = [MESSAGES[0], {"role": "assistant", "tool_calls": [call("weather", "{}", id="a")]}, named]
    read = only_read({"messages": openai, "tools": []})
    assert read.messages[1]["tool_calls"] == [call("weather", {}, id="a")]
    assert (read.messages[2], read.tools) == (named, None)


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": MESSAGES}, "their calls"),
        ({"messages": [MESSAGES[0], MESSAGES[4]], "tools": TOOLS}, "the tools"),
        ({"messages": MESSAGES, "tools": TOOLS}, "the tools, their calls"),
    ],
)
def test_a_template_that_leaves_tools_out_is_not_trained_with(tmp_path: Path, row: dict[str, Any], lost: str) -> None:
    """Though the name of the tool may be in the text. Seen to fail as it was: trained without the calls."""
    chat = make_chat(tmp_path / "tokenizer", IM, PLAIN)
    parts, problem = chat.parts(*only_read(row))
    assert not parts and problem == ("the chat template does not write tools", f"it leaves out {lost}")


BAD_CALL, BAD_TOOLS = "a tool call has no name or no object of arguments", "column 'tools' is not a list of functions"


@pytest.mark.parametrize(
    ("message", "tools", "reason"),
    [
        ({"role": "assistant", "tool_calls": ["x"]}, None, BAD_CALL),
        ({"role": "assistant", "tool_calls": [call("a", "no JSON")]}, None, BAD_CALL),
        ({"role": "assistant", "tool_calls": [call("a", "[]")]}, None, BAD_CALL),
        ({"role": "assistant", "tool_calls": [{"name": 1, "arguments": {}}]}, None, BAD_CALL),
        ({"from": "function_call", "value": "not JSON"}, None, BAD_CALL),
        ({"role": "user", "content": "", "tool_calls": [call("a", {})]}, None, "a message that is not the assistant's"),
        ({"role": "assistant", "content": None}, None, "the content of a message is not a string"),
        ({"role": "assistant", "content": "x"}, "not JSON", BAD_TOOLS),
        ({"role": "assistant", "content": "x"}, ["x"], BAD_TOOLS),
        ({"role": "assistant", "content": "x"}, [{"function": {}}], "column 'tools' has a function without a name"),
    ],
)
def test_calls_that_are_none(message: dict[str, Any], tools: Any, reason: str) -> None:
    row = Row("here", {"messages": [MESSAGES[0], message], "tools": tools})
    read, problem = read_conversation(row, "messages")
    assert not read.messages and problem is not None and problem.reason.startswith(reason)


def test_alpaca_and_share_gpt_need_no_option(tmp_path: Path) -> None:
    """In any format of tables, the same store. Seen to fail with an input of a blank that leaves blank lines."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for empty in ("", " ", None):  # the default template trims contents, others do not
        read = only_read({"instruction": "Hello", "input": empty, "output": "Hi"})
        assert read == (conversation("Hello", "Hi")["messages"], None)
    rows = [conversation("Add.\n\n1, 2", "3"), conversation("Hello", "Hi"), conversation("Bye", "Bye", system="Short.")]
    alpaca = [
        {"instruction": "Add.", "input": "1, 2", "output": "3", "system": ""},
        {"instruction": "Hello", "input": "", "output": "Hi", "system": ""},
        {"instruction": "Bye", "input": " ", "output": "Bye", "system": "Short."},
    ]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    share = [
        {"id": 1, "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(alpaca), tmp_path / "alpaca.parquet")
    pq.write_table(pa.Table.from_pylist(share), tmp_path / "share.parquet")
    with (tmp_path / "alpaca.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, alpaca[0])
        writer.writeheader()
        writer.writerows(alpaca)
    (tmp_path / "alpaca.json").write_text(json.dumps([{k: v for k, v in row.items() if v} for row in alpaca]))
    files = [str(tmp_path / name) for name in ("alpaca.parquet", "share.parquet", "alpaca.csv", "alpaca.json")]
    sources = [write_lines(tmp_path / "rows.jsonl", rows), *({"path": file} for file in files)]
    stores = [prepare(chat_config(tmp_path / "cache", source, tokenizer=BYTES)).sources[0].store for source in sources]
    for kind in ("bin", "msk", "idx"):
        assert len({(store / f"train-00000.{kind}").read_bytes() for store in stores}) == 1
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"there is no column 'messages'; there are text; name one of them"):
        prepare(chat_config(tmp_path / "cache", {"path": str(tmp_path / "text.parquet")}, tokenizer=BYTES))
