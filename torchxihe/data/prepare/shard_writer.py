"""Writing one shard of a token store."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from torchxihe.data.manifests import SPLITS, Counts, Shard, Split, find_sealed, write_sealed
from torchxihe.utils.files import draft


class ShardWriter:
    """Writes one shard: `<split>-<name>.<kind>` for both splits, then `<name>.json`, which commits it.

    `kinds`: "idx"; "bin", unless the tokens stay in a file of the user's; "msk", if not all of them carry a loss.
    If the `with` block is left by an error, no files remain.
    """

    def __init__(self, store: Path, name: str, dtype: str, kinds: Sequence[str] = ("bin", "idx")) -> None:
        self._store, self._name = store, name
        self._dtype = np.dtype(dtype)
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {f"{split}-{name}.{kind}": xxhash.xxh3_128() for split in SPLITS for kind in kinds}
        self.counts = {split: {"documents": 0, "tokens": 0, "targets": 0, "bytes": 0} for split in SPLITS}

    def __enter__(self) -> "ShardWriter":
        self._store.mkdir(parents=True, exist_ok=True)
        for name in self._hashes:
            self._files[name] = draft(self._store / name).open("wb", buffering=2**20)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk may fail again here; the first error is being raised
                file.close()
        if kind is not None:
            for name in self._hashes:
                draft(self._store / name).unlink(missing_ok=True)

    def add(self, split: Split, parts: Iterable[np.ndarray], size: int, mask: np.ndarray | None = None) -> None:
        """Append a document: its tokens in `parts`, concatenated, and the number of bytes of its text.

        `mask`, where the shard has masks: bool, which of the tokens carry a loss.
        """
        start = self.counts[split]["tokens"]
        length = 0
        for part in parts:
            self._write(f"{split}-{self._name}.bin", part.astype(self._dtype))
            length += len(part)
        self.note(split, start, length, size)
        if mask is not None:
            assert len(mask) == length
            self._write(f"{split}-{self._name}.msk", mask.astype(np.uint8))
            self.counts[split]["targets"] -= length - int(mask.sum())

    def note(self, split: Split, start: int, length: int, size: int) -> None:
        """Enter a document whose tokens are stored already: `length` tokens from `start`, for `size` bytes of text."""
        self._write(f"{split}-{self._name}.idx", np.array([start, length], "<i8"))
        counts = self.counts[split]
        counts["documents"] += 1
        counts["tokens"] += length
        counts["targets"] += length
        counts["bytes"] += size

    def _write(self, name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._files[name].write(data)
        self._hashes[name].update(data)

    def commit(self, report: dict[str, Any]) -> Shard:
        """Sync and rename the shard's files and write its record; `report`: the record's other members."""
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            draft(self._store / name).rename(self._store / name)
        shard = Shard(
            name=self._name,
            dtype=self._dtype.str,  # type: ignore[arg-type]  # pydantic checks it
            train=Counts(**self.counts["train"]),
            valid=Counts(**self.counts["valid"]),
            xxh3_128={name: hash.hexdigest() for name, hash in self._hashes.items()},
            **report,
        )
        write_sealed(self._store / f"{self._name}.json", shard)
        return shard


def committed_shard(store: Path, name: str) -> Shard | None:
    """The record of a shard that exists already and whose files have the right sizes."""
    shard = find_sealed(store / f"{name}.json", Shard)
    if shard is None or shard.name != name:
        return None
    for file, size in shard.sizes().items():
        path = store / file
        if not path.is_file() or path.stat().st_size != size:
            return None
    return shard
