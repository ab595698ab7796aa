"""What the benchmarks compute from what they measure."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    """A file of benchmarks/, which are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    clock = load("clock")
    computation = [(0.0, 2.0), (1.0, 3.0), (6.0, 8.0)]
    assert clock.union(computation) == [(0.0, 3.0), (6.0, 8.0)]
    # 3 to 6 is communication alone, 8 to 9 too; the rest is hidden behind computation, or counted once.
    assert clock.exposed([(2.0, 5.0), (4.0, 7.0), (8.0, 9.0)], computation) == 4.0
    assert clock.exposed([], computation) == clock.exposed([(0.5, 1.5)], computation) == 0.0
    assert clock.exposed([(1.0, 2.0)], []) == 1.0


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_stopped_comparison_leaves_no_processes(tmp_path: Path) -> None:
    """torchrun's workers are in sessions of their own. Seen to fail when its process group was killed instead."""
    root = Path(__file__).parents[2]
    flags = ["--gpus=2", "--entries=torchxihe@4", "--steps=1000000", f"--run.dir={tmp_path}"]
    command = [sys.executable, "benchmarks/compare.py", "--config=configs/xihe_debug.toml", *flags]
    comparison = subprocess.Popen(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: len(running(str(tmp_path))) == 4)  # itself, torchrun, and its two workers
        comparison.terminate()
        assert comparison.wait(timeout=60) == 1
        wait_for(lambda: not running(str(tmp_path)), seconds=5)
    finally:
        comparison.kill()
        for process in running(str(tmp_path)):
            os.kill(process, signal.SIGKILL)


def running(argument: str) -> list[int]:
    """The processes with `argument` in one of their arguments."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
