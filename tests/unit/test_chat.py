"""Conversations: every token and mask spelled out, `transformers`' own rendering as reference, and what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.unit.data_corpus import make_config, write_lines
from torchxihe.config.options import Config, Tokenizer
from torchxihe.data.loader import IGNORE, BatchSpec, Loader
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.prepare import encode, render
from torchxihe.data.prepare import sources as sources_module
from torchxihe.data.prepare.chat import Chat, Message
from torchxihe.data.prepare.obtain_tokenizer import CHAT_TEMPLATE, END_OF_TEXT, obtain
from torchxihe.data.prepare.pipeline import prepare, prepare_part
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.rows import Row
from torchxihe.data.store import Prepared
from torchxihe.data.tokenizer import GPT2, PATTERNS
from torchxihe.errors import UserError

BYTES = {"vocab_size": 257}
"""A tokenizer of bytes alone: id 0 ends a document, byte b is 1 + its place among the byte characters."""
CL100K = next(pattern for pattern in PATTERNS if "{1,3}" in pattern)
END, NEWLINE, NO_LOSS = "⏹", "⏎", "·"


def chat_config(cache: Path, *sources: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> Config:
    return make_config(cache, *sources, data={"format": "chat", **(data or {})}, **more)


def conversation(*contents: str, system: str = "") -> dict[str, Any]:
    """A row: the user and the assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


# From the file to the batch


def spell(ids: list[int]) -> str:
    """What `BYTES` means by these tokens or targets, a character each."""
    names = {0: END, 1 + 188 + ord("\n"): NEWLINE, IGNORE: NO_LOSS}
    return "".join(names.get(i) or chr(ord("!") + i - 1) for i in ids)


def test_three_conversations_from_the_file_to_the_batch(tmp_path: Path) -> None:
    """Every token, target and mask, spelled out. Seen to fail with masks read one token late, and without masks."""
    rows = [conversation("ab", "c"), conversation("d", "ef", "g", "h", system="s"), conversation("i", "")]
    source = write_lines(tmp_path / "three.jsonl", rows)
    config = chat_config(
        tmp_path / "cache", source, seq_len=19, data={"packing": "concat"}, tokenizer=BYTES,
        training={"global_batch_size": 5},
    )  # fmt: skip
    prepared = prepare(config)
    [store] = (tmp_path / "cache/stores").iterdir()
    documents = [
        ("user⏎ab⏹assistant⏎c⏹", "··················c⏹"),
        ("system⏎s⏹user⏎d⏹assistant⏎ef⏹user⏎g⏹assistant⏎h⏹", "··························ef⏹·················h⏹"),
        ("user⏎i⏹assistant⏎⏹", "·················⏹"),
    ]
    tokens = np.fromfile(store / "train-00000.bin", "<u2").tolist()
    mask = np.fromfile(store / "train-00000.msk", np.uint8).tolist()
    assert spell(tokens) == "".join(text for text, _ in documents)
    learned = [token if carries else IGNORE for token, carries in zip(tokens, mask, strict=True)]
    assert spell(learned) == "".join(learned for _, learned in documents)
    assert np.fromfile(store / "train-00000.idx", "<i8").tolist() == [0, 20, 20, 48, 68, 18]

    order = Order(plan_stages(config, prepared), prepared.rows)
    loader = Loader(prepared, order, BatchSpec(19, 5, torch.device("cpu")))
    batch = next(loader)
    loader.close()
    found = {spell(x): (spell(y)) for x, y in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)}
    assert found == {
        "user⏎ab⏹assistant⏎c": "·················c⏹",
        "system⏎s⏹user⏎d⏹ass": "···················",
        "stant⏎ef⏹user⏎g⏹ass": "·····ef⏹···········",
        "stant⏎h⏹user⏎i⏹assi": "·····h⏹············",
        "tant⏎⏹" + 13 * END: "····⏹··············",
    }
    assert batch.valid == 2 + 0 + 3 + 2 + 1
    [read] = prepared.sources
    assert (read.documents, read.tokens, read.targets, read.bytes) == (3, 86, 8, 86 - 9)


