"""Validation sets on several processes: each document once, whoever measures it."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_distributed
from tests.unit.test_validation_sets import last_validation, write
from torchxihe.__main__ import run


def _train(path: str) -> None:
    run(["train", path, "--run.name=three"])


@pytest.mark.timeout(180)
def test_three_processes_measure_what_one_does(tmp_path: Path) -> None:
    path = write(tmp_path)
    run(["prepare", str(path)])
    run(["train", str(path)])
    run_distributed(_train, 3, str(path), init=False, timeout=120)
    alone, together = last_validation(tmp_path / "train"), last_validation(tmp_path / "three")
    assert "validation/notes/bpb" in alone
    assert together == pytest.approx(alone, rel=1e-5)
