"""Encoding and decoding with a prepared tokenizer; `tiktoken` encodes where it gives the same ids as `tokenizers`.

`tokenizers` and `tiktoken` are imported inside functions: the read path of training imports this module, not them.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchxihe.data.manifests import TokenizerMeta, read_sealed
from torchxihe.errors import UserError
from torchxihe.utils.records import DamagedError, parse_record, read_bounded

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The name that `transformers` uses, too."""
TOKENIZER_LIMIT = 2**28
"""Bytes of one file of a tokenizer at most."""
WINDOW = 2**20
"""Characters that are encoded together: bounds the memory of a long document."""

# Split patterns that are known to mean the same to `tokenizers` and `tiktoken`, and to allow the cuts of `windows`.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    GPT2,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _CL100K % "{1,3}",  # Llama 3
    _CL100K % "",  # Qwen 2, without its normaliser
}

_CUT = re.compile(r"(?<=[^\W_])(?=\s)|(?<=\S)(?= )")


def windows(text: str) -> Iterator[str]:
    """`text` in parts of about `WINDOW` characters, cut where no token of the known patterns can cross.

    That is before white space that follows a letter or digit, and before a blank that follows anything but white
    space. Text without such a place within four windows (no natural text) is cut there.
    """
    at = 0
    while len(text) - at > WINDOW:
        found = _CUT.search(text, at + WINDOW, at + 4 * WINDOW)
        end = found.start() if found else min(len(text), at + 4 * WINDOW)
        yield text[at:end]
        at = end
    if at < len(text) or not text:
        yield text[at:]