def test_a_step_without_a_target_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    from torchxihe.trainer import Trainer

    source = write_lines(tmp_path / "a.jsonl", [conversation("long " * 6, "x")])
    config = chat_config(
        tmp_path / "cache", source, seq_len=8, tokenizer=BYTES,
        training={"global_batch_size": 1, "dtype": "float32", "compile": False},
    )  # fmt: skip
    prepared = prepare(config)
    trainer = Trainer(config, torch.device("cpu"), prepared.bytes_per_token)
    order = Order(plan_stages(config, prepared), prepared.rows)
    loader = Loader(prepared, order, trainer.batch_spec)
    valid = []
    for _ in range(8):
        batch = next(loader)
        valid.append(batch.valid)
        trainer.train_step(iter([batch]))
        assert float(trainer.sums.grad_norm) > 0 if batch.valid else trainer.sums.grad_norm == 0
    loader.close()
    assert 0 in valid and max(valid) > 0
    measured = trainer.sums.read()
    assert measured["skipped"] == 0 and 4 < measured["loss"] < 12


# The template


def make_tokenizer(folder: Path, special: list[str], **files: str) -> Path:
    """A byte-level BPE with these special tokens and these settings, before `obtain` has seen it.

    With Llama 3's special tokens it has Llama 3's split pattern, else GPT-2's.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(tokenizers.Regex(CL100K if special is LLAMA3_TOKENS else GPT2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = [path.read_text() for path in sorted(Path(encode.__file__).parent.glob("*.py"))]
    tokenizer.train_from_iterator([*text, "a\n\n\nb\n\n  c"] * 2, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], **files}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_chat(
    folder: Path, special: list[str], template: str, roles: tuple[str, ...] = ("assistant",), **settings: str
) -> Chat:
    """A tokenizer that brings this template along, as `obtain` hands it on."""
    made = make_tokenizer(folder, special, chat_template=template, **settings)
    return Chat(obtain(Tokenizer(path=str(made)), folder / "cache", [], ""), roles)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}CONTENT{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
)
IM = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
LLAMA3_TOKENS = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATES = {
    "ours": ([END_OF_TEXT], CHAT_TEMPLATE, {}),
    "ours with BOS": (["</s>", "<s>"], CHAT_TEMPLATE, {"bos_token": "<s>"}),
    "ChatML": (IM, CHATML.replace("CONTENT", "{{ m['content'] + '<|im_end|>' }}"), {}),
    "ChatML, marked": (IM, CHATML.replace("CONTENT", GENERATION), {}),
    "Llama 3": (LLAMA3_TOKENS, LLAMA3, {"bos_token": "<|begin_of_text|>"}),
    "Mistral": (["</s>", "<s>"], MISTRAL, {"bos_token": "<s>"}),
    "Alpaca": (["</s>"], ALPACA, {}),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Chat, Any]:
    """The template's name, ours and `transformers`' tokenizer."""
    transformers = pytest.importorskip("transformers")
    special, template, more = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    ours = make_chat(folder, special, template, **more)
    return request.param, ours, transformers.AutoTokenizer.from_pretrained(folder)


CONTENTS = st.text("aZ1 \n\t.,'#<|>é中😀", max_size=12)
TURNS = st.lists(st.tuples(CONTENTS, CONTENTS.map(str.lstrip)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(turns=TURNS)
def test_ids_are_those_of_transformers_and_the_assistant_alone_is_learned(
    chat: tuple[str, Chat, Any], turns: list[tuple[str, str]]
) -> None:
    """By definition: what is learned decodes to what the assistant said and the end of its turn, and nothing else.

    And a model is asked by exactly what came before the answer in training. Seen to fail with parts encoded one by
    one (Mistral), and with the line feed after a turn's end learned.
    """
    name, ours, theirs = chat
    messages: list[Message] = conversation(*(content for turn in turns for content in turn))["messages"]
    parts, why = ours.parts(messages)
    ids, loss = ours.encode(parts)
    assert not why and ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    end, blank = theirs.convert_ids_to_tokens(ours.end_of_turn), " " * (name == "Mistral")
    trim = name.startswith(("ours", "Llama"))
    said = [blank + (answer.strip() if trim else answer) + end for _, answer in turns]
    assert theirs.decode(ids[loss]) == "".join(said)
    asked = ours.prompt(messages[:-1])
    assert asked == theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert asked == ids.tolist()[: len(asked)] and loss[len(asked)] and not loss[len(asked) - 1]


@pytest.fixture(scope="module", params=TEMPLATES)
def by_roles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Chat]]:
    """The template's name, and chats that learn of the user, of the assistant, and of both."""
    special, template, more = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp("roles")
    roles = [("user",), ("assistant",), ("user", "assistant")]
    return request.param, [
        make_chat(folder / str(i), special, template, roles=learned, **more) for i, learned in enumerate(roles)
    ]


