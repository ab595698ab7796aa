"""Show the prepared data of a config, and rows as the model will see them."""

import itertools

import numpy as np

from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.data.tokenizer import TextTokenizer, load_tokenizer
from torchxihe.errors import UserError
from torchxihe.parsers import parse
from torchxihe.utils.words import counted


def main(args: list[str]) -> None:
    """Run the command with its arguments. Raises UserError."""
    options = parse("data", args)
    if options.first < 0 or options.rows < 0 or options.first + options.rows > 2**62:
        raise UserError("data: --rows and --first are 0 or more, and below 2^62")
    config = load_config(options.config, options.overrides)
    prepared = open_prepared(config)
    order = Order(plan_stages(config, prepared), prepared.rows)
    print(_table(summarise(config, prepared, order)))
    if options.rows:
        tokenizer = load_tokenizer(prepared.tokenizer_dir)
        for g in range(options.first, options.first + options.rows):
            print()
            print(show_row(prepared, order, tokenizer, g, config.data.seq_len))


def summarise(config: Config, prepared: Prepared, order: Order) -> list[dict[str, str]]:
    """One line per source and validation set: its size, and how much of it the run reads."""
    untouched = [0] * len(prepared.sets)
    quotas = [*order.stages[-1].quotas, *untouched]
    planned = [*order.epochs(config.total_steps), *untouched]
    lines = []
    for source, quota, epochs in zip(prepared.held_out, quotas, planned, strict=True):
        lines.append(
            {
                "source": source.name,
                "documents": f"{source.documents:,}",
                "tokens": f"{source.tokens:,}",
                "bytes/token": f"{source.bytes / source.tokens:.2f}",
                "rows": f"{source.train_rows:,}",
                "held out": f"{source.valid_rows:,}",
                "share": f"{quota / sum(quotas):.2%}",
                "epochs": f"{epochs:.2f}",
                "dropped": ", ".join(f"{count} {why}" for why, count in source.dropped.items()) or "none",
            }
        )
    return lines


def _table(lines: list[dict[str, str]]) -> str:
    """A table with names aligned left and numbers right."""
    rows = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, len(widths) - 1}
    cells = [
        [f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True))]
        for r in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def show_row(prepared: Prepared, order: Order, tokenizer: TextTokenizer, g: int, seq_len: int) -> str:
    """The row of sample `g`: a heading, then a paragraph per document; tokens without loss are in ⟦brackets⟧.

    That is the first token of every document (nothing before it may predict it), padding, and what roles say
    that are not learned. ⏹ is the end-of-text token.
    """
    sources, rows, epochs = (int(x[0]) for x in order.samples(np.array([g])))
    source = prepared.sources[sources]
    reader = source.open("train")
    tokens = np.empty(seq_len + 1, reader.dtype)
    mask = np.ones(seq_len + 1, np.uint8)
    lengths = reader.read(rows, tokens, mask if reader.masked else None)
    lines = [
        f"=== sample {g}: {source.name}, row {rows}, epoch {epochs}, "
        f"{counted(len(lengths), 'document')}, {counted(sum(lengths), 'token')}"
    ]
    at = 0
    for number, length in enumerate(lengths):
        mask[at] = 0
        ids, learned = tokens[at : at + length].tolist(), mask[at : at + length].tolist()
        lines.append(f"--- document {number}: {counted(length, 'token')} starting at {at}")
        lines.append(_spell(tokenizer, ids, learned) + ("" if ids[-1] == prepared.eos_id else " …"))
        at += length
    if at <= seq_len:
        lines.append(f"--- ⟦{counted(seq_len + 1 - at, 'token')} of padding⟧")
    return "\n".join(lines)


def _spell(tokenizer: TextTokenizer, ids: list[int], learned: list[int]) -> str:
    """The tokens as text, those that are not `learned` in brackets."""
    out = ""
    for carries, group in itertools.groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        text = ""
        for end, run in itertools.groupby((token for token, _ in group), key=lambda token: token == tokenizer.eos_id):
            tokens = list(run)
            text += "⏹" * len(tokens) if end else tokenizer.decode(tokens, special=True)
        out += text if carries else f"⟦{text}⟧"
    return out