class Encoder:
    """Text to token ids. Spellings of special tokens are text like any other."""

    def __init__(self, folder: Path) -> None:
        """`folder`: one that `obtain` has filled. Raises UserError if it is damaged."""
        import tokenizers  # slow, and never needed in training

        meta = read_meta(folder)
        content = read_bounded(folder / "tokenizer.json", TOKENIZER_LIMIT)
        self._exact = tokenizers.Tokenizer.from_buffer(content)
        self._exact.no_truncation()
        self._exact.no_padding()
        self._exact.post_processor = None  # type: ignore[assignment]  # nothing around the text, no blanks off its spans
        self._exact.encode_special_tokens = True
        # Ids are those of the loaded tokenizer: the library renumbers added tokens that follow a gap.
        added = self._exact.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        """Ids of the special tokens."""
        vocab = {index: token for token, index in self._exact.get_vocab().items()}
        self._fast = fast_encoding(json.loads(content))
        self._cuttable = self._fast is not None or not any(map(_CUT.search, _texts_of(vocab.values())))
        # The EOS and BOS tokens may be ordinary tokens, which text can yield.
        # A token of one character cannot be distinguished from text.
        reserved = [vocab[index] for index in (meta.eos_id, meta.bos_id) if index in vocab]
        self._reserved = [token for token in reserved if len(token) > 1]

    def encode_long(self, text: str, exactly: bool = False) -> Iterator[np.ndarray]:
        """Token ids of `text`, uint32, in parts of bounded memory: laid end to end, those of the uncut text.

        `exactly`: by `tokenizers` in any case. A tokenizer that has tokens across the places where text is cut
        encodes the text as one part.
        """
        at = 0
        for part in windows(text) if self._cuttable else [text]:
            if at and (exactly or self._fast is None):
                # What a normalizer or pre-tokenizer puts before a text (a blank) comes before this character, whose
                # tokens are dropped.
                yield self._encode_exactly(encodable(text[at - 1] + part), skip=1)
            else:
                yield self.encode(part, exactly)
            at += len(part)

    def encode(self, text: str, exactly: bool = False) -> np.ndarray:
        """Token ids of `text`, uint32; `encode_long` is for long text. `exactly`: by `tokenizers` in any case."""
        text = encodable(text)
        if exactly or self._fast is None:
            return self._encode_exactly(text)
        return self._fast.encode_to_numpy(text, disallowed_special=())

    def agrees(self, text: str) -> bool:
        """Whether `tiktoken`, if it is used, and `tokenizers` give the same ids for `text`."""
        text = encodable(text)
        return self._fast is None or self._fast.encode_ordinary(text) == self._encode_exactly(text).tolist()

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of `text`, uint32 [n], and the characters that each stands for: start and end, int64 [n, 2]."""
        encoding = self._exact.encode(encodable(text), add_special_tokens=False)
        return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def encode_with_special(self, text: str) -> list[int]:
        """Token ids of `text`, in which the spelling of a special token is that token."""
        self._exact.encode_special_tokens = False
        try:
            return self._exact.encode(text, add_special_tokens=False).ids
        finally:
            self._exact.encode_special_tokens = True

    def _encode_exactly(self, text: str, skip: int = 0) -> np.ndarray:
        """Ids by `tokenizers`, uint32, without those of the first `skip` characters."""
        if skip:
            encoding = self._exact.encode(text, add_special_tokens=False)
            first = next((i for i, (start, _) in enumerate(encoding.offsets) if start >= skip), len(encoding.ids))
            ids = np.array(encoding.ids[first:], np.uint32)
        else:
            [encoding] = self._exact.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.uint32)
        for token in self._reserved:
            if self._exact.token_to_id(token) in ids and token in text[skip:]:
                # Cut inside the token's spelling, which then is no token any more.
                first_part, *others = text.split(token)
                starts = [first_part, *(token[1:] + other for other in others)]
                parts = [*(start + token[:1] for start in starts[:-1]), starts[-1]]
                skips = [skip] + [0] * (len(parts) - 1)
                return np.concatenate([self._encode_exactly(part, n) for part, n in zip(parts, skips, strict=True)])
        return ids


def encodable(text: str) -> str:
    """`text` with "?" for lone surrogates, which JSON can contain and no tokenizer accepts."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class TextTokenizer:
    """Prompts to tokens and tokens to text, for sampling and for showing data."""

    def __init__(self, folder: Path) -> None:
        import tokenizers  # slow, and never needed while training

        self._encoder = Encoder(folder)
        self._decoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        meta = read_meta(folder)
        self.eos_id, self.bos_id, self.vocab_size = meta.eos_id, meta.bos_id, meta.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as the beginning of a document: after the BOS token, if documents have one."""
        ids = [token for part in self._encoder.encode_long(text) for token in part.tolist()]
        return [self.bos_id, *ids] if self.bos_id >= 0 else ids

    def decode(self, ids: list[int], special: bool = False) -> str:
        """The text of `ids`, with `special` that of special tokens too. Bytes that are not UTF-8 become U+FFFD."""
        return self._decoder.decode(ids, skip_special_tokens=not special)


def read_meta(folder: Path) -> TokenizerMeta:
    """`torchxihe.json` of a prepared tokenizer, or of a copy, after a check of every file that it names.

    Raises UserError if one of them is missing or damaged.
    """
    path = folder / "torchxihe.json"
    try:
        meta = read_sealed(path, TokenizerMeta)
        for name, known in meta.xxh3_128.items():
            path = folder / name
            if xxhash.xxh3_128_hexdigest(read_bounded(path, TOKENIZER_LIMIT)) != known:
                raise DamagedError("its content differs from what was written")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {_REMEDY}") from None
    except (DamagedError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: damaged: {error}; {_REMEDY}") from None
    return meta


_REMEDY = "`torchxihe prepare CONFIG` restores it in the cache; a run's tokenizer/ is a copy of that"


def read_bytes_per_token(folder: Path) -> np.ndarray:
    """`bytes_per_token.npy` of a prepared tokenizer: int32 [vocab_size]. Raises UserError."""
    path = folder / "bytes_per_token.npy"
    try:
        table = np.load(io.BytesIO(read_bounded(path, TOKENIZER_LIMIT)))
        if table.dtype != np.int32 or table.shape != (read_meta(folder).vocab_size,):
            raise DamagedError("not one int32 per token")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {_REMEDY}") from None
    except (DamagedError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged: {error}; {_REMEDY}") from None
    return table


def read_settings(folder: Path) -> dict[str, Any]:
    """The object in `tokenizer_config.json` of a tokenizer's folder. Raises UserError."""
    path = folder / "tokenizer_config.json"
    try:
        return parse_record(read_bounded(path, TOKENIZER_LIMIT), dict[str, Any])
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {_REMEDY}") from None
    except DamagedError as error:
        raise UserError(f"{path}: {error}") from None


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer in a folder that `obtain` has filled, or a copy of one. Raises UserError."""
    try:
        return TextTokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: damaged: {error}; {_REMEDY}") from None


def fast_encoding(tokenizer: dict[str, Any]) -> Any:
    """A `tiktoken.Encoding` that gives the same ids as a parsed `tokenizer.json`, or None.

    There is one for a byte-level BPE with a known split pattern, no normaliser, no added tokens but special ones, ids
    in the order of the merges, and no vocabulary entry that its own merges do not produce: `tiktoken` knows no merges
    and would use such an entry.
    """
    import tiktoken  # slow, and never needed in training

    model = tokenizer["model"]
    pattern = _split_pattern(tokenizer.get("pre_tokenizer") or {})
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    added = tokenizer.get("added_tokens", [])
    if model.get("type") != "BPE" or any(model.get(name) for name in odd) or tokenizer.get("normalizer"):
        return None
    if pattern not in PATTERNS or not all(token["special"] for token in added):
        return None
    special = {token["content"] for token in added}
    byte_of = {char: value for value, char in enumerate(byte_alphabet())}
    ranks = {}
    for token, rank in model["vocab"].items():
        if token not in special:
            if not byte_of.keys() >= set(token):
                return None
            ranks[bytes(byte_of[char] for char in token)] = rank
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [model["vocab"].get("".join(pair), -1) for pair in pairs]
    if merged != sorted(set(merged)) or not ranks.keys() >= {bytes([value]) for value in range(256)}:
        return None
    if not _merges_produce_vocabulary(model, [tuple(pair) for pair in pairs], special):
        return None
    return tiktoken.Encoding("prepare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _merges_produce_vocabulary(model: dict[str, Any], pairs: list[Any], special: set[str]) -> bool:
    """Whether the merges, applied to the text of each entry of a BPE's vocabulary, produce that entry.

    With `ignore_merges` too: `tokenizers` then looks up words as they are, but `tiktoken` would also use such entries
    inside of words.
    """
    import tokenizers  # slow, and never needed in training

    merges = tokenizers.models.BPE(model["vocab"], pairs, ignore_merges=False)
    return all(
        [found.value for found in merges.tokenize(token)] == [token] for token in model["vocab"] if token not in special
    )


def _texts_of(tokens: Any) -> Iterator[str]:
    """The text of vocabulary entries as far as white space goes, whichever way they spell it."""
    for token in tokens:
        yield token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("ĉ", "\t").replace("č", "\r")


def _split_pattern(pre: dict[str, Any]) -> str:
    """The split pattern of a byte-level pre-tokenizer; "" if it is anything else."""
    if pre.get("type") == "ByteLevel":
        return GPT2 if pre.get("use_regex", True) and not pre.get("add_prefix_space") else ""
    steps = pre.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return ""
    split, level = steps
    plain = split["behavior"] == "Isolated" and not split["invert"]
    bare = not level.get("use_regex", True) and not level.get("add_prefix_space")
    return split["pattern"].get("Regex", "") if plain and bare else ""


def byte_alphabet() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself if printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]
