"""The files of a source, and how they are cut into shards.

Files are read by readers.py rather than by `datasets`, so that a bad row can be skipped and its line named, one large
file can be read by all cores, and no second copy of a corpus is written. Hub datasets go through `datasets`: a
downloaded one is read from the Arrow files in its cache, a streamed one row by row.
"""

import itertools
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path
from typing import Any

from torchxihe.config.options import Documents
from torchxihe.data.prepare.hub import commit_of, load_hub, settle_hub
from torchxihe.data.prepare.readers import COMPRESSED, SUFFIXES, count_groups, count_rows, is_compressed, is_json_array
from torchxihe.data.prepare.rows import Piece
from torchxihe.errors import UserError, explained
from torchxihe.utils.records import DamagedError, read_record

SMALLEST_SHARD, LARGEST_SHARD = 4 * 2**20, 256 * 2**20
"""Bytes of input per shard, the unit that one process prepares and commits."""
SHARDS = 256
"""Shards of a source if it is neither small nor very large."""

INSTALLED = {"{stdlib}": "stdlib", "{site-packages}": "purelib"}
NOT_INSTALLED = {"test", "tests", "idlelib", "__pycache__", "site-packages"}
"""Folders below these that hold no documentation or code worth learning, or differ between machines."""
SAVED_DATASET = ("state.json", "dataset_info.json")
"""Files that `save_to_disk` writes beside the Arrow files."""


def source_name(source: Documents) -> str:
    """Name in logs and metrics."""
    parts = [part for part in source.path.strip("{}").split("/") if part and not set("*?[.") & set(part[:1])]
    stem = parts[-1].split(".")[0] if parts else "data"
    return source.name or "-".join(part for part in (stem, source.subset) if part)


def find_pieces(source: Documents, key: str) -> list[Piece]:
    """All pieces of `source`, in a fixed order. `key`: "data.sources.N", for error messages.

    Raises UserError if there are none, if one is not a regular file, or if `datasets` cannot load the source.
    """
    if "\0" in source.path + source.glob:
        raise UserError(f"{key}.path: {source.path!r}: no file there; a path cannot contain a NUL character")
    if is_hub(source):
        return _hub_pieces(source, key)
    root = Path(sysconfig.get_paths()[INSTALLED[source.path]]) if source.path in INSTALLED else Path(source.path)
    if root.is_dir():
        if _format(root, source) == "dataset":
            return [_piece(path, "arrow", key) for path in _saved_dataset(root, source, key)]
        if os.path.isabs(source.glob):
            raise UserError(f"{key}.glob: {source.glob}: is relative to {root}, so it cannot begin with a slash")
        pattern = [part for part in source.glob.split("/") if part not in ("", ".")]
        try:
            files = list(_files_below(root, pattern or ["**"]))
        except OSError as error:
            raise UserError(f"{key}.path: {explained(error, root)}") from None
        skip = NOT_INSTALLED if source.path in INSTALLED else {"__pycache__", ".git"}
        files = [path for path in files if not skip.intersection(path.relative_to(root).parts)]
        if not source.glob:
            files = [path for path in files if not any(part[0] == "." for part in path.relative_to(root).parts)]
        files.sort(key=lambda path: path.relative_to(root).parts)
    elif root.exists():
        if source.format == "dataset":
            raise UserError(
                f'{key}.path: {root}: a saved dataset is a folder; for one of its files set format = "arrow"'
            )
        files = [root]
    else:
        files = [Path(path) for path in sorted(glob(source.path, recursive=True)) if not os.path.isdir(path)]
    if source.format == "tokens" and files != [root]:
        files = [path for path in files if path.suffix != ".idx"]  # the index of a Megatron .bin
    if not files:
        below = f" that matches {source.glob!r}" if source.glob else ""
        raise UserError(f"{key}.path: {source.path}: no file there{below}")
    once = {os.path.realpath(path): path for path in reversed(files)}
    unique = [path for path in files if once[os.path.realpath(path)] is path]
    return [_piece(path, _format(path, source), key) for path in unique]


def _piece(path: Path, form: str, key: str) -> Piece:
    """A file as one piece. Raises UserError if it is not a regular file, which may be endless or smaller than read."""
    try:
        info = path.stat()
    except FileNotFoundError:
        why = "a link to a file that is not there; restore the file or remove the link"
        raise UserError(f"{key}.path: {path}: {why if path.is_symlink() else 'no file there'}") from None
    except OSError as error:
        raise UserError(f"{key}.path: {explained(error, path)}") from None
    if not stat.S_ISREG(info.st_mode):
        why = "not a regular file (a FIFO, socket or device); copy its content to a file"
        raise UserError(f"{key}.path: {path}: {why}")
    if form == "tokens" and path.with_suffix(".idx").exists():
        _piece(path.with_suffix(".idx"), "index", key)
    return Piece(str(path), form, size=info.st_size)


