"""The row index: which pieces of which documents make up each row."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torchxihe.config.options import Config
from torchxihe.data.prepare.packing import AT_ONCE, best_fit, concat
from torchxihe.data.store import SPLITS, Split, index_path
from torchxihe.errors import UserError
from torchxihe.utils.files import read_json, write_json


def read_documents(store: Path, manifest: dict[str, Any], split: Split) -> Iterator[np.ndarray]:
    """Where the documents of `split` lie in its token files laid end to end: (start, length), int64 [n, 2] a shard."""
    base = 0
    for shard in manifest["shards"]:
        path = store / f"{split}-{shard['name']}.idx"
        data = path.read_bytes() if path.is_file() else None
        if data is None or xxhash.xxh3_128_hexdigest(data) != shard["xxh3_128"][path.name]:
            raise UserError(f"{path}: is gone or damaged: delete {store} and run `torchxihe prepare CONFIG` again")
        yield np.frombuffer(data, "<i8").reshape(-1, 2) + np.array([base, 0])
        base += shard.get("file", shard[split])["tokens"]


def write_row_index(store: Path, manifest: dict[str, Any], config: Config) -> None:
    """Write the row index that `config` asks for, unless it is there."""
    folder = index_path(store, config)
    if read_json(folder / "index.json"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    for split in SPLITS:
        documents = read_documents(store, manifest, split)
        rows, pieces, used = 0, 0, 0
        with (folder / f"{split}.rows").open("wb") as row_file, (folder / f"{split}.pieces").open("wb") as piece_file:
            row_file.write(np.array([0], "<i8").tobytes())
            for starts, packed in _pack(documents, config.data.packing, config.data.seq_len + 1):
                row_file.write((starts[1:] + pieces).astype("<i8").tobytes())
                piece_file.write(packed.astype("<i8").tobytes())
                rows, pieces = rows + len(starts) - 1, pieces + len(packed)
                used += int(packed[:, 1].sum())
            for file in (row_file, piece_file):
                file.flush()
                os.fsync(file.fileno())
        padding = rows * (config.data.seq_len + 1) - used
        summary[split] = {"rows": rows, "pieces": pieces, "padding": padding}
    write_json(folder / "index.json", summary)


def _pack(documents: Iterator[np.ndarray], packing: str, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pack documents `AT_ONCE` at a time: (starts, pieces), see packing.py."""
    rest = waiting = np.zeros((0, 2), np.int64)
    last = False
    while not last:
        part = next(documents, None)
        last = part is None
        if part is not None:
            waiting = np.concatenate([waiting, part])
        while len(waiting) >= AT_ONCE or (last and len(waiting) + len(rest)):
            now, waiting = np.concatenate([rest, waiting[:AT_ONCE]]), waiting[AT_ONCE:]
            starts, pieces = (best_fit if packing == "best_fit" else concat)(now, width)
            end = len(pieces)
            if packing == "concat" and not (last and not len(waiting)):
                starts, end = starts[:-1], starts[-2]  # the last window goes on with the documents that follow
            rest = pieces[end:]
            if len(starts) > 1:
                yield starts, pieces[:end]
