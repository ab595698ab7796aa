"""Muon divided over processes: the steps of one process, whatever the rows and however many matrices there are."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.launch import run_distributed
from torchxihe.components.muon import Muon
from torchxihe.config import Parallelism
from torchxihe.parallelisms.mesh import build_mesh

# On 4 ranks: 16 rows are even, 10 are 3, 3, 3, 1, and 3 leave a rank without; 5 matrices are 2, 2, 1, 0.
SHAPES = [(16, 8)] * 5 + [(10, 12)] * 3 + [(3, 8)] * 2 + [(8, 16)]
STEPS = 4


def steps(mesh: DeviceMesh | None, dtype: torch.dtype) -> list[Tensor]:
    """Whole parameters and momenta after some steps, one of them skipped, on the same gradients everywhere."""
    generator = torch.Generator().manual_seed(0)

    def laid_out(whole: Tensor) -> Tensor:
        if mesh is None or mesh["dp_shard"].size() == 1:
            return whole
        flat = mesh["dp_replicate"].size() == 1
        return distribute_tensor(
            whole, mesh["dp_shard"] if flat else mesh, [Shard(0)] if flat else [Replicate(), Shard(0)]
        )

    parameters = [nn.Parameter(laid_out(torch.randn(shape, generator=generator))) for shape in SHAPES]
    vector = nn.Parameter(laid_out(torch.randn(16, generator=generator)))
    adamw = torch.optim.AdamW([vector], lr=0.1, fused=True)
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    optimizer = Muon(parameters, adamw, **options, dtype=dtype, mesh=mesh, compile=False)
    for step in range(STEPS):
        for parameter in [*parameters, vector]:
            parameter.grad = laid_out(torch.randn(parameter.shape, generator=generator))
        optimizer.found_inf = torch.tensor(float(step == 1))
        optimizer.step()
    tensors = [*parameters, vector, *(optimizer.state[p]["momentum_buffer"] for p in parameters)]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in tensors]


def rank_steps(dtype: torch.dtype, replicate: int, shard: int) -> list[Tensor]:
    parallelism = Parallelism(dp_replicate=replicate, dp_shard=shard)
    return steps(build_mesh(parallelism, replicate * shard, "cpu"), dtype)


@pytest.mark.parametrize(("replicate", "shard"), [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)])
def test_steps_are_those_of_one_process(replicate: int, shard: int) -> None:
    """Seen to fail with rows or matrices divided otherwise, and with the replicas' parts in another order."""
    expected = steps(None, torch.float32)
    for found in run_distributed(rank_steps, replicate * shard, torch.float32, replicate, shard):
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert (ours - theirs).abs().max() < 1e-6, f"tensor {i}"


def test_bfloat16_travels() -> None:
    expected = steps(None, torch.bfloat16)
    for found in run_distributed(rank_steps, 4, torch.bfloat16, 2, 2):
        assert max((ours - theirs).abs().max() for ours, theirs in zip(found, expected, strict=True)) < 1e-6
