"""Random damage to any file of a run directory or of the data cache: the unbroken run's result, or one line.

Each mutation has a number, which seeds it: `pytest --long` makes 1,000 of them, without it the first 60.
"""

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.faults import Fault
from tests.faults.harness import Job, Ledger, Workspace, ledger

FLAGS = (
    "--validation.fraction=0.1",
    "--validation.every=4",
    "--training.steps=8",
    "--checkpoint.every=2",
    "--checkpoint.keep_last=0",
)
STOPPED, STEPS = 5, 8
BLOCK = 10
"""Mutations of a test."""

Mutation = Callable[[bytes, random.Random], bytes]


def flip_bit(content: bytes, chooser: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[chooser.randrange(len(changed))] ^= 1 << chooser.randrange(8)
    return bytes(changed)


def change_bytes(content: bytes, chooser: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chooser.randint(1, 16) if changed else 0):
        changed[chooser.randrange(len(changed))] = chooser.randrange(256)
    return bytes(changed)


def insert_bytes(content: bytes, chooser: random.Random) -> bytes:
    at = chooser.randint(0, len(content))
    return content[:at] + chooser.randbytes(chooser.randint(1, 64)) + content[at:]


def delete_bytes(content: bytes, chooser: random.Random) -> bytes:
    at = chooser.randint(0, len(content))
    return content[:at] + content[at + chooser.randint(1, 64) :]


def truncate(content: bytes, chooser: random.Random) -> bytes:
    return content[: chooser.randint(0, len(content))]


def zero_block(content: bytes, chooser: random.Random) -> bytes:
    at, size = chooser.randint(0, len(content)), chooser.randint(1, 4096)
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def duplicate_block(content: bytes, chooser: random.Random) -> bytes:
    at, size = chooser.randint(0, len(content)), chooser.randint(1, 4096)
    return content[: at + size] + content[at:]


def change_digit(content: bytes, chooser: random.Random) -> bytes:
    """Of a JSON or TOML file: it stays well-formed."""
    digits = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
    changed = bytearray(content)
    if digits:
        changed[chooser.choice(digits)] = ord(chooser.choice("0123456789"))
    return bytes(changed)


def empty(content: bytes, chooser: random.Random) -> bytes:
    return b""


CONTENT: list[Mutation] = [
    flip_bit,
    change_bytes,
    insert_bytes,
    delete_bytes,
    truncate,
    zero_block,
    duplicate_block,
    change_digit,
    empty,
]
KINDS = [*(mutation.__name__ for mutation in CONTENT), "directory", "fifo", "remove"]


def mutate(path: Path, kind: str, chooser: random.Random) -> None:
    """Damage a file; its modification time stays, as it does when a disk corrupts it."""
    info = path.stat()
    content = path.read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "remove":
        path.write_bytes(next(m for m in CONTENT if m.__name__ == kind)(content, chooser))
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


class Stopped:
    """A run that was stopped after step 5 of 8, and what it does when it is not damaged."""

    def __init__(self, prepared: Path, root: Path) -> None:
        self.root = root / "stopped"
        self.root.mkdir()
        for name in ("text", "more", "tokenizer"):
            shutil.copytree(prepared / name, self.root / name)
        workspace = Workspace(self.root)
        outcome = restart(workspace, prepare=True, fault=Fault("step", STOPPED, "SIGTERM"))
        assert outcome == "", outcome
        files = [path for folder in ("cache", "work/runs") for path in (self.root / folder).rglob("*")]
        self.files = sorted(str(path.relative_to(self.root)) for path in files if path.is_file())
        shutil.copytree(self.root, root / "unbroken")
        self.unbroken = Workspace(root / "unbroken")
        outcome = restart(self.unbroken, prepare=False)
        assert outcome == "", outcome

    def copy(self, root: Path) -> Workspace:
        """The stopped run, to be damaged."""
        shutil.copytree(self.root, root)
        return Workspace(root)


def restart(workspace: Workspace, prepare: bool, fault: Fault | None = None) -> str:
    """What is wrong with how the commands end, "" if nothing is; "refused: LINE" if one ends as for a mistake."""
    for command in ("prepare", "train") if prepare else ("train",):
        job = Job(workspace.root, 1, [command, "config.toml", *FLAGS], fault if command == "train" else None, {})
        try:
            outcome = job.wait(timeout=60)
        except AssertionError as error:
            return f"{command} hangs: {error}"
        if outcome.succeeded:
            continue
        if outcome.codes != [1] or "Traceback" in outcome.log or "Error" in outcome.log.split(":")[0]:
            return f"{command} ends with {outcome.codes}:\n{outcome.log}"
        return f"refused: {outcome.log.strip().splitlines()[-1] if outcome.log.strip() else ''}"
    return ""


def results(workspace: Workspace) -> tuple[Ledger, dict[str, object]]:
    """The ledger of the steps that are left, and what the last checkpoint holds."""
    last = workspace.checkpoints / f"step-{STEPS:08d}"
    manifest = json.loads((last / "MANIFEST.json").read_text())
    state = json.loads((last / "train_state.json").read_text())
    del state["config"]
    found = {"files": workspace.files(STEPS), "loss": manifest["validation_loss"], "state": state}
    return {step: entry for step, entry in ledger(workspace.root).items() if step > STOPPED}, found


def describe(number: int, stopped: Stopped) -> tuple[str, str, bool, random.Random]:
    """File, kind, and whether `prepare` runs before training."""
    chooser = random.Random(number)
    return chooser.choice(stopped.files), chooser.choice(KINDS), chooser.random() < 0.5, chooser


def check(number: int, stopped: Stopped, root: Path) -> str:
    """Make one mutation and start the run again; how it ended. Raises AssertionError for what must not be."""
    name, kind, prepare, chooser = describe(number, stopped)
    workspace = stopped.copy(root)
    try:
        mutate(root / name, kind, chooser)
        outcome = restart(workspace, prepare)
        what = f"mutation {number}: {kind} of {name}{' before prepare' if prepare else ''}"
        assert outcome == "" or outcome.startswith("refused: "), f"{what}: {outcome}"
        if outcome:
            assert len(outcome) > 20, f"{what}: no word of what is wrong"
            return f"{what}: {outcome}"
        assert results(workspace) == results(stopped.unbroken), f"{what}: another result, silently"
        return f"{what}: no effect"
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def stopped(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(prepared, tmp_path_factory.mktemp("mutations"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count = 1000 if metafunc.config.getoption("--long") else 60
        metafunc.parametrize("first", range(0, count, BLOCK))


@pytest.mark.timeout(1800)
def test_damaged_files_end_in_the_same_result_or_in_one_line(first: int, stopped: Stopped, tmp_path: Path) -> None:
    """Seen to fail without the comparison of a checkpoint's hashes (another result, silently), and where a FIFO in
    place of a rank's log was waited for (mutation 118)."""
    failed = []
    for number in range(first, first + BLOCK):
        try:
            print(check(number, stopped, tmp_path / str(number)))
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, "\n\n".join(failed)


def test_every_file_and_every_kind_is_among_them(stopped: Stopped) -> None:
    """Of the 1,000: otherwise they would say little."""
    chosen = [describe(number, stopped)[:2] for number in range(1000)]
    assert {name for name, _ in chosen} == set(stopped.files)
    assert {kind for _, kind in chosen} == set(KINDS)
    assert all(stat.S_ISREG((stopped.root / name).stat().st_mode) for name in stopped.files)
