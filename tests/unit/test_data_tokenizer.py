"""The fast encoder against the slow one, long text in windows against text in one, tokenizers found and trained."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from torchxihe.config.options import Tokenizer
from torchxihe.data import tokenizer as module
from torchxihe.data.prepare import obtain_tokenizer as obtain_module
from torchxihe.data.prepare.obtain_tokenizer import END_OF_TEXT, obtain
from torchxihe.data.tokenizer import PATTERNS, Encoder, byte_alphabet, load_tokenizer, windows
from torchxihe.errors import UserError

FILES = sorted(Path(module.__file__).parents[1].rglob("*.py"))
TEXTS = [path.read_text() for path in FILES]
ODD = ["", " ", "\n\n\n", "a\0b", "naïve café 中文字 😀😀", "x" * 3000, "  \t\n  x\r\n\r\ny", "<|endoftext|> <s> </s>",
       "don't DON'T 12345 1,234.5", "\u3000wide\u00a0space", "e\u0301", "\ufeffbom", "_a_ __b__\n\n  c"]  # fmt: skip


def train(pattern: str, **model: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE with this split pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def prepared(folder: Path, tokenizer: tokenizers.Tokenizer, **settings: Any) -> Path:
    """The folder that `obtain` makes of a tokenizer."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return obtain(Tokenizer(path=str(folder)), folder / "cache", [], "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was trained here."""
    return obtain(Tokenizer(vocab_size=1500), tmp_path_factory.mktemp("cache"), TEXTS, "texts")


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """An encoder of each known split pattern."""
    encoder = Encoder(prepared(tmp_path_factory.mktemp("known") / "tokenizer", train(request.param)))
    assert encoder._fast is not None
    return encoder


def exactly(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode(text, exactly=True).tolist()


def test_the_fast_encoder_equals_the_slow_one(encoder: Encoder) -> None:
    for text in TEXTS + ODD:
        assert encoder.encode(text).tolist() == exactly(encoder, text)
        assert encoder.agrees(text)


CHARACTERS = "aZ1 \n\r\t.,'_<|>é中😀\u3000\u00a0\u0301s"


@settings(max_examples=150, deadline=None)
@given(text=st.text(CHARACTERS, max_size=80), window=st.integers(1, 20))
def test_windows_encode_to_what_the_whole_does(encoder: Encoder, text: str, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        parts = list(windows(text))
    assert "".join(parts) == text
    forced = any(len(part) == 4 * window for part in parts)  # no place to cut was found
    assert forced or [token for part in parts for token in exactly(encoder, part)] == exactly(encoder, text)


def test_windows_are_bounded_even_where_there_is_no_place_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 100)
    assert [len(part) for part in windows("x" * 1000)] == [400, 400, 200]
    assert [len(part) for part in windows("word " * 100)] == [104, 100, 100, 100, 96]


def test_special_tokens_in_text_are_text(encoder: Encoder) -> None:
    for exact in (False, True):
        ids = encoder.encode(f"a{END_OF_TEXT}b", exactly=exact)
        assert len(ids) > 5 and 0 not in ids


def test_a_lone_surrogate_is_text(encoder: Encoder) -> None:
    assert encoder.encode("a\ud800b").tolist() == encoder.encode("a?b").tolist()


def slow_ones() -> Iterator[tuple[str, tokenizers.Tokenizer]]:
    """Tokenizers that only `tokenizers` itself does right."""
    normal = train(module.GPT2)
    normal.normalizer = normalizers.NFC()  # type: ignore[assignment]
    yield "a normaliser", normal
    added = train(module.GPT2)
    added.add_tokens(["import torch"])
    yield "an added token that is not special", added
    yield "an unknown split pattern", train(r"\p{L}+|[^\p{L}]+")
    prefix = train(module.GPT2)
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    yield "a prefix space", prefix
    marked = train(module.GPT2)
    marked.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    marked.normalizer = normalizers.NFC()  # type: ignore[assignment]
    yield "a special token that it would put in front", marked
    yield "dropout", train(module.GPT2, dropout=0.1)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, END_OF_TEXT: 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    yield "no BPE", words


@pytest.mark.parametrize(("why", "tokenizer"), list(slow_ones()))
def test_other_tokenizers_are_left_to_their_library(tmp_path: Path, why: str, tokenizer: tokenizers.Tokenizer) -> None:
    encoder = Encoder(prepared(tmp_path / "t", tokenizer, eos_token=END_OF_TEXT))
    assert encoder._fast is None, why
    ids = encoder.encode("a é")
    assert ids.dtype == np.uint32 and tokenizer.token_to_id(END_OF_TEXT) not in ids


def test_ids_that_do_not_follow_the_merges_are_left_to_their_library(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    assert module.fast_encoding(tokenizer) is not None
    merges = tokenizer["model"]["merges"]
    merges[10], merges[400] = merges[400], merges[10]
    assert module.fast_encoding(tokenizer) is None


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("kind", ["no merge yields it", "its own text does not yield it"])
def test_vocabulary_that_merges_do_not_produce_is_left_to_the_library(
    tmp_path: Path, folder: Path, kind: str, ignore_merges: bool
) -> None:
    """Seen to fail: `tiktoken`, which has no merges, used the entries, also inside of words.

    So it does where `tokenizers` looks whole words up (`ignore_merges`).
    """
    content = json.loads((folder / "tokenizer.json").read_bytes())
    model = content["model"]
    model["ignore_merges"] = ignore_merges
    size = len(model["vocab"])
    if kind == "no merge yields it":
        model["vocab"] |= {"zqj": size}
    else:
        model["vocab"] |= {"qj": size, "zq": size + 1, "zqj": size + 2}
        model["merges"] += [["q", "j"], ["z", "q"], ["zq", "j"]]
    encoder = Encoder(prepared(tmp_path / "t", tokenizers.Tokenizer.from_str(json.dumps(content))))
    for text in ("zqj", "azqj", "zqja zqj zqjzqj"):
        assert encoder.encode(text).tolist() == exactly(encoder, text)
    assert encoder._fast is None


def test_where_the_encoders_differ_the_slow_one_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(folder)
    fast = encoder._fast
    assert fast is not None and encoder.agrees("some text")
    monkeypatch.setattr(type(fast), "encode_ordinary", lambda self, text: [1, 2, 3])
    assert not encoder.agrees("some text")


TRAINED = """
import hashlib, sys
from pathlib import Path
from torchxihe.config.options import Tokenizer
from torchxihe.data.prepare.obtain_tokenizer import obtain
texts = [path.read_text() for path in sorted(Path(sys.argv[1]).rglob("*.py"))]
folder = obtain(Tokenizer(vocab_size=1500), Path(sys.argv[2]), texts, "texts")
print(hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest())
"""


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    root = Path(module.__file__).parents[2]
    command = [sys.executable, "-c", TRAINED, str(root / "torchxihe/data")]
    runs = [subprocess.run([*command, str(tmp_path / n)], capture_output=True, text=True, cwd=root) for n in "abc"]
    assert {run.returncode for run in runs} == {0} and len({run.stdout for run in runs}) == 1


def test_what_training_needs_to_know(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (0, -1, 1500)
    lengths = np.load(folder / "bytes_per_token.npy")
    assert lengths.dtype == np.int32 and lengths.shape == (1500,) and lengths[0] == 0
    for text in TEXTS + ODD:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
        assert tokenizer.decode([*tokenizer.encode(text), 0]) == text
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert settings["eos_token"] == END_OF_TEXT


def test_transformers_reads_the_folder(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == 0
    assert theirs(TEXTS[0])["input_ids"] == load_tokenizer(folder).encode(TEXTS[0])


def test_byte_alphabet_is_that_of_the_library() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert "".join(byte_alphabet()[byte] for byte in "é ".encode()) == "Ã©Ġ"


def test_sentencepiece_tokens_have_bytes_too(tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "▁", "a", "▁é", "<0x0A>"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder = prepared(tmp_path / "t", tokenizer, eos_token={"content": "</s>"}, bos_token="<s>")
    assert np.load(folder / "bytes_per_token.npy").tolist() == [0, 0, 1, 1, 3, 1]
    ours = load_tokenizer(folder)
    assert (ours.eos_id, ours.bos_id) == (1, 0) and ours.encode("a") == [0, 3]


def test_ids_are_those_of_the_loaded_tokenizer(tmp_path: Path) -> None:
    """An added token after a gap, which the library renumbers. Seen to fail: a chat's special token was id 1,600, and
    export ended in a KeyError."""
    content = json.loads(train(module.GPT2).to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<|end|>", "id": 1600})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "own" / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    folder = obtain(Tokenizer(path=str(tmp_path / "own")), tmp_path, [], "")
    encoder, ours = Encoder(folder), load_tokenizer(folder)
    assert encoder.special == {END_OF_TEXT: 0, "<|end|>": 1500}
    assert (ours.eos_id, ours.vocab_size) == (1500, 1501)
    assert encoder.encode_with_special("a<|end|>")[-1] == 1500


def blanks() -> Iterator[tuple[str, tokenizers.Tokenizer]]:
    """Tokenizers that put something before a text, take something off it, or have tokens across words."""

    def characters(*more: str) -> tokenizers.Tokenizer:
        pieces = [("<unk>", 0.0), ("<|endoftext|>", 0.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz.,▁\n\t ")]
        return tokenizers.Tokenizer(models.Unigram([*pieces, *((token, -2.0) for token in more)], unk_id=0))

    def with_(tokenizer: tokenizers.Tokenizer, **parts: Any) -> tokenizers.Tokenizer:
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        return tokenizer

    words = "▁the", "▁of", "ing", "▁▁▁"
    blank = normalizers.Replace(" ", "▁")
    llama = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    yield "Prepend", with_(characters(*words), normalizer=llama)
    for scheme in ("always", "first", "never"):
        yield (
            f"Metaspace {scheme}",
            with_(characters(*words), pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme)),
        )
    yield "Strip", with_(characters(*words), normalizer=normalizers.Sequence([normalizers.Strip(), blank]))
    yield "tokens across words", with_(characters(*words, "of▁the", ",▁a"), normalizer=blank)
    prefix = train(module.GPT2)
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    yield "add_prefix_space", prefix
    yield "an unknown pattern", train(r"\p{L}+|[^\p{L}]+")
    added = train(module.GPT2)
    added.add_tokens(["ing of", "the\n"])
    yield "added tokens across words", added


@pytest.mark.parametrize(
    ("kind", "tokenizer"), list(blanks()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_long_document_encodes_as_if_it_was_not_cut(
    tmp_path: Path, kind: str, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: a blank at the beginning of every window (Prepend, Metaspace, add_prefix_space), blanks lost before
    them (Strip), and tokens across a cut that were not found."""
    encoder = Encoder(prepared(tmp_path / "t", tokenizer, eos_token=END_OF_TEXT))
    random = Random(kind)
    words = ["the", "of", "ing", ",", ".", " ", "  ", "\n", "\t", "a", "xyz", "of the", ", a", "ing of", "the\n"]
    for size in (1, 2, 7, 40):
        monkeypatch.setattr(module, "WINDOW", size)
        for _ in range(60):
            text = " ".join(random.choices(words, k=random.randrange(1, 60)))
            if all(len(part) < 4 * size for part in windows(text)):  # else cut where there is no place for it
                for exact in (False, True):
                    ids = np.concatenate([*encoder.encode_long(text, exact)]).tolist()
                    assert ids == exactly(encoder, text), text