def _files_below(root: Path, pattern: Sequence[str]) -> Iterator[Path]:
    """The files below `root` that match a glob, given in parts. Links to folders are followed.

    A folder is read once, even if several links lead to it or links form a cycle, and under its own name if that is
    below `root`.
    """
    folders, links, seen = [str(root)], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        parts = Path(folder).relative_to(root).parts
        if not _leads(parts, pattern) or (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif _matches((*parts, entry.name), pattern):
                    yield Path(entry.path)


def _leads(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether paths below a folder can match a glob."""
    for part, wanted in zip(folder, pattern, strict=False):
        if wanted == "**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(folder) < len(pattern)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob, in which "**" matches any number of parts."""
    if not pattern or not parts:
        return not parts and all(wanted == "**" for wanted in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def is_hub(source: Documents) -> bool:
    """Whether `datasets` loads the source: it has a `subset`, or its path looks like a hub id and is no local path."""
    here = source.path in INSTALLED or Path(source.path).exists()
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path) and Path(source.path).suffix not in SUFFIXES
    return bool(source.subset) or (not here and bool(hub_id))


def cut_shards(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in groups of about equal size, in order; large files are cut, small ones share a shard.

    It depends only on the sizes of the inputs, not on the machine or the number of machines.
    """
    target = min(max(sum(piece.size for piece in pieces) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for file in pieces:
        for piece in _cut(file, target):
            if not shards or room < piece.size or piece.format in ("stream", "tokens"):
                shards.append([])
                room = target
            shards[-1].append(piece)
            room -= piece.size
    return shards


def _format(path: Path, source: Documents) -> str:
    """The format of `path`, from the option or its suffixes."""
    if source.format != "auto":
        return source.format
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or all((path / name).exists() for name in SAVED_DATASET)
        return "dataset" if saved else "text"
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSED]
    return SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _saved_dataset(root: Path, source: Documents, key: str) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote."""
    folder, file = root, root / "dataset_dict.json"
    try:
        if file.exists():
            splits = read_record(file, dict[str, Any])["splits"]
            if source.split not in splits:
                raise UserError(f"{key}.split: {root} has no split {source.split!r}; it has {', '.join(splits)}")
            folder = root / source.split
        file = folder / "state.json"
        state = read_record(file, dict[str, Any])
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except DamagedError as error:
        why = f"{file.name} {error}"
    except (OSError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(f"{key}.path: {root}: not a folder that `save_to_disk` wrote ({why})")


def _hub_pieces(source: Documents, key: str) -> list[Piece]:
    """The Arrow files of a hub dataset in the cache of `datasets`, or the shards of a stream."""
    if not Path(source.path).exists():
        settle_hub()
    import datasets  # slow, and only for hub sources

    try:
        revision = commit_of(source) if source.stream else source.revision
        dataset = load_hub(source, revision)
    except Exception as error:  # it raises many types, and all of them concern what the user asked for
        why = " ".join(str(error).split())[:300]
        hint = "log in with `hf auth login`" if "gated" in why.lower() else "check path, subset, split and network"
        what = f"{source.path}: not a file here, and `datasets` cannot load it"
        raise UserError(f"{key}.path: {what} ({type(error).__name__}: {why}); {hint}") from None
    if isinstance(dataset, datasets.Dataset):
        pieces = [Piece(str(file["filename"]), "arrow") for file in dataset.cache_files]
        if sum(count_rows(piece.path) for piece in pieces) != len(dataset):
            raise UserError(
                f"{key}.split: {source.split!r}: a part of a split cannot be read; name the split and set max_tokens"
            )
        return [replace(piece, size=os.path.getsize(piece.path)) for piece in pieces]
    return [Piece(source.path, "stream", i, i + 1, revision=revision) for i in range(dataset.num_shards)]


def _cut(piece: Piece, target: int) -> Iterator[Piece]:
    """`piece` in parts of about `target` bytes, if its format allows that."""
    parts = -(-piece.size // target)
    if parts < 2 or is_compressed(piece.path) or piece.format not in ("json", "lines", "parquet", "arrow"):
        yield piece
        return
    if piece.format in ("json", "lines"):
        units = piece.size
        if piece.format == "json" and is_json_array(piece.path):
            yield piece
            return
    else:
        try:
            units = count_groups(piece)
        except ValueError:  # damaged; reading it raises the error that names the file
            units = 1
    edges = sorted({units * i // parts for i in range(parts + 1)})
    for start, end in itertools.pairwise(edges):
        yield Piece(piece.path, piece.format, start, end, piece.size * (end - start) // units)
