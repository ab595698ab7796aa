"""What the benchmarks compute from what they measure."""

import importlib.util
from pathlib import Path
from types import ModuleType


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
