"""Verify checkpoints, or prepared data, by reading every file."""

import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from torchxihe.components.checkpoint.history import read_train_state
from torchxihe.components.checkpoint.hugging_face import CONFIG
from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    MANIFEST,
    homes_of,
    read_manifest,
    step_flaws,
    step_of,
    steps_in,
)
from torchxihe.components.checkpoint.storage import CorruptError, Location
from torchxihe.components.checkpoint.tensor_files import TensorReader
from torchxihe.config.load import load_config, presets
from torchxihe.data.expected import ExpectedFile
from torchxihe.data.verify import files_of_cache, files_of_config, flaws_in
from torchxihe.errors import UserError, explained
from torchxihe.parsers import parse
from torchxihe.utils.words import counted

CACHE_FOLDERS = ("recipes", "stores", "tokenizers")


def main(args: list[str]) -> None:
    """Print what is valid and what is not. Raises UserError if there is nothing to verify, or if it is damaged."""
    options = parse("verify", args)
    place = Location(options.path)
    if options.path.endswith(".toml") or (options.path in presets() and not place.exists()):
        _verify_data(options.path, files_of_config(load_config(options.path, options.overrides)), [])
    elif options.overrides:
        raise UserError(f"verify: {options.overrides[0]}: overrides belong to a config")
    elif place.local and any((place / name).is_dir() for name in CACHE_FOLDERS):
        _verify_data(options.path, *files_of_cache(Path(place)))
    elif place.local and (place / CONFIG).exists():
        what = "is a Hugging Face folder, such as an export, which has no hashes"
        raise UserError(f"{place}: {what}; verify the checkpoint that it was made of")
    else:
        _verify_steps(place)


def _verify_data(path: str, files: list[ExpectedFile], flaws: Iterable[str]) -> None:
    """Hash prepared files, a line per damaged one."""
    size, found = sum(file.size for file in files), list(flaws)
    with tqdm(total=size, desc=path, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        found += flaws_in(files, bar.update)
    print(
        "\n".join([*found, f"{path}: {counted(len(files), 'data file')}, {size / 2**30:.3f} GiB, {len(found)} damaged"])
    )
    if found:
        raise UserError(
            f"{path}: {counted(len(found), 'damaged file')} among the prepared data; see above for the remedy"
        )


def _verify_steps(place: Location) -> None:
    """Print the table of checkpoints."""
    try:
        steps = _steps_at(place)
        if not steps:
            what = "holds no checkpoint" if place.is_dir() else "no such directory"
            known = "a run, of its checkpoints, of one step or of prepared data"
            raise UserError(f"{place}: {what}; give the directory of {known}, or a config")
        print(f"{'step':>10}  {'state':10}  {'GiB':>7}  {'val. loss':>9}  {'s':>5}  what")
        states = [_print_line(step) for step in steps]
    except OSError as error:
        raise explained(error) from None
    newest = next((state for state in states if state != "unfinished"), "unfinished")
    if newest != "valid":
        raise UserError(f"{place}: the newest checkpoint is {newest}; the run resumes from the next valid one")


def _steps_at(place: Location) -> list[Location]:
    """Step directories, drafts included, newest first."""
    if step_of(place.name) >= 0:
        return [place] if place.is_dir() else []
    for home in homes_of(place):
        drafts = [home / n for n in home.names() if n.endswith(".tmp") and step_of(n.removesuffix(".tmp")) >= 0]
        if steps := steps_in(home) + drafts:
            return sorted(steps, key=lambda step: step_of(step.name.removesuffix(".tmp")), reverse=True)
    return []


def _flaws(directory: Location) -> list[str]:
    """What is wrong with a step, with a progress bar."""
    try:
        size = sum(size for size, _ in read_manifest(directory).files.values())
        with tqdm(total=size, desc=directory.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            flaws = step_flaws(directory, progress=bar.update)
        if not flaws:  # of a right hash, too, the content may be what no run has written
            TensorReader(directory)
            read_train_state(directory)
        return flaws
    except CorruptError as error:
        return [str(error)]


def _reason(directory: Location) -> str:
    """The first line of a step's CORRUPT file."""
    try:
        text = (directory / CORRUPT).read(limit=10_000).decode(errors="replace")
    except (CorruptError, OSError):
        return ""
    return next(iter(text.splitlines()), "")


def _print_line(directory: Location) -> str:
    """One line of the table; the checkpoint's state."""
    start, names = time.perf_counter(), directory.names()
    size, loss = 0, ""
    if directory.name.endswith(".tmp"):
        state, what = "unfinished", ""
    elif CORRUPT in names:
        state, what = "CORRUPT", f"marked: {_reason(directory)}"
    elif flaws := _flaws(directory):
        half = MANIFEST not in names
        state, what = ("unfinished" if half and not directory.local else "CORRUPT"), "; ".join(flaws)
    else:
        manifest = read_manifest(directory)
        state, what = "valid", f"{len(manifest.files)} files: {', '.join(manifest.parts)}"
        size = sum(size for size, _ in manifest.files.values())
        loss = "" if manifest.validation_loss is None else f"{manifest.validation_loss:.4f}"
    step, seconds = step_of(directory.name.removesuffix(".tmp")), time.perf_counter() - start
    print(f"{step:>10}  {state:10}  {size / 2**30:7.3f}  {loss:>9}  {seconds:5.1f}  {what}", flush=True)
    return state
