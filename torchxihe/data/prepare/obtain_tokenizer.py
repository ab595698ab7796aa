"""Tokenizers: found (a file, a folder, a hub id) or trained on the sources, and stored in a folder of the cache."""

import hashlib
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchxihe.config.options import Tokenizer
from torchxihe.data.manifests import TokenizerMeta, write_sealed
from torchxihe.data.prepare.hub import settle_hub
from torchxihe.data.store import digest
from torchxihe.data.tokenizer import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_LIMIT,
    read_bytes_per_token,
    read_meta,
    read_settings,
)
from torchxihe.errors import UserError
from torchxihe.utils.files import write_json, write_text
from torchxihe.utils.records import DamagedError, parse_record, read_bounded

END_OF_TEXT = "<|endoftext|>"
"""The only special token of a tokenizer that is trained here."""
CHAT_TEMPLATE = """\
{% if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}
{% for message in messages %}
{{ message['role'] + '\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{% if add_generation_prompt %}
{{ 'assistant\\n' }}
{%- endif %}
"""
"""Used for a tokenizer without a chat template. ChatML without its two tokens: the end-of-text token, which no text
yields, ends every message, and a role follows. Contents are trimmed, so that no token crosses a message's start."""

_LONG_RUN = re.compile(r"(\w{256})(?=\w)|([^\w\s]{256})(?=[^\w\s])|(\s{256})\s+")
"""Runs that the split pattern does not cut (DNA, base64). The time of training is quadratic in the longest run: ten
megabytes of letters take hours."""


def obtain(options: Tokenizer, cache: Path, sample: Iterable[str], sample_key: str, chat: bool = False) -> Path:
    """The folder of the tokenizer that `options` ask for, made if it does not exist or is damaged.

    It holds `tokenizer.json`, `tokenizer_config.json`, `torchxihe.json` (`TokenizerMeta`), `bytes_per_token.npy` and,
    if the tokenizer has a chat template or must have one (`chat`), `chat_template.jinja`.
    `sample`: text to train on; `sample_key`: changes with it. Raises UserError.
    """
    files = _find(options) if options.path else {}
    what: list[Any] = [[name, hashlib.sha256(content).hexdigest()] for name, content in files.items()]
    template = _chat_template(options, files) or (CHAT_TEMPLATE if chat else "")
    folder = cache / "tokenizers" / digest([what or [options.vocab_size, sample_key], template])
    if _is_complete(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if template:
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    if not options.path:
        _train(options.vocab_size, sample, folder)
    _finish(folder, f"tokenizer.path: {options.path}")
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether a tokenizer is there, every file of it as it was written."""
    try:
        read_meta(folder)
        read_bytes_per_token(folder)
    except UserError:
        return False
    return True


def _find(options: Tokenizer) -> dict[str, bytes]:
    """The contents of `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`."""
    path = Path(options.path)
    names = ["tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE_FILE]
    if path.is_file():
        path, names[0] = path.parent, path.name
    if path.is_dir():
        found = [path / name if (path / name).exists() else None for name in names]
        if found[0] is None:
            raise UserError(f"tokenizer.path: {path}: there is no tokenizer.json in it")
    elif len(path.parts) > 2 or path.is_absolute():
        raise UserError(f"tokenizer.path: {path}: no such file or folder; a run has its tokenizer/ once it is trained")
    else:
        found = [_download(options, name) for name in names]
    if found[0] is None:
        raise UserError(f"tokenizer.path: {options.path}: the repository has no tokenizer.json")
    files = {"tokenizer.json": _read(found[0]), "tokenizer_config.json": b"{}"}
    return files | {name: _read(file) for name, file in zip(names[1:], found[1:], strict=True) if file}


def _read(path: Path) -> bytes:
    """A file of a tokenizer. Raises UserError if it is unreasonably large, not a regular file or cannot be read."""
    try:
        return read_bounded(path, TOKENIZER_LIMIT)
    except DamagedError as error:
        raise UserError(f"tokenizer.path: {path}: {error}") from None
    except OSError as error:
        raise UserError(f"tokenizer.path: {path}: {error.strerror or error}") from None


def _chat_template(options: Tokenizer, files: dict[str, bytes]) -> str:
    """The chat template that is asked for, or else the tokenizer's own; "" if there is none."""
    if options.chat_template:
        try:
            return read_bounded(options.chat_template, TOKENIZER_LIMIT).decode()
        except (OSError, UnicodeDecodeError, DamagedError) as error:
            why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", "") or error
            raise UserError(f"tokenizer.chat_template: {options.chat_template}: {why}") from None
    if CHAT_TEMPLATE_FILE in files:
        return files[CHAT_TEMPLATE_FILE].decode("utf-8", "replace")
    try:
        settings = parse_record(files.get("tokenizer_config.json", b"{}"), dict[str, Any])
    except DamagedError:  # reported by `_finish`
        return ""
    within = settings.get("chat_template")
    try:
        if isinstance(within, list):  # several, by name
            within = next((entry["template"] for entry in within if entry["name"] == "default"), "")
    except (KeyError, TypeError):
        within = {}
    within = within or ""
    if not isinstance(within, str):
        where = f"tokenizer.path: {options.path}: tokenizer_config.json: chat_template"
        raise UserError(f"{where} is neither text nor a list of named texts; name a file as tokenizer.chat_template")
    return within


def _download(options: Tokenizer, name: str) -> Path | None:
    """A file of a hub repository, from its cache if it is there; None if the repository has no such file."""
    settle_hub()
    import huggingface_hub  # slow, and only for hub tokenizers
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(options.path, name, revision=options.revision or None))
    except LocalEntryNotFoundError as error:
        if name == CHAT_TEMPLATE_FILE:  # most have none, and a cache does not remember that
            return None
        why = f"the hub cannot be reached ({' '.join(str(error).split())[:200]})"
    except EntryNotFoundError:
        return None
    except Exception as error:  # not found, gated, no network: all manner of types, every one about what was asked for
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise UserError(f"tokenizer.path: {options.path}: not a file or folder here, and not to be had from the hub: {why}")


