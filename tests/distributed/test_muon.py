"""Muon divided over processes equals Muon in one process, for any number of rows and matrices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.launch import run_distributed
from tests.distributed.test_parity import NAMES, VOCAB, batch_of, config
from tests.unit.saved_runs import state_of
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.optimizer.muon import Muon, shard_rectangles
from torchxihe.config.options import Checkpoint, Parallelism
from torchxihe.errors import UserError
from torchxihe.parallelisms.dims import ParallelDims, build_dims
from torchxihe.trainer import Trainer
from torchxihe.utils.distributed import rank, world_size

# On 4 ranks: 16 rows divide evenly, 10 into 3, 3, 3, 1, and 3 leave one rank without rows; 5 matrices: 2, 2, 1, 0.
SHAPES = [(16, 8)] * 5 + [(10, 12)] * 3 + [(3, 8)] * 2 + [(8, 16)]
STEPS = 4


def steps(dims: ParallelDims, dtype: torch.dtype) -> list[Tensor]:
    """Full parameters and momenta after some steps, one of them skipped, with the same gradients on all ranks."""
    generator = torch.Generator().manual_seed(0)

    def laid_out(whole: Tensor) -> Tensor:
        if dims.dp_shard == 1:
            return whole
        mesh = dims.mesh("dp_replicate", "fsdp")
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
    """Seen to fail with other divisions of rows or matrices, and with the replicas' parts in another order."""
    expected = steps(ParallelDims(), torch.float32)
    for found in run_distributed(rank_steps, replicate * shard, torch.float32, replicate, shard):
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert (ours - theirs).abs().max() < 1e-6, f"tensor {i}"


def test_communication_is_in_bfloat16() -> None:
    expected = steps(ParallelDims(), torch.bfloat16)
    for found in run_distributed(rank_steps, 4, torch.bfloat16, 2, 2):
        assert max((ours - theirs).abs().max() for ours, theirs in zip(found, expected, strict=True)) < 1e-6


def train(parallelism: dict[str, Any], root: Path, load: int, steps: int, optimizer: str = "muon") -> list[float]:
    """The losses of `steps` steps after checkpoint `load` (0: from the start); saves a checkpoint at the end."""
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
    checkpointer.save(trainer.step, trainer.state(), state_of(trainer.step))
    return losses


def test_a_checkpoint_resumes_under_any_parallelism(tmp_path: Path) -> None:
    """2 x 2, then one process, three, two replicas. Seen to fail if the momentum is loaded into a copy."""
    unbroken = train({}, tmp_path / "unbroken", 0, 10)
    losses = run_distributed(train, 4, {"dp_replicate": 2, "dp_shard": 2}, tmp_path, 0, 3)[0]
    losses += train({}, tmp_path, 3, 2)
    losses += run_distributed(train, 3, {"dp_shard": 3}, tmp_path, 5, 2)[0]
    losses += run_distributed(train, 2, {"dp_replicate": 2, "dp_shard": 1}, tmp_path, 7, 3)[0]
    assert np.abs(np.array(losses) - unbroken).max() < 1e-5


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    unbroken = train({}, tmp_path / "unbroken", 0, 6)
    assert train({}, tmp_path, 0, 3) + train({}, tmp_path, 3, 3) == unbroken
    files = [path / "step-00000006" / "MANIFEST.json" for path in (tmp_path, tmp_path / "unbroken")]
    assert files[0].read_text() == files[1].read_text()


def test_another_optimizers_checkpoint_is_refused(tmp_path: Path) -> None:
    train({}, tmp_path, 0, 1, "adamw")
    with pytest.raises(UserError, match=r"does not fit: .* missing .*momentum_buffer.* use the model and optimizer"):
        train({}, tmp_path, 1, 1, "muon")


