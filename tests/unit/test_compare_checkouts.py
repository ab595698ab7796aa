"""The comparison of two checkouts sees what differs, down to the last bit of a logged number."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "compare_checkouts.py"
RECORDED = {"fsdp": {"metrics": [{"step": 1, "loss": 0.1}], "checkpoint": {"model.a": [[2], "torch.float32", "ab"]}}}


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({}, ""),
        ({"metrics": [{"step": 1, "loss": 0.1 + 2**-56}]}, "/fsdp/metrics/0/loss"),
        ({"metrics": []}, "/fsdp/metrics"),
        ({"checkpoint": {}}, "/fsdp/checkpoint/model.a"),
        ({"checkpoint": {"model.a": [[2], "torch.float32", "ac"]}}, "/fsdp/checkpoint/model.a/2"),
    ],
)
def test_differences(tmp_path: Path, changed: dict[str, Any], where: str) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(RECORDED))
    files[1].write_text(json.dumps({"fsdp": RECORDED["fsdp"] | changed}))
    done = subprocess.run([sys.executable, str(SCRIPT), "diff", *map(str, files)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "identical\n") if not where else done.stdout.startswith(f"{where}: ")
    assert done.returncode == bool(where)