def _train(vocab_size: int, sample: Iterable[str], folder: Path) -> None:
    """Train a byte-level BPE with GPT-2's split pattern on `sample`."""
    import tokenizers  # slow, and never needed in training
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    print(f"training a tokenizer of {vocab_size:,} tokens", file=sys.stderr, flush=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait until the library returns
    try:
        tokenizer.train_from_iterator((_LONG_RUN.sub(r"\1\2\3 ", text) for text in sample), trainer)
    finally:
        signal.signal(signal.SIGINT, handler)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))  # its own `save` raises no OSError
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 10**30}
    write_json(folder / "tokenizer_config.json", settings)


def _finish(folder: Path, where: str) -> None:
    """Write `bytes_per_token.npy`, and last `torchxihe.json`, for the tokenizer in `folder`. Raises UserError."""
    import tokenizers  # slow, and never needed in training

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: `tokenizers` cannot load it: {error}") from None
    try:
        settings = read_settings(folder)
    except UserError as error:
        raise UserError(f"{where}: tokenizer_config.json: {str(error).partition(': ')[2]}") from None
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocab.values()) + 1

    def special(name: str, usual: tuple[str, ...]) -> int:
        token = settings.get(name) or ""
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise UserError(f'{where}: tokenizer_config.json: {name} is neither text nor {{"content": text}}')
        return next((vocab[text] for text in ([token] if token else usual) if text in vocab), -1)

    eos = special("eos_token", (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"))
    if eos < 0:
        raise UserError(
            f"{where}: it has no end-of-text token; name one as eos_token in a tokenizer_config.json beside it"
        )
    bos = special("bos_token", ())
    if "bos_token" not in settings:  # there may be no settings at all; it is what the tokenizer puts before a text
        tokenizer.no_padding()
        bos = next(iter(tokenizer.encode("").ids), -1)
    lengths = _bytes_per_token(folder, vocab, size)
    lengths[[index for index in (eos, bos) if index >= 0]] = 0
    np.save(folder / "bytes_per_token.npy", lengths)
    hashes = {file.name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in folder.iterdir()}
    bos = -1 if bos == eos else bos
    write_sealed(folder / "torchxihe.json", TokenizerMeta(eos_id=eos, bos_id=bos, vocab_size=size, xxh3_128=hashes))


def _bytes_per_token(folder: Path, vocab: dict[str, int], size: int) -> np.ndarray:
    """UTF-8 bytes of text that each token stands for: int32 [size]."""
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    added = {token["content"]: token["special"] for token in tokenizer.get("added_tokens", [])}
    byte_level = '"ByteLevel"' in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    model = tokenizer["model"]
    prefix = model.get("continuing_subword_prefix") or ""  # marks that are not part of the text
    suffix = model.get("end_of_word_suffix") or ""
    lengths = np.zeros(size, np.int32)
    for token, index in vocab.items():
        if token in added:
            lengths[index] = 0 if added[token] else len(token.encode())
        elif byte_level:
            lengths[index] = len(token)  # a character a byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            lengths[index] = 1
        else:
            text = token.removeprefix(prefix).removesuffix(suffix)
            lengths[index] = len(text.replace("▁", " ").encode())  # SentencePiece's blank
    return lengths