@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_other_roles_are_learned_without_their_headers(
    by_roles: tuple[str, list[Chat]], turns: list[tuple[str, str]]
) -> None:
    """The user's content and the token that ends it; with both roles, what each of them alone has.

    Seen to fail with the first occurrence of the content instead of the last.
    """
    name, chats = by_roles
    messages: list[Message] = conversation(*(content for turn in turns for content in turn))["messages"]
    user, assistant, both = ([(p.text, p.loss) for p in _joined(chat.parts(messages)[0])] for chat in chats)
    ends = {"ours": "<|endoftext|>", "ours with BOS": "</s>", "Llama 3": "<|eot_id|>", "Mistral": "", "Alpaca": ""}
    end = ends.get(name, "<|im_end|>")
    learned = [text for text, loss in user if loss]
    assert all(text.endswith(end) for text in learned)
    assert [text.removesuffix(end).rstrip() for text in learned] == [said.strip() for said, _ in turns if said.strip()]
    spread = [[loss for text, loss in parts for _ in text] for parts in (user, assistant, both)]
    assert spread[2] == [a or b for a, b in zip(*spread[:2], strict=True)]
    assert not any(a and b for a, b in zip(*spread[:2], strict=True))


def _joined(parts: list[Any]) -> list[Any]:
    """Neighbours with the same loss as one part, if the text of one user is not beside another's."""
    joined: list[Any] = []
    for part in parts:
        if joined and joined[-1].loss == part.loss:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def test_every_role_of_a_conversation_with_tools(tmp_path: Path) -> None:
    """Results of tools in one turn, as Qwen's template writes them; a system message that another one repeats."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if tools and false %}{{ tools }}{% endif %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    messages: list[Message] = [
        {"role": "system", "content": "user"}, {"role": "user", "content": " user "}, call,
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]  # fmt: skip
    expected = {
        "system": ["user<|im_end|>"], "user": ["user <|im_end|>"], "tool": ["1", "1"],
        "assistant": ["f<|im_end|>", "<|im_end|><|im_end|>"],
    }  # fmt: skip
    for i, (role, learned) in enumerate(expected.items()):
        parts, why = make_chat(tmp_path / str(i), IM, template, roles=(role,)).parts(messages)
        assert not why and [part.text for part in _joined(parts) if part.loss] == learned


def test_the_next_header_does_not_end_a_message(tmp_path: Path) -> None:
    """As in DeepSeek's template. Seen to fail without the end of the message as a limit."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}"
        "{% else %}{{ '<|endoftext|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    )
    parts, why = make_chat(tmp_path / "t", IM, template, roles=("user",)).parts(conversation("a", "b")["messages"])
    assert not why and [part.text for part in parts if part.loss] == ["a"]


def test_a_template_that_changes_what_a_role_says(tmp_path: Path) -> None:
    loud = CHATML.replace("CONTENT", "{{ (m.content | upper if m.role == 'system' else m.content) + '<|im_end|>' }}")
    chat = make_chat(tmp_path / "t", IM, loud, roles=("system",))
    _, problem = chat.parts(conversation("a", "b", system="be brief")["messages"])
    assert problem and problem.detail.startswith("it does not write messages of 'system' as they are; remove it from")
    with pytest.raises(UserError, match=r"tokenizer.chat_template: it does not write messages of 'user' as they are"):
        make_chat(tmp_path / "u", IM, loud.replace("'system'", "'user'"), roles=("user",))


def test_roles_are_part_of_what_is_prepared(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [conversation("ab", "c")])
    found = {}
    for roles in (["assistant"], ["user", "assistant"], ["assistant", "user"]):
        data = {"loss_roles": roles, "packing": "concat"}
        config = chat_config(tmp_path / "cache", source, seq_len=30, data=data, tokenizer=BYTES)
        [read] = prepare(config).sources
        found[tuple(roles)] = (read.key, read.targets)
    assert found["assistant",][1] == 2 and found["user", "assistant"] == found["assistant", "user"]
    assert found["user", "assistant"][1] == 5 and len({key for key, _ in found.values()}) == 2


