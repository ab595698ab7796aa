"""Muon divided over processes: the steps of one process, whatever the rows and however many matrices there are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.launch import run_distributed
from tests.distributed.test_parity import NAMES, VOCAB, batch_of, config
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.optimizer.muon import Muon
from torchxihe.config.options import Checkpoint, Parallelism
from torchxihe.errors import UserError
from torchxihe.parallelisms.dims import ParallelDims, build_dims
from torchxihe.trainer import Trainer
from torchxihe.utils.distributed import rank, world_size

# On 4 ranks: 16 rows are even, 10 are 3, 3, 3, 1, and 3 leave a rank without; 5 matrices are 2, 2, 1, 0.
SHAPES = [(16, 8)] * 5 + [(10, 12)] * 3 + [(3, 8)] * 2 + [(8, 16)]
STEPS = 4


def steps(dims: ParallelDims, dtype: torch.dtype) -> list[Tensor]:
    """Whole parameters and momenta after some steps, one of them skipped, on the same gradients everywhere."""
    generator = torch.Generator().manual_seed(0)

    def laid_out(whole: Tensor) -> Tensor:
        if dims.dp_shard == 1:
            return whole
        mesh = dims.mesh("dp_replicate", "dp_shard")
        return distribute_tensor(whole, mesh, [Replicate(), Shard(0)][-mesh.ndim :])

    parameters = [nn.Parameter(laid_out(torch.randn(shape, generator=generator))) for shape in SHAPES]
    vector = nn.Parameter(laid_out(torch.randn(16, generator=generator)))
    adamw = torch.optim.AdamW([vector], lr=0.1, fused=True)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "state_dtype": torch.float32}
    optimizer = Muon(parameters, adamw, **options, dtype=dtype, replicas=dims.group("dp_replicate"), compile=False)
    for step in range(STEPS):
        for parameter in [*parameters, vector]:
            parameter.grad = laid_out(torch.randn(parameter.shape, generator=generator))
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(float(step == 1))
        optimizer.step()
    tensors = [*parameters, vector, *(optimizer.state[p]["momentum_buffer"] for p in parameters)]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in tensors]


def rank_steps(dtype: torch.dtype, replicate: int, shard: int) -> list[Tensor]:
    parallelism = Parallelism(dp_replicate=replicate, dp_shard=shard)
    return steps(build_dims(parallelism), dtype)


@pytest.mark.parametrize(("replicate", "shard"), [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)])
def test_steps_are_those_of_one_process(replicate: int, shard: int) -> None:
    """Seen to fail with rows or matrices divided otherwise, and with the replicas' parts in another order."""
    expected = steps(ParallelDims(), torch.float32)
    for found in run_distributed(rank_steps, replicate * shard, torch.float32, replicate, shard):
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert (ours - theirs).abs().max() < 1e-6, f"tensor {i}"


def test_bfloat16_travels() -> None:
    expected = steps(ParallelDims(), torch.bfloat16)
    for found in run_distributed(rank_steps, 4, torch.bfloat16, 2, 2):
        assert max((ours - theirs).abs().max() for ours, theirs in zip(found, expected, strict=True)) < 1e-6


def train(parallelism: dict[str, Any], root: Path, load: int, steps: int, optimizer: str = "muon") -> list[float]:
    """The losses of `steps` steps from checkpoint `load` (0: from the beginning) on, saved at their end."""
    options = {"parallelism": parallelism, "optimizer": {"name": optimizer}}
    trainer = Trainer(config(**options), torch.device("cpu"), np.ones(VOCAB, np.int32))
    checkpointer = Checkpointer(root, Checkpoint(mode="sync"))
    if load:
        trainer.load(checkpointer, checkpointer.directory / f"step-{load:08}")
    size = trainer.micro_batch_size
    loader = (
        batch_of(step, i, rank(), world_size(), size)
        for step in range(load, load + steps)
        for i in range(trainer.accumulation)
    )
    losses = []
    for _ in range(steps):
        trainer.train_step(loader)
        losses.append(trainer.sums.read(NAMES)["loss"])
    checkpointer.save(trainer.step, trainer.state(), {"step": trainer.step})
    return losses


def test_a_checkpoint_goes_on_under_any_parallelism(tmp_path: Path) -> None:
    """2 x 2, then one process, three, two copies. Seen to fail when the momentum that is loaded is a copy."""
    unbroken = train({}, tmp_path / "unbroken", 0, 10)
    losses = run_distributed(train, 4, {"dp_replicate": 2, "dp_shard": 2}, tmp_path, 0, 3)[0]
    losses += train({}, tmp_path, 3, 2)
    losses += run_distributed(train, 3, {"dp_shard": 3}, tmp_path, 5, 2)[0]
    losses += run_distributed(train, 2, {"dp_replicate": 2, "dp_shard": 1}, tmp_path, 7, 3)[0]
    assert np.abs(np.array(losses) - unbroken).max() < 1e-5


def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = train({}, tmp_path / "unbroken", 0, 6)
    assert train({}, tmp_path, 0, 3) + train({}, tmp_path, 3, 3) == unbroken
    files = [path / "step-00000006" / "MANIFEST.json" for path in (tmp_path, tmp_path / "unbroken")]
    assert files[0].read_text() == files[1].read_text()


def test_another_optimizers_checkpoint_is_refused(tmp_path: Path) -> None:
    train({}, tmp_path, 0, 1, "adamw")
    with pytest.raises(UserError, match=r"does not fit: .* missing .*momentum_buffer.* use the model and optimizer"):
        train({}, tmp_path, 1, 1, "muon")
