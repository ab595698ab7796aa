"""Where documents come from: which files a source means, how they are cut into shards, and what is read from them.

Files are read here, a piece at a time and with the line at hand, so that a bad row can be named and skipped, one huge
file can be read by every core, and no second copy of a corpus is written. Hub datasets go through `datasets`: what it
has downloaded is read as the Arrow files that it leaves, and what it streams as it comes.
"""

import itertools
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path

from torchxihe.config.options import Documents
from torchxihe.data.prepare.hub import commit_of, load_hub, settle_hub
from torchxihe.data.prepare.readers import COMPRESSED, SUFFIXES, compression_of, count_groups, count_rows, is_json_array
from torchxihe.data.prepare.rows import Piece
from torchxihe.errors import UserError

SMALLEST_SHARD, LARGEST_SHARD = 4 * 2**20, 256 * 2**20
"""Bytes of input per shard: the unit that one core prepares and that is not done twice after a kill."""
SHARDS = 256
"""Shards that a source is cut into if it is neither small nor very large."""

INSTALLED = {"{stdlib}": "stdlib", "{site-packages}": "purelib"}
NOT_INSTALLED = {"test", "tests", "idlelib", "__pycache__", "site-packages"}
"""Folders below these that are not real text, or not the same text on every machine."""


SAVED_DATASET = ("state.json", "dataset_info.json")
"""What `save_to_disk` writes beside the Arrow files."""


def source_name(source: Documents) -> str:
    """Name in logs and metrics."""
    parts = [part for part in source.path.strip("{}").split("/") if part and not set("*?[.") & set(part[:1])]
    stem = parts[-1].split(".")[0] if parts else "data"
    return source.name or "-".join(part for part in (stem, source.subset) if part)


def find_pieces(source: Documents, key: str) -> list[Piece]:
    """Everything that `source` is read from, in a fixed order. `key`: "data.sources.N", for the errors.

    Raises UserError if there is nothing, or if `datasets` cannot give it.
    """
    if is_hub(source):
        return _hub_pieces(source, key)
    root = Path(sysconfig.get_paths()[INSTALLED[source.path]]) if source.path in INSTALLED else Path(source.path)
    if root.is_dir():
        if _format(root, source) == "dataset":
            return [Piece(str(path), "arrow", size=path.stat().st_size) for path in _saved_dataset(root, source, key)]
        if os.path.isabs(source.glob):
            raise UserError(f"{key}.glob: {source.glob}: is looked for in {root}, so it cannot begin with a slash")
        pattern = [part for part in source.glob.split("/") if part not in ("", ".")]
        try:
            files = list(_files_below(root, pattern or ["**"]))
        except OSError as error:
            raise UserError(f"{key}.path: {error.filename}: {error.strerror}") from None
        skip = NOT_INSTALLED if source.path in INSTALLED else {"__pycache__", ".git"}
        files = [path for path in files if not skip.intersection(path.relative_to(root).parts)]
        if not source.glob:
            files = [path for path in files if not any(part[0] == "." for part in path.relative_to(root).parts)]
        files.sort(key=lambda path: path.relative_to(root).parts)
    elif root.is_file():
        if source.format == "dataset":
            raise UserError(f'{key}.path: {root}: a saved dataset is a folder; format = "arrow" reads one file of it')
        files = [root]
    else:
        files = [Path(path) for path in sorted(glob(source.path, recursive=True)) if Path(path).is_file()]
    if source.format == "tokens" and not root.is_file():
        files = [path for path in files if path.suffix != ".idx"]  # Megatron's, beside its .bin
    if not files:
        below = f" that matches {source.glob!r}" if source.glob else ""
        raise UserError(f"{key}.path: {source.path}: no file there{below}")
    once = {path.resolve(): path for path in reversed(files)}
    unique = [path for path in files if once[path.resolve()] is path]
    return [Piece(str(path), _format(path, source), size=path.stat().st_size) for path in unique]


