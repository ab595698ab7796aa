"""The row index: which pieces of which documents make up each row."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from torchxihe.config.options import Config
from torchxihe.data.expected import expected_of_index
from torchxihe.data.manifests import (
    SPLITS,
    Manifest,
    RowIndex,
    Split,
    SplitIndex,
    damaged,
    find_sealed,
    missing,
    write_sealed,
)
from torchxihe.data.prepare.packing import AT_ONCE, best_fit, concat
from torchxihe.data.store import index_path
from torchxihe.errors import UserError
from torchxihe.utils.files import draft
from torchxihe.utils.records import DamagedError, open_regular


def read_documents(store: Path, manifest: Manifest, split: Split) -> Iterator[np.ndarray]:
    """Places of the documents of `split` in its token files laid end to end: (start, length), int64 [n, 2] a shard.

    Raises UserError if a file is missing or damaged.
    """
    base = 0
    for shard in manifest.shards:
        path = store / shard.file_name(split, "idx")
        try:
            with open_regular(path) as file:
                data = file.read()
        except FileNotFoundError:
            raise missing(path) from None
        except DamagedError as error:
            raise damaged(path, str(error)) from None
        if xxhash.xxh3_128_hexdigest(data) != shard.xxh3_128[path.name]:
            raise damaged(path, "its content differs from what was written")
        yield np.frombuffer(data, "<i8").reshape(-1, 2) + np.array([base, 0])
        base += shard.split_tokens(split)


def write_row_index(store: Path, manifest: Manifest, config: Config) -> None:
    """Write the row index that `config` asks for, unless it exists with the right sizes."""
    folder = index_path(store, config)
    if _is_complete(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    splits, hashes = {}, {}
    for split in SPLITS:
        splits[split], of_split = _write_split(folder, split, read_documents(store, manifest, split), config)
        hashes |= of_split
    write_sealed(folder / "index.json", RowIndex(**splits, xxh3_128=hashes))


def _is_complete(folder: Path) -> bool:
    summary = find_sealed(folder / "index.json", RowIndex)
    if summary is None:
        return False
    try:
        for file in expected_of_index(folder, summary):
            file.check_size()
    except UserError:
        return False
    return True


def _write_split(
    folder: Path, split: Split, documents: Iterator[np.ndarray], config: Config
) -> tuple[SplitIndex, dict[str, str]]:
    """Pack one split and write its two files; what they hold, and their hashes by name."""
    width = config.data.seq_len + 1
    names = [f"{split}.rows", f"{split}.pieces"]
    hashes = {name: xxhash.xxh3_128() for name in names}
    rows, pieces, used = 0, 0, 0
    drafts = [draft(folder / name) for name in names]
    with drafts[0].open("wb") as row_file, drafts[1].open("wb") as piece_file:
        files = dict(zip(names, (row_file, piece_file), strict=True))

        def write(name: str, values: np.ndarray) -> None:
            data = values.astype("<i8").tobytes()
            files[name].write(data)
            hashes[name].update(data)

        write(names[0], np.array([0]))
        for starts, packed in _pack(documents, config.data.packing, width):
            write(names[0], starts[1:] + pieces)
            write(names[1], packed)
            rows, pieces = rows + len(starts) - 1, pieces + len(packed)
            used += int(packed[:, 1].sum())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for path, name in zip(drafts, names, strict=True):
        path.rename(folder / name)
    summary = SplitIndex(rows=rows, pieces=pieces, padding=rows * width - used)
    return summary, {name: hash.hexdigest() for name, hash in hashes.items()}


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
                starts, end = starts[:-1], starts[-2]  # the last window continues with the next documents
            rest = pieces[end:]
            if len(starts) > 1:
                yield starts, pieces[:end]
