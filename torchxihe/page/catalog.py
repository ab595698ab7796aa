"""The runs and models below the directories that a server was given; nothing else has a name that a request can use.

A request names a run or a model as the catalog lists it. Names are looked up, never joined to paths.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchxihe.components.checkpoint.hugging_face import CONFIG
from torchxihe.components.checkpoint.manifest import is_committed, step_of
from torchxihe.components.checkpoint.storage import Location
from torchxihe.components.observe.metrics import METRICS
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE, encodable
from torchxihe.errors import UserError

DEPTH = 4
"""Directories below a given one that are searched: runs/<name>/checkpoints/step-... and some more."""
MOST_ENTRIES = 100_000
"""Directory entries that one search reads."""


@dataclass(frozen=True)
class Model:
    """A checkpoint or an export."""

    name: str
    path: Path
    home: str
    """Name of the run or folder that it is of."""
    step: int
    """-1: an export."""
    chat: bool
    """Whether it has a chat template."""

    @property
    def version(self) -> str:
        """Differs if another model is at this path later. Raises OSError if none is."""
        return f"{self.name} {self.path.stat().st_mtime_ns}"


class Catalog:
    """Searches the given directories."""

    def __init__(self, directories: list[Path]) -> None:
        """Raises UserError for one that does not exist."""
        for directory in directories:
            if not directory.is_dir():
                raise UserError(f"{directory}: no such directory; give directories with runs or exports")
        self.directories = directories
        self._real = [Path(os.path.realpath(directory)) for directory in directories]

    def inside(self, path: Path) -> bool:
        """Whether a path without symbolic links is below a given directory, or is one."""
        return any(path.is_relative_to(real) for real in self._real)

    def find(self) -> tuple[dict[str, Path], dict[str, Model]]:
        """The runs and the models, by name. Symbolic links to directories are not followed."""
        runs: dict[str, Path] = {}
        models: dict[str, Model] = {}
        for name, path, names in self._walk():
            if METRICS in names or {"config.toml", "logs"} <= names:
                runs[name] = path
            if step_of(path.name) >= 0 and is_committed(Location(path)):
                folders = [path, path.parent.parent]  # where `open_saved` looks first
                tokenizer = next(
                    (f / "tokenizer" for f in folders if (f / "tokenizer" / "torchxihe.json").exists()), None
                )
                if tokenizer and self._only_inside(path) and self._only_inside(tokenizer):
                    chat = (tokenizer / CHAT_TEMPLATE_FILE).exists()
                    home = os.path.dirname(os.path.dirname(name)) if path.parent.name == "checkpoints" else name
                    models[name] = Model(name, path, home or name, step_of(path.name), chat)
            elif CONFIG in names and any(file.endswith(".safetensors") for file in names) and self._only_inside(path):
                home = os.path.dirname(os.path.dirname(name)) if path.parent.name == "exports" else name
                models[name] = Model(name, path, home or name, -1, CHAT_TEMPLATE_FILE in names)
        return dict(sorted(runs.items())), dict(sorted(models.items(), key=lambda item: (item[1].home, -item[1].step)))

    def _walk(self) -> Iterator[tuple[str, Path, set[str]]]:
        """Every directory: its name (as the directory was given, and below), its absolute path, and the names in it."""
        left = MOST_ENTRIES
        # Absolute: a relative "~x" would be taken for a home directory.
        waiting = [(str(directory), directory.absolute(), 0) for directory in reversed(self.directories)]
        while waiting and left > 0:
            shown, path, depth = waiting.pop()
            try:
                with os.scandir(path) as entries:
                    found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            except OSError:  # deleted since, or not readable
                continue
            left -= len(found)
            yield shown, path, {name for name, _ in found}
            folders = [name for name, is_folder in found if is_folder and name[0] != "." and encodable(name) == name]
            below = [(os.path.join(shown, name), path / name, depth + 1) for name in sorted(folders, reverse=True)]
            waiting += below if depth < DEPTH else []

    def _only_inside(self, folder: Path) -> bool:
        """Whether all files in a directory are, symbolic links resolved, below the given directories."""
        try:
            files = [os.path.realpath(entry.path) for entry in os.scandir(folder)]
        except OSError:
            return False
        return all(self.inside(Path(file)) for file in [os.path.realpath(folder), *files])
