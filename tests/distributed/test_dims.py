"""ParallelDims: the rank along each axis, and sums over axes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.launch import run_distributed
from tests.distributed.test_parity import BATCH, NAMES, STEPS, VOCAB, batch_of, config, reference
from torchxihe.components.optimizer import gradient_norm
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.trainer import Trainer

GRID = {"pp": 2, "dp_replicate": 3, "dp_shard": 2, "cp": 2, "tp": 2}


def test_ranks_along_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of a grid of 48: pp outermost, tp innermost."""
    monkeypatch.setenv("WORLD_SIZE", "48")
    dims = ParallelDims(**GRID)
    assert {axis: dims.size(axis) for axis in ("pp", "cp", "data", "loss", "stage", "world")} == {
        "pp": 2, "cp": 2, "data": 6, "loss": 24, "stage": 24, "world": 48
    }  # fmt: skip
    for number, place in enumerate(np.ndindex(*GRID.values())):
        monkeypatch.setenv("RANK", str(number))
        pp, replicate, shard, cp, tp = map(int, place)
        assert [dims.rank(axis) for axis in GRID] == [pp, replicate, shard, cp, tp]
        assert dims.rank("data") == replicate * 2 + shard
        assert dims.rank("loss") == ((pp * 3 + replicate) * 2 + shard) * 2 + cp
        assert dims.rank("world") == number


def test_one_process_is_all_ones() -> None:
    dims = ParallelDims()
    assert dims.describe() == "one process" and dims.group("world") is None
    value = torch.tensor(3.0)
    assert dims.sum(value, "loss") is value and value == 3
    with pytest.raises(AssertionError, match="is not a layout of 1 processes"):
        ParallelDims(tp=2)


def _sums(grid: dict[str, int]) -> dict[str, float]:
    """For each axis, the sum of 2^rank over it, which identifies the ranks that took part."""
    dims = ParallelDims(**grid)
    axes = ["pp", "dp_replicate", "dp_shard", "cp", "tp", "data", "loss", "stage", "world", "data"]
    return {axis: dims.sum(torch.tensor(2.0 ** torch.distributed.get_rank()), axis).item() for axis in axes}


@pytest.mark.parametrize(
    "grid", [{"dp_shard": 2}, {"dp_replicate": 2, "cp": 2}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "dp_shard": 2}]
)
def test_sums_run_over_the_ranks_of_the_axis(grid: dict[str, int]) -> None:
    sizes = [grid.get(name, 1) for name in GRID]
    world = int(np.prod(sizes))
    number = np.arange(world).reshape(sizes)
    spans = {
        **{name: (i,) for i, name in enumerate(GRID)},
        "data": (1, 2), "loss": (0, 1, 2, 3), "stage": (1, 2, 3, 4), "world": (0, 1, 2, 3, 4),
    }  # fmt: skip
    for rank, found in enumerate(run_distributed(_sums, world, grid)):
        place = np.argwhere(number == rank)[0]
        for axis, spread in spans.items():
            index = tuple(slice(None) if i in spread else place[i] for i in range(5))
            assert found[axis] == sum(2.0**other for other in number[index].flatten()), (rank, axis)


def _same_rows(grid: dict[str, int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step if all ranks read the same rows."""
    trainer = Trainer(
        config(training={"micro_batch_size": BATCH}),
        torch.device("cpu"),
        np.ones(VOCAB, np.int32),
        dims=ParallelDims(**grid),
    )
    place = trainer.batch_spec.data_rank, trainer.batch_spec.data_ranks
    loader = (batch_of(step, 0, *place, trainer.micro_batch_size) for step in range(STEPS))
    history = []
    for _ in range(STEPS):
        trainer.train_step(loader)
        sums = trainer.sums.read(NAMES)
        history.append((sums["loss"], sums["grad_norm"]))
    return history


def test_ranks_that_read_the_same_rows_count_them_once() -> None:
    """Seen to fail with tokens counted over all ranks: the loss stays right (divided twice), the gradient is halved."""
    expected = [step[:2] for step in reference()]
    for found in run_distributed(_same_rows, 2, {"tp": 2}):
        assert np.abs(np.array(found) - expected).max() < 1e-5


def _norm(case: str) -> tuple[float, float]:
    """gradient_norm of parameters placed by `case` on 4 ranks, and the norm of the full tensors."""
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator) for shape in [(8, 6), (7, 3), (16,), (4, 4), (5, 8)]]
    grids = {
        "two meshes": {"dp_replicate": 2, "dp_shard": 2},
        "tensor parallel": {"dp_shard": 2, "tp": 2},
        "stages": {"pp": 2, "dp_shard": 2},
    }
    dims = ParallelDims(**grids[case])
    grads: list[Tensor] = list(wholes)
    if case == "two meshes":
        grid, shards = dims.mesh("dp_replicate", "fsdp"), dims.mesh("fsdp")
        grads[:2] = [distribute_tensor(whole, grid, [Replicate(), Shard(0)]) for whole in wholes[:2]]
        # On a mesh of only the shards, no placement describes the replicas; this layout has no such parameters.
        grads[3] = distribute_tensor(wholes[3], grid, [Shard(0), Shard(1)])
        assert shards.ndim == 1
    if case == "tensor parallel":
        grid = dims.mesh("fsdp", "tp")
        placements: list[list[Any]] = [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Replicate()]]
        grads[:3] = [
            distribute_tensor(whole, grid, placed) for whole, placed in zip(wholes[:3], placements, strict=True)
        ]
        grads[3] = distribute_tensor(wholes[3], dims.mesh("tp"), [Shard(0)])
        grads[3] = DTensor.from_local(grads[3].to_local(), grid, [Replicate(), Shard(0)], run_check=False)
    if case == "stages":
        mesh = dims.mesh("fsdp")
        mine = wholes[:2] if dims.rank("pp") == 0 else wholes[2:]
        grads = [distribute_tensor(whole, mesh, [Shard(0)]) for whole in mine]
    parameters = [nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    ours = gradient_norm(parameters, dims.sum, dims.size("stage"))
    return ours.item(), torch.cat([whole.flatten() for whole in wholes]).norm().item()


@pytest.mark.parametrize("case", ["two meshes", "tensor parallel", "stages"])
def test_the_norm_spans_meshes_and_stages(case: str) -> None:
    """`get_total_norm` raises on the first two and sees one stage of the third. Seen to fail if all copies count."""
    for ours, whole in run_distributed(_norm, 4, case):
        assert ours == pytest.approx(whole, rel=1e-6)
