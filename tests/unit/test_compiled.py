"""Compiled code in the run directory: another machine, here another cache, compiles nothing again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.compiler
from torch._dynamo.utils import counters

from torchxihe.components.runtime import Compiled

STEP = """
import itertools, sys
from pathlib import Path
import numpy as np, torch
from torch._dynamo.utils import counters
from torchxihe.components.runtime import Compiled
from torchxihe.config.load import load_config
from torchxihe.data.loader import random_batch
from torchxihe.trainer import Trainer

compiled = Compiled(Path(sys.argv[1]))
flags = ["--training.compile=true", "--model.num_hidden_layers=1", "--data.seq_len=32"]
config = load_config("xihe_debug", flags)
trainer = Trainer(config, torch.device("cpu"), np.full(config.model.vocab_size, 4, np.int32))
trainer.train_step(itertools.repeat(random_batch(trainer.batch_spec, config.model.vocab_size, 2)))
compiled.save()
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def step(run_dir: Path, machine: Path) -> tuple[int, int]:
    """Graphs that were compiled and that were found, with the compiler's cache of one machine."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(machine), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEP, str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    missed, found = done.stdout.split()[-2:]
    return int(missed), int(found)


def test_another_machine_compiles_nothing_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail without the copy in the run directory."""
    missed, found = step(tmp_path, tmp_path / "first")
    assert missed > 0 and found == 0
    file = tmp_path / "compiled.bin"
    written = file.stat().st_mtime_ns
    assert step(tmp_path, tmp_path / "second") == (0, missed)
    assert file.stat().st_mtime_ns == written
    whole = file.read_bytes()
    for content, line in ((whole[:1000], "is damaged; compiling again"), (b"torch 1.0 x\n", "is of another version")):
        file.write_bytes(content)
        with caplog.at_level("INFO"):
            Compiled(tmp_path)
        assert caplog.messages[-1].startswith(f"{file} {line}")


def test_a_copy_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    monkeypatch.setitem(counters["inductor"], "fxgraph_cache_miss", 1)
    Compiled(tmp_path / "not there").save()
    assert "not there/compiled.bin: No such file or directory; another machine compiles again" in caplog.text