def tensor_parallel_steps() -> list[Tensor]:
    """Like `steps`, on a mesh of 2 x 2: one shape under two placements, shards cut again by FSDP2, uneven sizes."""
    dims, generator = ParallelDims(dp_shard=2, tp=2), torch.Generator().manual_seed(0)
    mesh, tp = dims.mesh("fsdp", "tp"), dims.mesh("tp")
    parameters, wholes = [], []
    for i, shape in enumerate([(16, 8)] * 4 + [(10, 12)] * 3 + [(7, 5)] * 3):
        model = nn.Linear(shape[1], shape[0], bias=False)
        wholes.append(torch.randn(shape, generator=generator))
        placement = Shard(0) if i % 2 else Shard(1)  # column-parallel, row-parallel
        model.weight = nn.Parameter(distribute_tensor(wholes[-1], tp, [placement], src_data_rank=None))
        fully_shard(model, mesh=dims.mesh("fsdp"))
        parameters.append(model.weight)
    assert {parameter.device_mesh.ndim for parameter in parameters} == {2} and mesh.ndim == 2
    vector = nn.Parameter(torch.randn(16, generator=generator))
    adamw = torch.optim.AdamW([vector], lr=0.1, fused=True)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "state_dtype": torch.float32}
    optimizer = Muon(parameters, adamw, **options, dtype=torch.float32, replicas=None, compile=False)
    single = [nn.Parameter(whole.clone()) for whole in wholes]
    alone = torch.optim.AdamW([nn.Parameter(vector.detach().clone())], lr=0.1, fused=True)
    expected = Muon(single, alone, **options, dtype=torch.float32, replicas=None, compile=False)
    for step in range(STEPS):
        for parameter, one in zip(parameters, single, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            like = parameter.detach()
            whole = distribute_like(one.grad, like)
            parameter.grad = whole
        vector.grad = torch.zeros(16)
        alone.param_groups[0]["params"][0].grad = torch.zeros(16)
        for muon in (optimizer, expected):
            muon.grad_scale, muon.found_inf = torch.ones(()), torch.tensor(float(step == 1))
            muon.step()
    return [
        torch.stack([(a.full_tensor() - b).abs().max() for a, b in zip(parameters, single, strict=True)]).detach(),
        torch.stack(
            [
                (optimizer.state[a]["momentum_buffer"].full_tensor() - expected.state[b]["momentum_buffer"]).abs().max()
                for a, b in zip(parameters, single, strict=True)
            ]
        ),
    ]


def distribute_like(whole: Tensor, like: DTensor) -> DTensor:
    """`full` distributed like `like`, by the rectangles that its ranks hold."""
    mesh, placements = like.device_mesh, like.placements
    rectangles = shard_rectangles(whole.shape, list(mesh.shape), list(placements))
    rows, columns = rectangles[rank()]
    local = whole[rows, columns].contiguous()
    assert local.shape == like.to_local().shape, (local.shape, like.to_local().shape, placements)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=tuple(whole.stride()))


def test_matrices_of_two_placements_are_orthogonalised_as_full_matrices() -> None:
    """Seen to fail as before: `torch.stack` of shards of two shapes, and orthogonalised shards."""
    for parameters, momenta in run_distributed(tensor_parallel_steps, 4):
        assert parameters.max() < 1e-5 and momenta.max() < 1e-6


def _rectangles(shape: tuple[int, int]) -> bool:
    """Whether the rectangles are DTensor's own, for column- and row-parallel weights under FSDP2."""
    dims = ParallelDims(dp_shard=2, tp=2)
    for placement in (Shard(0), Shard(1)):
        whole = torch.arange(shape[0] * shape[1]).float().view(shape)
        model = nn.Linear(shape[1], shape[0], bias=False)
        model.weight = nn.Parameter(distribute_tensor(whole, dims.mesh("tp"), [placement], src_data_rank=None))
        fully_shard(model, mesh=dims.mesh("fsdp"))
        weight = model.weight
        assert isinstance(weight, DTensor)
        rows, columns = shard_rectangles(weight.shape, [2, 2], list(weight.placements))[rank()]
        if not torch.equal(weight.to_local(), whole[rows, columns]):
            return False
    return True


@pytest.mark.parametrize("shape", [(16, 8), (10, 12), (7, 5), (3, 2)])
def test_rectangles_are_those_of_the_shards(shape: tuple[int, int]) -> None:
    assert all(run_distributed(_rectangles, 4, shape))