def test_a_path_may_be_the_file_or_its_folder(folder: Path, tmp_path: Path) -> None:
    made = [obtain(Tokenizer(path=str(path)), tmp_path, [], "") for path in (folder, folder / "tokenizer.json", folder)]
    assert len(set(made)) == 1


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"other.json": "{}"}, "there is no tokenizer.json in it"),
        ({"tokenizer.json": "{}"}, "`tokenizers` cannot load it"),
        ({"tokenizer.json": None}, "it has no end-of-text token; name one as eos_token"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "tokenizer_config.json: is not JSON"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": "[]"},
            "tokenizer_config.json: Input should be an object",
        ),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": {"a": 1}}'}, "eos_token is neither text nor"),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": ["a"]}'}, "eos_token is neither text nor"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "a", "bos_token": ["a"]}'},
            'tokenizer_config.json: bos_token is neither text nor {"content": text}',
        ),
    ],
)
def test_a_folder_without_a_usable_tokenizer(tmp_path: Path, files: dict[str, str | None], why: str) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    (tmp_path / "t").mkdir()
    for name, content in files.items():
        (tmp_path / "t" / name).write_text(words.to_str() if content is None else content)
    for _ in range(2):  # the failure leaves nothing behind that would be taken for a tokenizer
        with pytest.raises(UserError) as error:
            obtain(Tokenizer(path=str(tmp_path / "t")), tmp_path / "cache", [], "")
        message = str(error.value)
        assert message.startswith(f"tokenizer.path: {tmp_path}/t: ") and why in message and "\n" not in message


