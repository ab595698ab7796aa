"""MANIFEST.json, written last, with the size and hash of every other file, makes a directory a checkpoint.

```
checkpoints/step-00001000.tmp/   being written, never loaded (object stores have no draft: the manifest commits)
checkpoints/step-00001000/       committed, if MANIFEST.json exists and CORRUPT does not
    __0_0.distcp ... .metadata   tensors (DCP)
    train_state.json             everything else
    MANIFEST.json
    CORRUPT                      why it is never loaded; written by the start that found the damage
```
"""

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated

import xxhash
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt

from torchxihe.components.checkpoint.storage import CorruptError, Location, hash_file
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.utils.files import with_retries
from torchxihe.utils.records import LIMIT, DamagedError, Record, parse_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MANIFEST = "MANIFEST.json"
TRAIN_STATE = "train_state.json"
CORRUPT = "CORRUPT"
FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{8,18})")

Files = dict[str, tuple[int, str]]
"""Size in bytes and xxh3_128 by file name."""


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in a directory's name; -1 if the name is not that of a step."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def steps_in(directory: Location) -> list[Location]:
    """Step directories in any state, drafts excepted, newest (the highest number) first."""
    steps = [directory / name for name in sorted(directory.names(), key=step_of, reverse=True) if step_of(name) >= 0]
    return [step for step in steps if not step.local or step.is_dir()]


def is_committed(directory: Location) -> bool:
    """Whether there is a manifest and no CORRUPT file; the files' content is not checked."""
    names = directory.names()
    return MANIFEST in names and CORRUPT not in names


def checkpoints_of(config: Config) -> Location:
    """Where a run keeps its checkpoints."""
    elsewhere = config.checkpoint.dir
    return Location(elsewhere) / config.run.name if elsewhere else Location(config.run_dir / "checkpoints")


def homes_of(path: str | PathLike[str]) -> list[Location]:
    """Directories that may hold the steps of what `path` names: itself, its checkpoints/, its run's checkpoint.dir.

    Raises UserError if the config.toml of a run directory is damaged.
    """
    place = Location(path)
    homes = [place, place / "checkpoints"]
    if place.local and (place / "config.toml").exists():
        try:
            # Only these two options: the file may be another version's.
            values = tomllib.loads((place / "config.toml").read().decode())
            saved = _SavedPlace.model_validate(values)
        except (CorruptError, OSError, ValueError, RecursionError) as error:
            remedy = "restore it, or delete it if checkpoint.dir was not set"
            raise UserError(f"{place}/config.toml: cannot be read ({_one_line(error)}); {remedy}") from None
        # Not without `checkpoint.dir`: the run may be a copy, and its name and directory the original's.
        if saved.checkpoint.dir:
            homes.insert(1, Location(saved.checkpoint.dir) / saved.run.name)
    return homes


class _SavedPlace(BaseModel):
    """The part of a run's config.toml that says where its checkpoints are."""

    class RunName(BaseModel):
        """[run]"""

        name: str

    class CheckpointDir(BaseModel):
        """[checkpoint]"""

        dir: str = ""

    run: RunName
    checkpoint: CheckpointDir = CheckpointDir()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_fresh_start(directory: Location, run_dir: Path) -> None:
    """Raise UserError if the run has committed steps elsewhere: it must not start from step 0 without them."""
    for home in homes_of(run_dir):
        if home != directory and any(is_committed(step) for step in steps_in(home)):
            raise UserError(
                f"checkpoint.dir: there is no checkpoint in {directory}, but there are in {home}; move them, or start "
                f"another run from them with --run.name=NAME {shlex.quote(f'--checkpoint.load={run_dir}')}"
            )


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of."""

    step: int
    files: Files
    """All but MANIFEST.json and CORRUPT."""
    parts: tuple[str, ...]
    """First components of the tensors' names: "model", "optim", ...; without "optim" no run resumes from it."""
    validation_loss: float | None = None
    """Nats/token of what `checkpoint.best_by` names; None: not measured at this step, or not finite."""


def write_manifest(directory: Location, manifest: Manifest) -> None:
    """Write MANIFEST.json, after all other files."""
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "parts": list(manifest.parts),
        "validation_loss": manifest.validation_loss,
        "files": {name: {"size": size, "xxh3_128": digest} for name, (size, digest) in sorted(manifest.files.items())},
    }
    with (directory / MANIFEST).create() as file:
        file.write(json.dumps(content | {"xxh3_128": _digest(content)}, indent=1).encode())