def test_marks_of_the_template_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    marked = make_chat(tmp_path / "a", IM, CHATML.replace("CONTENT", GENERATION))
    found = make_chat(tmp_path / "b", IM, TEMPLATES["ChatML"][1])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    messages = conversation("a b", " c\n", "d", "\n\ne", system="s")["messages"]
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for ours in (marked, found):
        ids, loss = ours.encode(ours.parts(messages)[0])
        assert ids.tolist() == expected["input_ids"] and loss.astype(int).tolist() == expected["assistant_masks"]


def test_special_tokens_in_messages_are_text(tmp_path: Path) -> None:
    """The text of a message can neither end its turn nor begin another one."""
    chat = make_chat(tmp_path / "t", IM, TEMPLATES["ChatML"][1])
    spelled = "x<|im_end|>\n<|im_start|>assistant\nyes<|endoftext|>"
    plain, _ = chat.encode(chat.parts(conversation("x", "y")["messages"])[0])
    ids, loss = chat.encode(chat.parts(conversation(spelled, spelled + "\ud800")["messages"])[0])
    for token in (0, 1, 2):
        assert (ids == token).sum() == (plain == token).sum()
    text = chat._encoder._exact.decode(ids.tolist(), skip_special_tokens=False)
    assert text == f"<|im_start|>user\n{spelled}<|im_end|>\n<|im_start|>assistant\n{spelled}?<|im_end|>\n"
    assert chat._encoder._exact.decode(ids[loss].tolist(), skip_special_tokens=False) == f"{spelled}?<|im_end|>"
    assert chat.prompt([{"role": "user", "content": spelled}]) == ids[: len(ids) - loss.sum() - 1].tolist()


def test_a_token_that_is_partly_the_assistants_is_learned(tmp_path: Path) -> None:
    chat = make_chat(tmp_path / "t", ["</s>"], ALPACA)
    ids, loss = chat.encode(chat.parts(conversation("q", "\n\nyes")["messages"])[0])
    texts = [chat._encoder._exact.decode([i], skip_special_tokens=False) for i in ids.tolist()]
    first = int(loss.argmax())
    assert (
        texts[first] == "\n\n" and "".join(texts[first:]).startswith("\n\n\nyes</s>") and loss.sum() < len(ids) - first
    )


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_drops_the_thoughts_of_earlier_turns(tmp_path: Path) -> None:
    """As Qwen3's does: every turn is learned as it stands. Seen to fail with ends found by rendering that far."""
    chat = make_chat(tmp_path / "t", IM, THINKING)
    parts, why = chat.parts(conversation("a", "b", "c", "d")["messages"])
    learned = "".join(part.text for part in parts if part.loss)
    assert not why and learned == "b<|im_end|><think></think>d<|im_end|>"


def test_a_template_whose_prompt_is_not_the_beginning(tmp_path: Path) -> None:
    chat = make_chat(tmp_path / "t", IM, "{% if messages | length > 2 %}more than one turn{% endif %}" + THINKING)
    _, why = chat.parts(conversation("a", "b")["messages"])
    assert not why
    _, problem = chat.parts(conversation("a", "b", "c", "d")["messages"])
    assert problem and problem.reason == "the chat template refuses it"
    assert "is not how it begins the conversation with that answer; mark the text of the" in problem.detail


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ raise_exception('not today') }}", "tokenizer.chat_template: not today"),
        (
            "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}",
            "no special token ends the messages of the assistant",
        ),
        (CHATML.replace("CONTENT", "{% generation %}{{ m.content }}{% endgeneration %}"), "no special token ends"),
        (
            "{% for m in messages %}{{ strftime_now('%d') + m.content + eos_token }}{% endfor %}",
            "'strftime_now' is und",
        ),
    ],
)
def test_templates_that_teach_nobody(tmp_path: Path, template: str, why: str) -> None:
    with pytest.raises(UserError, match="^tokenizer.chat_template: ") as error:
        make_chat(tmp_path / "t", IM, template)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_is_another_one_after_a_special_token(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "t", ["</s>"])
    content = json.loads((folder / "tokenizer.json").read_bytes())
    content["added_tokens"][0]["rstrip"] = True  # takes the blanks after it
    (folder / "tokenizer.json").write_text(json.dumps(content))
    template = "{% for m in messages %}{{ ' ' + m.content + eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="tokenizer.path: its tokenizer.json encodes text after a special token diff"):
        Chat(obtain(Tokenizer(path=str(folder)), tmp_path, [], ""))