def _files_below(root: Path, pattern: Sequence[str]) -> Iterator[Path]:
    """The files below `root` that fit a glob, given in parts, through links to folders too.

    A folder is entered once, however many links lead to it (they may go in circles), and by its own name if that is
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
                elif entry.is_file() and _matches((*parts, entry.name), pattern):
                    yield Path(entry.path)


def _leads(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether there may be paths below a folder that fit a glob."""
    for part, wanted in zip(folder, pattern, strict=False):
        if wanted == "**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(folder) < len(pattern)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a glob, of which "**" stands for any number of parts."""
    if not pattern or not parts:
        return not parts and all(wanted == "**" for wanted in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def is_hub(source: Documents) -> bool:
    """Whether `datasets` must find the source: it is neither here nor a pattern, or a subset of it is asked for."""
    here = source.path in INSTALLED or Path(source.path).exists()
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path) and Path(source.path).suffix not in SUFFIXES
    return bool(source.subset) or (not here and bool(hub_id))


def cut_shards(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in groups of about equal size, in order; large files are cut, small ones share a shard.

    A function of the inputs' sizes alone: not of the machine, nor of how many machines there are.
    """
    target = min(max(sum(piece.size for piece in pieces) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for whole in pieces:
        for piece in _cut(whole, target):
            if not shards or room < piece.size or piece.format in ("stream", "tokens"):
                shards.append([])
                room = target
            shards[-1].append(piece)
            room -= piece.size
    return shards


def _format(path: Path, source: Documents) -> str:
    """How `path` is read."""
    if source.format != "auto":
        return source.format
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or all((path / name).exists() for name in SAVED_DATASET)
        return "dataset" if saved else "text"
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSED]
    return SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _saved_dataset(root: Path, source: Documents, key: str) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote."""
    folder = root
    try:
        if (root / "dataset_dict.json").exists():
            splits = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
            if source.split not in splits:
                raise UserError(f"{key}.split: {root} has no split {source.split!r}; it has {', '.join(splits)}")
            folder = root / source.split
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}.path: {root}: not a folder that `save_to_disk` wrote ({why})") from None


def _hub_pieces(source: Documents, key: str) -> list[Piece]:
    """The Arrow files that `datasets` leaves of a hub dataset, or the shards of a stream."""
    if not Path(source.path).exists():
        settle_hub()
    import datasets  # slow, and only for hub sources

    try:
        revision = commit_of(source) if source.stream else source.revision
        dataset = load_hub(source, revision)
    except Exception as error:  # it raises all manner of things; what was asked of it is the user's, whatever it is
        why = " ".join(str(error).split())[:300]
        hint = "log in with `hf auth login`" if "gated" in why.lower() else "check path, subset, split and network"
        what = f"{source.path}: not a file here, and `datasets` cannot load it"
        raise UserError(f"{key}.path: {what} ({type(error).__name__}: {why}); {hint}") from None
    if isinstance(dataset, datasets.Dataset):
        pieces = [Piece(str(file["filename"]), "arrow") for file in dataset.cache_files]
        if sum(count_rows(piece.path) for piece in pieces) != len(dataset):
            raise UserError(f"{key}.split: {source.split!r}: only whole splits can be read; max_tokens limits them")
        return [replace(piece, size=os.path.getsize(piece.path)) for piece in pieces]
    return [Piece(source.path, "stream", i, i + 1, revision=revision) for i in range(dataset.num_shards)]


def _cut(piece: Piece, target: int) -> Iterator[Piece]:
    """`piece` in parts of about `target` bytes, where its format allows that."""
    parts = -(-piece.size // target)
    compressed = compression_of(piece.path)
    if parts < 2 or compressed or piece.format not in ("json", "lines", "parquet", "arrow"):
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
        except ValueError:  # pyarrow's ArrowInvalid; reading it says which file and what is wrong
            units = 1
    edges = sorted({units * i // parts for i in range(parts + 1)})
    for start, end in itertools.pairwise(edges):
        yield Piece(piece.path, piece.format, start, end, piece.size * (end - start) // units)
