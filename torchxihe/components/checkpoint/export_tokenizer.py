"""The tokenizer of an export: files that `transformers` reads, and a comparison of their ids with those of the run."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_LIMIT, load_tokenizer, read_meta, read_settings
from torchxihe.errors import UserError
from torchxihe.utils.records import read_bounded

NAMED_TOKENS = ("unk_token", "sep_token", "cls_token", "mask_token", "pad_token")

HARD_TEXTS = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  blanks  ",
    "\n",
    "\n\nlines\nend\n",
    "\ttabs\t\tand\r\nreturns\r",
    "def f(x):\n    return x**2  # squared\n",
    "Don't, DON'T; we'll they've I'm he'd it's",
    "1 12 123 1234 12345.67 1,000,000 0x7f",
    "CamelCase snake_case UPPER lower ~!@#%^&*()[]{}\\|/?",
    "naïve café Ünïcode ß ẞ İ ı",
    "e\u0301 composed \u00e9, A\u030a \u00c5 \u212b, \ufb01 \u2460 \uff21",  # what NFC or NFKC would change
    "中文字，日本語。한국어 ไทย हिन्दी العربية עברית",
    "😀 👩\u200d👩\u200d👧\u200d👦 🇩🇪 ☃",
    "\u00a0nbsp \u2003em\u3000wide\u200bzero\ufeffbom",
    "\x00\x01\x7f\x80",
    "▁metaspace Ġbyte ##piece</w>",
    "a" * 100 + " " * 50 + "\n" * 20 + "ab" * 50,
)
"""Texts on which tokenizers differ: blanks at either end, runs of them, what normalizers change, every script."""

log = logging.getLogger(__name__)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of the run's folder `source` to `folder`, which has the model's config.json.

    `tokenizer_config.json` names `PreTrainedTokenizerFast`, which reads `tokenizer.json` as it is: the class that the
    user's own file names may encode in another way. Before a text, the tokenizer puts what training had there: the BOS
    token, if documents begin with one, and nothing else. The pad token is in the vocabulary. Raises UserError if the
    written files give other ids than the run's tokenizer.
    """
    import tokenizers  # slow, and never needed in training
    from tokenizers.processors import TemplateProcessing

    meta = read_meta(source)
    tokenizer: Any = tokenizers.Tokenizer.from_buffer(read_bounded(source / "tokenizer.json", TOKENIZER_LIMIT))
    plain = tokenizer.padding is None and tokenizer.truncation is None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bos = [tokenizer.id_to_token(meta.bos_id)] if meta.bos_id >= 0 else []
    if plain and tokenizer.encode("").tokens == bos:
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    else:
        special = [(token, meta.bos_id) for token in bos]
        tokenizer.post_processor = TemplateProcessing(
            single=[*bos, "$A"], pair=[*bos, "$A", *bos, "$B"], special_tokens=special
        )
        # Its own `save` raises no OSError.
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    if (source / CHAT_TEMPLATE_FILE).exists():  # a file of its own, as newer versions of `transformers` have it
        shutil.copyfile(source / CHAT_TEMPLATE_FILE, folder / CHAT_TEMPLATE_FILE)
    settings = _settings(read_settings(source), tokenizer, meta.eos_id, bos)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    check_ids(source, folder)


def _settings(own: dict[str, Any], tokenizer: Any, eos_id: int, bos: list[str]) -> dict[str, Any]:
    """tokenizer_config.json: of the user's own settings only those that change no ids."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    eos = tokenizer.id_to_token(eos_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "pad_token": eos,
    }
    if bos:
        settings["bos_token"] = bos[0]
    for name in NAMED_TOKENS:
        token = own.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in special:  # another one would be added, beyond the embedding
            settings[name] = token
    limit = own.get("model_max_length")
    return settings | ({"model_max_length": limit} if type(limit) is int else {})


def check_ids(source: Path, folder: Path) -> None:
    """Raise UserError if the tokenizer in `folder` gives other ids than the run's in `source`.

    Compared are `tokenizers` and, if it is installed, `transformers`, on `HARD_TEXTS`. A text that spells a special
    token is left out: of that, both make the token, while training reads it as text.
    """
    import tokenizers  # slow, and never needed in training

    ours, meta = load_tokenizer(source), read_meta(source)
    written: Any = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = written.get_added_tokens_decoder().values()
    ends = [written.id_to_token(index) for index in (meta.eos_id, meta.bos_id) if index >= 0]
    spelled = {*(token.content for token in added if token.special), *ends}
    texts = {text: ours.encode(text) for text in HARD_TEXTS if not any(token in text for token in spelled)}

    def compare(library: str, encode: Callable[[str], list[int]]) -> None:
        for text, ids in texts.items():
            if (found := encode(text)) != ids:
                raise UserError(
                    f"{source}: {library} would encode {text!r} as {found}, the run's tokenizer as {ids}: the model "
                    "would read other tokens than it was trained on; not exported"
                )

    compare("tokenizers", lambda text: written.encode(text).ids)
    if importlib.util.find_spec("transformers") is None:
        return
    try:
        import transformers  # slow, and optional
    except Exception as error:  # of a broken installation, anything
        log.warning("the exported tokenizer was not compared with transformers, which cannot be imported: %s", error)
        return
    library = f"transformers {transformers.__version__}"
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: {library} cannot load the exported tokenizer: {why}; not exported") from None
    compare(library, lambda text: theirs(text)["input_ids"])
    named = {"eos_token_id": meta.eos_id, "bos_token_id": meta.bos_id if meta.bos_id >= 0 else None}
    for name, index in named.items():
        if getattr(theirs, name) != index:
            raise UserError(
                f"{source}: {name} is {getattr(theirs, name)} in {library}, {index} in the run; not exported"
            )
    if len(theirs) > meta.vocab_size:
        raise UserError(f"{source}: {library} has {len(theirs)} tokens, the run {meta.vocab_size}; not exported")
