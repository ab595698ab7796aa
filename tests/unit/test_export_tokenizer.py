"""The exported tokenizer gives the ids of training, whatever class and settings the user's own files name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.unit.saved_runs import LLAMA, TEXT, make_config
from torchxihe.components.checkpoint import export_tokenizer as module
from torchxihe.components.checkpoint.export_tokenizer import HARD_TEXTS, check_ids, write_tokenizer
from torchxihe.config.options import Tokenizer
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.errors import UserError
from torchxihe.model.hf import hf_config

transformers: Any = pytest.importorskip("transformers")
END = "<|endoftext|>"


def byte_level(**parts: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As converted from Llama 2's or Gemma's: BPE with byte fallback over text whose blanks are replaced."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    for char in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,()\n":
        vocab.setdefault(char, len(vocab))
    vocab |= {"▁a": len(vocab), "▁▁": len(vocab) + 1}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def cases() -> Iterator[tuple[str, tokenizers.Tokenizer, dict[str, Any]]]:
    """What users' folders say: a class, settings, and a tokenizer.json that the class would not encode with."""
    yield "GPTNeoXTokenizerFast", byte_level(), {"eos_token": END, "bos_token": END, "add_prefix_space": True}
    with_bos = byte_level(post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    yield "GPTNeoXTokenizerFast", with_bos, {"eos_token": END, "bos_token": "<s>"}
    yield "GPT2Tokenizer", byte_level(), {"eos_token": END, "add_prefix_space": True, "pad_token": "[PAD]"}
    yield "GPT2Tokenizer", byte_level(), {"eos_token": END, "unk_token": "<unk>", "bos_token": "<s>"}
    yield "Qwen2Tokenizer", byte_level(), {"eos_token": END, "pad_token": "<|pad|>", "add_prefix_space": False}
    yield "Qwen2Tokenizer", byte_level(normalizer=normalizers.NFC()), {"eos_token": END}
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    yield "LlamaTokenizer", sentencepiece(), llama
    yield "LlamaTokenizer", byte_level(), {"eos_token": END, "bos_token": "<s>", "add_bos_token": False}
    yield "LlamaTokenizerFast", sentencepiece(), llama | {"add_bos_token": False, "add_eos_token": True}
    yield "GemmaTokenizer", sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    yield "GemmaTokenizer", byte_level(), {"eos_token": END, "add_bos_token": True, "bos_token": "<s>"}
    yield (
        "NoSuchTokenizer",
        byte_level(),
        {"eos_token": END, "extra_special_tokens": ["<x>"], "split_special_tokens": True},
    )
    padded = byte_level()
    padded.enable_padding(length=9, pad_id=1, pad_token="<s>")
    padded.enable_truncation(4)
    yield "PreTrainedTokenizerFast", padded, {"eos_token": {"content": END, "lstrip": True}, "model_max_length": 7}
    yield "PreTrainedTokenizerFast", byte_level(), {"eos_token": END, "pad_token": {"content": "<s>"}}


def make(folder: Path, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> tuple[Path, Path]:
    """The run's tokenizer of the user's files, and a folder for the export that has the model's config."""
    own, out = folder / "own", folder / "out"
    own.mkdir()
    out.mkdir()
    tokenizer.save(str(own / "tokenizer.json"))
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    config = hf_config(
        make_config(folder, LLAMA).model, seq_len=128, dtype="float32", vocab_size=320, eos_id=0, bos_id=-1
    )
    (out / "config.json").write_text(json.dumps(config))
    return obtain(Tokenizer(path=str(own)), folder / "cache", (), ""), out


CASES = list(cases())


@pytest.mark.parametrize(("name", "tokenizer", "settings"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_ids_are_those_of_training(
    tmp_path: Path, name: str, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]
) -> None:
    """Seen to fail with the user's class and settings: BOS lost or added, blanks lost or added, NFC where training had
    none, a pad id beyond the embedding."""
    source, out = make(tmp_path, tokenizer, {"tokenizer_class": name, **settings})
    write_tokenizer(source, out)
    ours, theirs = load_tokenizer(source), transformers.AutoTokenizer.from_pretrained(out)
    plain = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in [*HARD_TEXTS, *TEXT]:
        if END not in text and "</s>" not in text:
            assert theirs(text)["input_ids"] == plain.encode(text).ids == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id and 0 <= theirs.pad_token_id < ours.vocab_size >= len(theirs)
    assert theirs.bos_token_id == (ours.bos_id if ours.bos_id >= 0 else None)
    batch = theirs(["a", "a longer text"], padding=True)["input_ids"]
    assert len(batch[0]) == len(batch[1]) and max(map(max, batch)) < ours.vocab_size


def test_a_pad_token_of_the_users_is_kept_if_it_is_in_the_vocabulary(tmp_path: Path) -> None:
    for pad, kept in (("<s>", "<s>"), ("[PAD]", END), ("a", END)):
        (tmp_path / pad).mkdir()
        source, out = make(tmp_path / pad, byte_level(), {"eos_token": END, "pad_token": pad})
        write_tokenizer(source, out)
        assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == kept


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_other_ids_are_an_error(tmp_path: Path, library: str) -> None:
    source, out = make(tmp_path, byte_level(), {"eos_token": END})
    write_tokenizer(source, out)
    if library == "tokenizers":
        byte_level(normalizer=normalizers.NFC()).save(str(out / "tokenizer.json"))
    else:
        path = out / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}))
    with pytest.raises(UserError, match=rf"^{source}: {library}.* would encode .*; not exported$") as error:
        check_ids(source, out)
    assert "\n" not in str(error.value)


def test_without_transformers_there_is_still_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make(tmp_path, byte_level(), {"eos_token": END})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    write_tokenizer(source, out)
    byte_level(normalizer=normalizers.NFC()).save(str(out / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizers would encode"):
        check_ids(source, out)
