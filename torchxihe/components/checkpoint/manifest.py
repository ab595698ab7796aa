"""What makes a directory a checkpoint: MANIFEST.json, written last, with the size and hash of every other file.

```
checkpoints/step-00001000.tmp/   being written, never chosen (in an object store there is none: the manifest commits)
checkpoints/step-00001000/       committed, if MANIFEST.json is there and CORRUPT is not
    __0_0.distcp ... .metadata   tensors (DCP)
    train_state.json             everything else
    MANIFEST.json
    CORRUPT                      the reason why this one is passed over; put there by whoever found out
```
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import xxhash

from torchxihe.components.checkpoint.storage import Location, hash_file, with_retries
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError

MANIFEST = "MANIFEST.json"
TRAIN_STATE = "train_state.json"
CORRUPT = "CORRUPT"
FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{8,})")

Files = dict[str, tuple[int, str]]
"""Size in bytes and xxh3_128 by file name."""


class CorruptError(Exception):
    """The content of a checkpoint is not what was written; the message is one line that names the file."""


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step that a directory is named for; -1 if it is not named for one."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def steps_in(directory: Location) -> list[Location]:
    """Step directories of any state but half-written, newest (the highest number) first."""
    return [directory / name for name in sorted(directory.names(), key=step_of, reverse=True) if step_of(name) >= 0]


def is_committed(directory: Location) -> bool:
    """Whether the directory was written to its end and nobody has marked it; says nothing of its files' content."""
    names = directory.names()
    return MANIFEST in names and CORRUPT not in names


def checkpoints_of(config: Config) -> Location:
    """Where a run keeps its checkpoints."""
    elsewhere = config.checkpoint.dir
    return Location(elsewhere) / config.run.name if elsewhere else Location(config.run_dir / "checkpoints")


def homes_of(path: str | PathLike[str]) -> list[Location]:
    """Where steps may lie of what `path` names: in it, or in its checkpoints/, or where the run there keeps them."""
    place = Location(path)
    homes = [place, place / "checkpoints"]
    if place.local and (place / "config.toml").exists():
        with suppress(UserError):  # another version's
            config = load_config(str(place / "config.toml"))
            # Not without `checkpoint.dir`: the run may be a copy, and its name and directory the original's.
            homes[1:1] = [checkpoints_of(config)] if config.checkpoint.dir else []
    return homes


def check_fresh_start(directory: Location, run_dir: Path) -> None:
    """Raise UserError if the run has committed steps elsewhere: they are not to be forgotten for an empty directory."""
    for home in homes_of(run_dir):
        if home != directory and any(is_committed(step) for step in steps_in(home)):
            raise UserError(
                f"checkpoint.dir: there is no checkpoint in {directory}, but there are in {home}; move them, or start "
                f"another run from them with --run.name=NAME --checkpoint.load={run_dir}"
            )


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of."""

    step: int
    files: Files
    """All but MANIFEST.json and CORRUPT."""
    parts: tuple[str, ...]
    """What the names of its tensors begin with: "model", "optim", ...; no "optim": the run cannot go on from it."""
    validation_loss: float | None = None
    """Measured at this very step, if it was."""


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


def read_manifest(directory: Location) -> Manifest:
    """What belongs to a step directory. Raises CorruptError, OSError (unreadable) or UserError (format)."""
    try:
        text = with_retries((directory / MANIFEST).read)
    except FileNotFoundError:
        raise CorruptError(f"{MANIFEST} is missing") from None
    try:
        content = json.loads(text)
        claimed, version = content.pop("xxh3_128"), content["format"]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptError(f"{MANIFEST} is damaged") from None
    if claimed != _digest(content):
        raise CorruptError(f"{MANIFEST} is damaged: its own hash differs")
    if version != FORMAT:
        raise UserError(
            f"{directory}: has checkpoint format {version}, this torchxihe reads {FORMAT}; use another version"
        )
    if content["step"] != step_of(directory.name):
        raise CorruptError(f"{MANIFEST} is of step {content['step']}, but the directory is named {directory.name}")
    files = {name: (entry["size"], entry["xxh3_128"]) for name, entry in content["files"].items()}
    return Manifest(content["step"], files, tuple(content["parts"]), content["validation_loss"])


def step_flaws(
    directory: Location, part: int = 0, parts: int = 1, progress: Callable[[int], object] = lambda size: None
) -> list[str]:
    """What is wrong with the manifest or with every `parts`-th file from the `part`-th on, one line each.

    `progress` is told how many bytes have been read, a few megabytes at a time. Raises OSError for a file that cannot
    be read although it is there: that says nothing of its content.
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
        if actual_size != size:
            found.append(f"{name} has {actual_size:,} bytes instead of {size:,}")
        elif actual_digest != digest:
            found.append(f"{name} has another content than was written (its hash differs)")
    return found


def mark_corrupt(directory: Location, reason: str) -> None:
    """Leave a CORRUPT file with the reason; nothing is moved or deleted."""
    with (directory / CORRUPT).create() as file:
        file.write(f"{reason}\n".encode())


def remove_step(directory: Location) -> None:
    """Delete a step directory, its manifest first: what is left if we die half-way is no checkpoint.

    Of a link that somebody has put there, the link alone: what it leads to is theirs.
    """
    if directory.is_link():
        directory.remove()
        return
    (directory / MANIFEST).remove()
    if directory.local:
        directory.sync()
    directory.remove()


def _digest(content: dict[str, Any]) -> str:
    """xxh3_128 of a JSON value, independent of its formatting."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