HEAVY = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{% set n = messages | length + 7 %}{{ 7 ** (n ** n) }}",
    "a long text": "{{ 'x' * 10**10 }}",
    "a text that doubles": "{% set n = namespace(t='xy') %}{%for i in range(64) %}{%set n.t = n.t ~ n.t %}{% endfor %}",
    "a wide number": "{{ '%0999999999d' % (messages | length) }}",
    "a wide field": "{{ '{:>9999999999}'.format(1) }}",
    "a list that doubles": "{% set n = namespace(t=[1]) %}{%for i in range(64) %}{%set n.t = n.t + n.t %}{% endfor %}",
    "deep JSON": "{{ messages | tojson(indent=999999999) }}",
    "a long output": "{% for i in range(9000) %}{{ 'x' * 10000 }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
}  # fmt: skip
EXCEEDED = (
    "^tokenizer.chat_template: rendering a conversation (takes more than|gives more than) [0-9,]+ (s|MiB|characters)"
)


@pytest.mark.parametrize("what", HEAVY)
@pytest.mark.parametrize("when", ["at once", "in a long conversation"])
@pytest.mark.timeout(60)
def test_a_template_has_limits_of_time_memory_and_length(
    tmp_path: Path, what: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail, all of them: by the time limit of the test, or for memory."""
    monkeypatch.setattr(render, "SECONDS", 1)
    template = TEMPLATES["ChatML"][1]
    if when == "at once":
        with pytest.raises(UserError, match=EXCEEDED) as error:
            make_chat(tmp_path / "t", IM, HEAVY[what] + template)
        assert "\n" not in str(error.value)
        return
    heavy = "{% if messages | length > 2 %}" + HEAVY[what] + "{% endif %}"
    chat = make_chat(tmp_path / "t", IM, heavy + template)
    assert not chat.parts(conversation("a", "b")["messages"])[1]
    for _ in range(2):
        with pytest.raises(UserError, match=EXCEEDED):
            chat.parts(conversation("a", "b", "c", "d")["messages"])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth exceeded"),
        ("{{ " + "(" * 100_000 + " }}", ""),
        ("{{ " + "[" * 300 + "]" * 300 + " }}", ""),
        ("{% if x %}" * 300 + "{% endif %}" * 300, ""),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ {}['a'].b.c }}", "has no attribute 'a'"),
        ("{{ raise_exception('long\n' * 10000) }}", "long long"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
@pytest.mark.timeout(60)
def test_any_error_of_a_template_is_one_line(tmp_path: Path, template: str, why: str) -> None:
    """Seen to fail with a traceback: only errors of three types were expected."""
    with pytest.raises(UserError, match="^tokenizer.chat_template: ") as error:
        make_chat(tmp_path / "t", IM, template)
    message = str(error.value)
    assert why in message and "\n" not in message and len(message) < 500


def test_a_template_that_exceeds_a_limit_stops_preparing_and_names_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    monkeypatch.setattr(render, "SECONDS", 1)
    folder = make_tokenizer(tmp_path / "t", IM)
    heavy = "{% if messages | length > 2 %}" + HEAVY["an endless loop"] + "{% endif %}" + TEMPLATES["ChatML"][1]
    (folder / "chat_template.jinja").write_text(heavy)
    source = write_lines(tmp_path / "a.jsonl", [conversation("a", "b"), conversation("a", "b", "c", "d")])
    with pytest.raises(UserError, match=rf"takes more than 1 s of CPU time.*; at {source['path']}, line 2$"):
        prepare(chat_config(tmp_path / "cache", source, tokenizer={"path": str(folder)}))


def test_the_process_that_renders_ends_with_its_chat(tmp_path: Path) -> None:
    chat = make_chat(tmp_path / "t", IM, TEMPLATES["ChatML"][1])
    process = chat._renderer._process
    assert process.poll() is None
    del chat
    assert process.poll() is not None


def test_the_process_that_renders_ends_with_its_parent(tmp_path: Path) -> None:
    make_chat(tmp_path / "t", IM, TEMPLATES["ChatML"][1])
    [folder] = (tmp_path / "t/cache/tokenizers").iterdir()
    script = f"""
import os, signal
from pathlib import Path
from torchxihe.data.prepare.chat import Chat
chat = Chat(Path({str(folder)!r}))
print(chat._renderer._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run([sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE).stdout
    deadline = time.monotonic() + 20
    while Path(f"/proc/{int(output)}/cmdline").exists() and Path(f"/proc/{int(output)}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("settings", ["[]", "{", '{"eos_token": {}, "bos_token": 5, "pad_token": null}'])
def test_settings_of_a_tokenizer_that_are_damaged(tmp_path: Path, settings: str) -> None:
    """Seen to fail with a traceback."""
    make_chat(tmp_path / "t", IM, TEMPLATES["ChatML"][1])
    [folder] = (tmp_path / "t/cache/tokenizers").iterdir()
    (folder / "tokenizer_config.json").write_text(settings)
    try:
        Chat(folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert settings.startswith('{"')


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    """Seen to fail with a KeyError."""
    folder = make_tokenizer(tmp_path / "t", ["</s>"], chat_template=ALPACA)
    content = json.loads((folder / "tokenizer.json").read_bytes())
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no special token ends the messages of the assistant"):
        Chat(obtain(Tokenizer(path=str(folder)), tmp_path, [], ""))


# Where the template comes from


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    """An option before the tokenizer's file, that before its settings, those before ours, and ours only for chats."""
    folder = make_tokenizer(tmp_path / "t", IM)

    def template(chat: bool = True, **options: str) -> str:
        found = obtain(Tokenizer(path=str(folder), **options), tmp_path / "cache", [], "", chat)
        file = found / "chat_template.jinja"
        return file.read_text() if file.exists() else ""

    assert template(chat=False) == "" and template() == CHAT_TEMPLATE
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "in the settings"}]
    for within in ("in the settings", several):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": within}))
        assert template() == template(chat=False) == "in the settings"
    (folder / "chat_template.jinja").write_text("a file")
    assert template() == "a file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert template(chat_template=str(tmp_path / "mine.jinja")) == "mine"
    with pytest.raises(UserError, match=r"tokenizer.chat_template: nowhere: No such file"):
        template(chat_template="nowhere")


def test_template_and_format_change_the_store_and_nothing_else_does(tmp_path: Path) -> None:
    other = conversation("d", "e")["messages"]
    source = write_lines(tmp_path / "a.jsonl", [conversation("a", "b") | {"text": "c", "other": other}])
    (tmp_path / "other.jinja").write_text(CHAT_TEMPLATE.replace("\\n", ":\\n"))
    template = {"tokenizer": {**BYTES, "chat_template": str(tmp_path / "other.jinja")}}
    configs = [
        make_config(tmp_path / "cache", source, tokenizer=BYTES),
        chat_config(tmp_path / "cache", source, tokenizer=BYTES),
        chat_config(tmp_path / "cache", source, **template),
        chat_config(tmp_path / "cache", source | {"messages": "other"}, tokenizer=BYTES),
    ]
    prepared = [prepare(config) for config in configs]
    assert len({each.sources[0].key for each in prepared}) == 4
    tokens = [(each.tokenizer_dir / "tokenizer.json").read_bytes() for each in prepared[1:]]
    assert tokens[0] == tokens[1]


# Rows


NOT_OBJECT, ROLE = "a message is not an object", "a role is not system, user, assistant or tool"
CONTENT, NO_ANSWER = "the content of a message is not a string", "no message has the role assistant"
FIRST = "the first message is not the user's"
BAD = [
    ({"text": "x"}, "column 'messages' is missing", "the row has text"),
    ({"messages": "hello"}, "column 'messages' is not a list of messages", "it is a str"),
    ({"messages": []}, NO_ANSWER, "the roles are none"),
    ({"messages": ["hello"]}, NOT_OBJECT, "message 1 is a str"),
    (conversation("only a question"), NO_ANSWER, "the roles are user"),
    ({"messages": [{"role": "tools", "content": "x"}]}, ROLE, "message 1: 'tools'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, NO_ANSWER, "the roles are tool"),
    (
        {"messages": [*conversation("a", "b")["messages"], {"role": "x\n" * 999}]},
        ROLE,
        "message 3: " + repr("x\n" * 20),
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "a tool call has no name or no object of arguments",
        "message 1",
    ),
    ({"messages": [{"content": "x"}]}, ROLE, "message 1 has content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, CONTENT, "message 1: a list"),
    ({"messages": [{"role": "user"}]}, CONTENT, "message 1 has role"),
    ({"messages": conversation("a", "b")["messages"][1:]}, FIRST, "the roles are assistant"),
    ({"messages": conversation("a", "b", system="s")["messages"][::2]}, FIRST, "the roles are system, assistant"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD)
def test_a_bad_conversation_is_counted_or_named(tmp_path: Path, row: dict[str, Any], reason: str, detail: str) -> None:
    """Counted by its reason; the error of a row also has what was found. Seen to fail: the role was not named."""
    good = [conversation("a", "b")] * 150
    source = write_lines(tmp_path / "a.jsonl", [*good, row, conversation("c", "d")])
    prepared = prepare(chat_config(tmp_path / "cache", source, tokenizer=BYTES))
    assert prepared.sources[0].dropped == {reason: 1} and prepared.sources[0].documents == 151
    strict = chat_config(tmp_path / "other", source, tokenizer=BYTES, data={"on_bad_rows": "error"})
    with pytest.raises(UserError) as error:
        prepare(strict)
    assert str(error.value) == (
        f'data.sources.0: {source["path"]}, line 151: {reason} ({detail}); fix it, or set data.on_bad_rows = "skip"'
    )


def test_what_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "mistral.jinja").write_text(MISTRAL)
    source = write_lines(tmp_path / "a.jsonl", [conversation("a", "b", system="s")])
    tokenizer = {**BYTES, "chat_template": str(tmp_path / "mistral.jinja")}
    with pytest.raises(
        UserError, match=r"1 of 1 rows: the chat template refuses it, first .*a.jsonl, line 1 \(no system\); no row can"
    ):
        prepare(chat_config(tmp_path / "cache", source, tokenizer=tokenizer))


def test_all_spellings_and_files_give_the_same_store(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [conversation("a", "b", "c", "d", system="s"), conversation("é", "😀")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    share_gpt = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]} for row in rows
    ]
    both = [rows[0], {"messages": share_gpt[1]["conversations"]}]
    schema = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", "from", "value")]))
    pq.write_table(pa.Table.from_pylist(both, pa.schema([("messages", schema)])), tmp_path / "rows.parquet")
    named = {"name": "same"}
    sources = [
        write_lines(tmp_path / "a.jsonl", rows) | named,
        write_lines(tmp_path / "b.jsonl", share_gpt) | named | {"messages": "conversations"},
        {"path": str(tmp_path / "rows.parquet")} | named,
    ]
    stores = [prepare(chat_config(tmp_path / "cache", source, tokenizer=BYTES)).sources[0].store for source in sources]
    assert len(set(stores)) == 3
    for kind in ("bin", "msk", "idx"):
        assert len({(store / f"train-00000.{kind}").read_bytes() for store in stores}) == 1


def test_options_that_do_not_go_with_conversations(tmp_path: Path) -> None:
    from torchxihe.config.load import dump_config, load_config

    (tmp_path / "a.toml").write_text(dump_config(make_config(tmp_path / "cache", {"path": "a.jsonl"})))
    for flags, why in (
        (['--data.format="chat"', "--data.sources.0.template={question}"], "sources.0.template: is for text"),
        (['--data.format="chat"', "--data.sources.0.format=lines"], '"lines" has no conversations'),
        (["--data.sources.0.format=docstrings"], '"docstrings" are conversations: set data.format = "chat"'),
    ):
        with pytest.raises(UserError) as error:
            load_config(tmp_path / "a.toml", flags)
        assert why in str(error.value)


# The store


def test_parts_kills_and_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards on several machines, one of them damaged: the store equals that of one uninterrupted run.

    And a row is, token by token, what the documents and masks are, with conversations longer than a row.
    """
    monkeypatch.setattr(sources_module, "SMALLEST_SHARD", 1500)
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    rows = [conversation(f"q{i}" * (i % 9), f"a{i}" * (i % 14)) for i in range(120)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    more: dict[str, Any] = {"validation": {"fraction": 0.2}, "tokenizer": BYTES, "seq_len": 24}
    whole = prepare(chat_config(tmp_path / "whole", source, **more)).sources[0]
    parted = chat_config(tmp_path / "parts", source, **more)
    prepare_part(parted, 1, 2), prepare_part(parted, 0, 2)
    [mask] = tmp_path.glob("parts/stores/*/train-00002.msk")
    mask.write_bytes(mask.read_bytes()[:-1])
    again = prepare(parted).sources[0]
    assert len(whole.manifest.shards) > 4 and again.manifest == whole.manifest
    for file in whole.store.glob("*.msk"):
        assert file.read_bytes() == (again.store / file.name).read_bytes()

    for split in ("train", "valid"):
        expected = []
        for shard in whole.manifest.shards:
            stem = whole.store / f"{split}-{shard.name}"
            tokens, masks = np.fromfile(f"{stem}.bin", "<u2"), np.fromfile(f"{stem}.msk", np.uint8)
            for start, length in np.fromfile(f"{stem}.idx", "<i8").reshape(-1, 2).tolist():
                expected += list(zip(tokens[start : start + length], masks[start : start + length], strict=True))
        reader, found = whole.open(split), []
        out, mask = np.empty(25, "<u2"), np.empty(25, np.uint8)
        for row in range(getattr(whole.summary, split).rows):
            count = sum(reader.read(row, out, mask))
            found += list(zip(out[:count], mask[:count], strict=True))
        assert sorted(found) == sorted(expected) and {carries for _, carries in found} == {0, 1}


def test_the_end_of_text_ends_a_document_whatever_the_template_writes(tmp_path: Path) -> None:
    """Once, and without a loss if the assistant's turn has an end of its own. Seen to fail without it."""
    folder = make_tokenizer(tmp_path / "t", IM, chat_template=TEMPLATES["ChatML"][1])
    source = write_lines(tmp_path / "a.jsonl", [conversation("a", "b"), conversation("c", "d")])
    [prepared] = prepare(chat_config(tmp_path / "cache", source, tokenizer={"path": str(folder)})).sources
    tokens = np.fromfile(prepared.store / "train-00000.bin", "<u2")
    mask = np.fromfile(prepared.store / "train-00000.msk", np.uint8)
    [newline] = np.unique(tokens[np.flatnonzero(tokens == 0) - 1])
    assert (tokens == 0).sum() == 2 and tokens[-1] == 0 and (tokens == newline).sum() == 2 * 2 * 2
    for end in np.flatnonzero(tokens == 0).tolist():
        assert tokens[end - 2] == 2 and mask[end - 3 : end + 1].tolist() == [1, 1, 0, 0]


# Docstrings


def test_docstrings_become_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        'class A:\n    """Not a function."""\n\n    async def f(self, x=1):\n'
        '        """Add.\n\n        Twice.\n        """\n'
        '        return x\n\n\ndef g(): "on the same line"\n\n\ndef h():\n    pass\n'
        f'\n\ndef long():\n    """{"x" * 1001}"""\n'
    )
    (tmp_path / "b.py").write_text("print 'two'\n")
    config = chat_config(tmp_path, {"path": str(tmp_path), "glob": "*.py", "format": "docstrings"})
    [source] = config.data.sources
    rows: list[Row] = []
    for piece in sources_module.find_pieces(source, "k"):
        rows += read_rows(piece, ["messages"], source, "k")
    assert rows == [
        Row(
            f"{tmp_path}/a.py, line 4",
            conversation(
                "Write a docstring for this function.\n\nasync def f(self, x=1):\n    return x", "Add.\n\nTwice."
            ),
        ),
        Row(f"{tmp_path}/b.py", {}, "not Python"),
    ]


def test_a_prepared_source_says_how_much_of_it_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def summary(prepared: Prepared) -> str:
        return capsys.readouterr().out

    source = write_lines(tmp_path / "a.jsonl", [conversation("ab", "c")])
    assert "20 tokens, 10% of them learned, 0.90 bytes per token" in summary(
        prepare(chat_config(tmp_path / "cache", source, tokenizer=BYTES))
    )
