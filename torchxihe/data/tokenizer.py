"""Tokenizers: found or trained, kept in a folder of their own, and used at the speed of `tiktoken` where that is exact.

`tokenizers` and `tiktoken` are imported inside functions: training imports this package's readers, never them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchxihe.errors import UserError

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where `transformers` looks for it, too."""
WINDOW = 2**20
"""Characters that are encoded at once: what bounds the memory that a long document takes."""

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
    """`text` in parts of about `WINDOW` characters that encode to the same tokens as the whole.

    It is cut before white space that follows a letter or digit, and before a blank that follows anything but white
    space: no token of the known patterns reaches over such a place. Text that has none for four windows (which is no
    text) is cut all the same.
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
        """`folder`: one that `obtain` has filled."""
        import tokenizers  # slow, and never needed in training

        self._exact = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._exact.no_truncation()
        self._exact.no_padding()
        self._exact.post_processor = None  # type: ignore[assignment]  # nothing around the text, no blanks off its spans
        self._exact.encode_special_tokens = True
        content = json.loads((folder / "tokenizer.json").read_bytes())
        self._fast = fast_encoding(content)
        self.special: dict[str, int] = {t["content"]: t["id"] for t in content.get("added_tokens", []) if t["special"]}
        """Ids of the special tokens."""
        meta = read_meta(folder)
        vocab = {index: token for token, index in self._exact.get_vocab().items()}
        # What ends and begins documents may be no special token of the tokenizer's, but one that text can yield.
        # One character alone cannot be told from text.
        reserved = [vocab[index] for index in (meta["eos_id"], meta["bos_id"]) if index in vocab]
        self._reserved = [token for token in reserved if len(token) > 1]

    def encode(self, text: str, exactly: bool = False) -> np.ndarray:
        """Token ids of `text`, uint32. Long text must come in `windows`. `exactly`: by `tokenizers` in any case."""
        text = encodable(text)
        if exactly or self._fast is None:
            return self._encode_exactly(text)
        return self._fast.encode_to_numpy(text, disallowed_special=())

    def agrees(self, text: str) -> bool:
        """Whether the fast way gives the same ids for `text`."""
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

    def _encode_exactly(self, text: str) -> np.ndarray:
        [encoding] = self._exact.encode_batch_fast([text], add_special_tokens=False)
        ids = np.array(encoding.ids, np.uint32)
        for token in self._reserved:
            if self._exact.token_to_id(token) in ids and token in text:
                # Divided inside the token's spelling, which then is no token any more.
                first, *others = text.split(token)
                starts = [first, *(token[1:] + other for other in others)]
                parts = [*(start + token[:1] for start in starts[:-1]), starts[-1]]
                return np.concatenate([self._encode_exactly(part) for part in parts])
        return ids


def encodable(text: str) -> str:
    """`text` with "?" for lone surrogates, which JSON can spell and no tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class TextTokenizer:
    """Prompts to tokens and tokens to text, for sampling and looking at data."""

    def __init__(self, folder: Path) -> None:
        import tokenizers  # slow, and never needed while training

        self._encoder = Encoder(folder)
        self._decoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        meta = read_meta(folder)
        self.eos_id: int = meta["eos_id"]
        self.bos_id: int = meta["bos_id"]
        self.vocab_size: int = meta["vocab_size"]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as the beginning of a document: after the BOS token, if documents have one."""
        ids = [token for part in windows(text) for token in self._encoder.encode(part).tolist()]
        return [self.bos_id, *ids] if self.bos_id >= 0 else ids

    def decode(self, ids: list[int], special: bool = False) -> str:
        """The text of `ids`, with `special` that of special tokens too. Bytes that are not UTF-8 become U+FFFD."""
        return self._decoder.decode(ids, skip_special_tokens=not special)


def read_meta(folder: Path) -> dict[str, int]:
    """`eos_id`, `bos_id` (-1: none) and `vocab_size` of the tokenizer in a folder that `obtain` has filled."""
    return json.loads((folder / "torchxihe.json").read_bytes())


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer in a folder that `obtain` has filled, or a copy of one. Raises UserError."""
    if not (folder / "torchxihe.json").exists():
        raise UserError(f"{folder}: there is no prepared tokenizer in it")
    try:
        return TextTokenizer(folder)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{folder}: damaged: {error}; `torchxihe prepare` makes another, a run's may be copied"
        ) from None


def fast_encoding(tokenizer: dict[str, Any]) -> Any:
    """A `tiktoken.Encoding` that gives the same ids as a parsed `tokenizer.json`, or None.

    There is one for a byte-level BPE with a known split pattern, no normaliser, no added token but special ones, and
    ids in the order of the merges.
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
    return tiktoken.Encoding("prepare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


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