def test_a_path_that_is_no_hub_id(tmp_path: Path) -> None:
    for path in ("runs/nothing/tokenizer", str(tmp_path / "nothing")):
        with pytest.raises(UserError, match=rf"^tokenizer.path: {path}: no such file or folder; a run has"):
            obtain(Tokenizer(path=path), tmp_path, [], "")


def test_a_hub_tokenizer_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"tokenizer.path: nobody/nothing: not a file or folder here, .* reached"
    ) as error:
        obtain(Tokenizer(path="nobody/nothing"), tmp_path, [], "")
    assert "\n" not in str(error.value)


def test_text_without_blanks_trains_in_bounded_time(tmp_path: Path) -> None:
    """DNA, base64, hex: 256 characters at a time. Seen to fail without the cuts, which take 14 times as long for four
    times as much."""
    letters = "".join(Random(0).choices("acgt", k=400_000))
    for text in (letters, letters.replace("a", " ").replace("c", " ").replace("g", " ").replace("t", " ")):
        start = time.perf_counter()
        obtain(Tokenizer(vocab_size=300), tmp_path / str(len(set(text))), iter([text]), "")
        assert time.perf_counter() - start < 5
    cut = obtain_module._LONG_RUN.sub(r"\1\2\3 ", f"{'a' * 600}{'=' * 600} b{' ' * 700}c")
    assert max(map(len, re.findall(r"\w+|[^\w\s]+|\s+", cut))) == 257
    assert re.sub(r"\s", "", cut) == "a" * 600 + "=" * 600 + "bc"
    prose = "第一句话很短，第二句话也很短。" * 100  # has no blank, but places to cut at
    assert obtain_module._LONG_RUN.sub(r"\1\2\3 ", prose) == prose


