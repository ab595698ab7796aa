"""Four processes: only rank 0 writes to wandb and TensorBoard; every rank has a log."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_distributed
from tests.unit.saved_runs import write_training
from torchxihe.__main__ import run
from torchxihe.components.observe.metrics import METRICS, read_metrics

KEY = "fedcba9876543210fedcba9876543210fedcba98"


def _train(path: str) -> set[str]:
    """Train; which of the trackers' libraries this rank has imported."""
    import sys

    run(["train", path, "--lr_scheduler.warmup_steps=5"])  # which is warned of
    return {"wandb", "tensorboard"} & sys.modules.keys()


@pytest.mark.timeout(180)
def test_rank_0_alone_tracks_and_every_rank_logs(tmp_path: Path) -> None:
    """Only rank 0 opens a tracker, and the API key is in no file."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    path = write_training(tmp_path, steps=2, metrics='wandb = "offline"\ntensorboard = true')
    run(["prepare", str(path)])
    imported = run_distributed(_train, 4, str(path), init=False, timeout=150, env={"WANDB_API_KEY": KEY})
    assert imported == [{"wandb", "tensorboard"}, set(), set(), set()]
    run_dir = tmp_path / "train"
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]

    logs = sorted((run_dir / "logs").iterdir())
    assert [log.name for log in logs] == [f"rank-0000{rank}.log" for rank in range(4)]
    for rank, log in enumerate(logs):
        assert f" rank {rank} [step 1] DEBUG " in log.read_text()
        assert log.read_text().count("lr_scheduler.warmup_steps: 5 is beyond") == (rank == 0)
    last = read_metrics(run_dir / METRICS)[0][-1]
    assert all(last[f"host_memory_gib/{rank}"] > 0.05 for rank in range(4)) and "host_memory_gib/4" not in last