class _FileEntry(Record):
    size: NonNegativeInt
    xxh3_128: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class _ManifestRecord(Record):
    """Exactly what `write_manifest` writes."""

    format: int
    step: NonNegativeInt
    parts: tuple[str, ...]
    validation_loss: FiniteFloat | None
    files: dict[Annotated[str, Field(pattern=r"^\.?[\w-][\w.-]*$", max_length=255)], _FileEntry]
    """By plain file name: nothing that leads out of the directory."""
    xxh3_128: str


class _Version(BaseModel):
    """Of a manifest that may be of another format."""

    model_config = ConfigDict(strict=True)

    format: int


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a step directory. Raises CorruptError, OSError (unreadable) or UserError (format)."""
    try:
        text = with_retries((directory / MANIFEST).read)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CorruptError(f"{MANIFEST} is missing") from None
    try:
        version = parse_record(text, _Version).format
        if version != FORMAT:
            remedy = f"this torchxihe reads {FORMAT}; use another version"
            raise UserError(f"{directory}: has checkpoint format {version}, {remedy}")
        record = parse_record(text, _ManifestRecord)
    except DamagedError as error:
        raise CorruptError(f"{MANIFEST} is damaged: {error}") from None
    if record.xxh3_128 != _digest(record.model_dump(mode="json", exclude={"xxh3_128"})):
        raise CorruptError(f"{MANIFEST} is damaged: its own hash differs")
    if record.step != step_of(directory.name):
        raise CorruptError(f"{MANIFEST} is of step {record.step}, but the directory is named {directory.name}")
    files = {name: (entry.size, entry.xxh3_128) for name, entry in record.files.items()}
    return Manifest(record.step, files, record.parts, record.validation_loss)


def read_file(directory: Location, name: str, limit: int = LIMIT) -> bytes:
    """The content of a file of a committed step, which is what the manifest lists; at most `limit` bytes.

    Raises CorruptError, OSError or UserError (format).
    """
    entry = read_manifest(directory).files.get(name)
    if entry is None:
        raise CorruptError(f"{MANIFEST} does not list {name}")
    try:
        content = with_retries(lambda: (directory / name).read(limit))
    except (FileNotFoundError, IsADirectoryError):
        raise CorruptError(f"{name} is missing") from None
    if (len(content), xxhash.xxh3_128_hexdigest(content)) != entry:
        raise CorruptError(f"{name} differs from what was written (hash mismatch)")
    return content


def step_flaws(
    directory: Location, part: int = 0, parts: int = 1, progress: Callable[[int], object] = lambda size: None
) -> list[str]:
    """What is wrong with the manifest or with every `parts`-th file from the `part`-th on, one line each.

    `progress` gets the number of bytes read, a few megabytes at a time. Raises OSError for a file that exists and
    cannot be read: its content may be right.
    """
    try:
        files = read_manifest(directory).files
    except CorruptError as error:
        return [str(error)]
    found = []
    for name in sorted(files, key=lambda name: (-files[name][0], name))[part::parts]:  # large ones spread evenly
        size, digest = files[name]
        try:
            actual_size, actual_digest = with_retries(lambda name=name: hash_file(directory / name, progress))
        except (FileNotFoundError, IsADirectoryError):
            found.append(f"{name} is missing")
            continue
        except CorruptError as error:
            found.append(str(error))
            continue
        if actual_size != size:
            found.append(f"{name} has {actual_size:,} bytes instead of {size:,}")
        elif actual_digest != digest:
            found.append(f"{name} differs from what was written (hash mismatch)")
    return found


def mark_corrupt(directory: Location, reason: str) -> None:
    """Write a CORRUPT file with the reason; nothing is moved or deleted."""
    with (directory / CORRUPT).create() as file:
        file.write(f"{reason}\n".encode())


def remove_step(directory: Location) -> None:
    """Delete a step directory, its manifest first: an interrupted deletion leaves no checkpoint behind.

    Of a symbolic link only the link is deleted, not its target.
    """
    if directory.is_link():
        directory.remove()
        return
    (directory / MANIFEST).remove()
    if directory.local:
        directory.sync()
    directory.remove()


def _digest(content: dict[str, object]) -> str:
    """xxh3_128 of a JSON value, independent of its formatting."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