TRAINING = """
import os, pathlib, sys
from torchxihe.config.options import Tokenizer
from torchxihe.data.prepare.obtain_tokenizer import obtain
def texts():
    for _ in range(100):
        yield os.urandom(50_000).hex(" ", 5)
    print("the library has it all", file=sys.stderr, flush=True)
obtain(Tokenizer(vocab_size=50_000), pathlib.Path(sys.argv[1]), texts(), "")
"""


def test_an_interrupt_ends_the_training_at_once(tmp_path: Path) -> None:
    """While the library is at work, and Python's own handler would not run. Seen to fail with that handler."""
    process = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "training a tokenizer of 50,000 tokens\n"
    assert process.stderr.readline() == "the library has it all\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(3) == -signal.SIGINT
    finally:
        process.kill()


def unigram(folder: Path, **eos: Any) -> Path:
    """A tokenizer whose vocabulary has `</s>` as a piece like any other."""
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz<>/▁")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    if eos:
        tokenizer.add_tokens([tokenizers.AddedToken("</s>", **eos)])
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return obtain(Tokenizer(path=str(folder)), folder, (), "")


@pytest.mark.parametrize("eos", [{}, {"special": True}, {"special": False}])
def test_text_never_yields_the_token_that_ends_documents(tmp_path: Path, eos: dict[str, Any]) -> None:
    """Seen to fail for the first and the last. Nor is what a file is padded with taken for a beginning."""
    ours = load_tokenizer(unigram(tmp_path / "own", **eos))
    assert (ours.eos_id, ours.bos_id) == (2, -1)
    ids = ours.encode("i wrote </s> here</s></s>")
    assert 2 not in ids and 0 not in ids
    assert "</s>" in ours.decode(ids).replace(" ", "").replace("▁", "")
    many = ours.encode("a</s>" * 5000)
    assert 2 not in many and len(many) >= 5 * 5000


def test_bytes_of_pieces_are_those_of_their_text(tmp_path: Path) -> None:
    """What marks a piece as a word's inside or end stands for no text, nor does the token that ends documents."""
    vocab = {"[UNK]": 0, "</s>": 1, "un": 2, "##able": 3}
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    vocab = {"</s>": 0, "a": 1, "b</w>": 2, "ab</w>": 3}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b</w>")], end_of_word_suffix="</w>"))
    for name, tokenizer, lengths in (("wordpiece", wordpiece, [5, 0, 2, 4]), ("words", words, [0, 1, 1, 2])):
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        folder = obtain(Tokenizer(path=str(tmp_path / name)), tmp_path, (), "")
        assert np.load(folder / "bytes_per_token.npy").tolist() == lengths


def test_a_token_of_one_character_ends_documents_too(tmp_path: Path) -> None:
    """A text that has it yields it: nothing else could stand for it."""
    characters = tokenizers.Tokenizer(models.WordLevel({"a": 0, "$": 1, "[UNK]": 2}, unk_token="[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    folder = prepared(tmp_path / "own", characters, eos_token="$")
    assert load_tokenizer(folder).encode("a$a") == [0, 1, 0]
