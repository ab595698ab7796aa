"""Read every file of a run's checkpoints and print which of them are valid."""

import time

from tqdm import tqdm

from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    MANIFEST,
    CorruptError,
    homes_of,
    read_manifest,
    step_flaws,
    step_of,
    steps_in,
)
from torchxihe.components.checkpoint.storage import Location
from torchxihe.errors import UserError, explained
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Print the table. Raises UserError if there is nothing to verify, or if the newest checkpoint is not valid."""
    place = Location(parse("verify", args).path)
    try:
        steps = _steps_at(place)
        if not steps:
            what = "holds no checkpoint" if place.is_dir() else "no such directory"
            raise UserError(f"{place}: {what}; give the directory of a run, of its checkpoints, or of one step")
        print(f"{'step':>10}  {'state':10}  {'GiB':>7}  {'val. loss':>9}  {'s':>5}  what")
        states = [_print_line(step) for step in steps]
    except OSError as error:
        raise explained(error) from None
    newest = next((state for state in states if state != "unfinished"), "unfinished")
    if newest != "valid":
        raise UserError(f"{place}: the newest checkpoint is {newest}; the run goes on from the next one that is valid")


def _steps_at(place: Location) -> list[Location]:
    """Step directories, half-written ones too, newest first."""
    if step_of(place.name) >= 0:
        return [place] if place.is_dir() else []
    for home in homes_of(place):
        drafts = [home / n for n in home.names() if n.endswith(".tmp") and step_of(n.removesuffix(".tmp")) >= 0]
        if steps := steps_in(home) + drafts:
            return sorted(steps, key=lambda step: step_of(step.name.removesuffix(".tmp")), reverse=True)
    return []


def _flaws(directory: Location) -> list[str]:
    """What is wrong with a step, with a bar while it is read."""
    try:
        size = sum(size for size, _ in read_manifest(directory).files.values())
    except CorruptError as error:
        return [str(error)]
    with tqdm(total=size, desc=directory.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return step_flaws(directory, progress=bar.update)


def _print_line(directory: Location) -> str:
    """One line of the table; the checkpoint's state."""
    start, names = time.perf_counter(), directory.names()
    size, loss = 0, ""
    if directory.name.endswith(".tmp"):
        state, what = "unfinished", ""
    elif CORRUPT in names:
        state, what = "CORRUPT", "marked: " + (directory / CORRUPT).read().decode().strip()
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
