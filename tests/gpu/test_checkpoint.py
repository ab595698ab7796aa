"""Checkpoints of tensors on a GPU: FSDP2's DTensors over NCCL (one process), staged in page-locked memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.unit.saved_runs import state_of
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.staging import Staging
from torchxihe.components.checkpoint.state import flat_state, load_model_only
from torchxihe.components.optimizer.adamw import create_state
from torchxihe.components.runtime.watchdog import _flight_recording
from torchxihe.config.options import Checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def group() -> Iterator[None]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    device = torch.device("cuda", 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


def sharded(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).cuda()
    for child in model:
        fully_shard(child, mesh=init_device_mesh("cuda", (1,)))
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    create_state(optimizer, torch.float32)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    model(torch.ones(8, 64, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_async_save_of_sharded_tensors(group: None, tmp_path: Path) -> None:
    """Training continues at once and changes the same memory; the files have the values at the time of the call."""
    model, optimizer = sharded(0)
    step(model, optimizer)
    checkpointer = Checkpointer(tmp_path, Checkpoint(mode="async"))
    expected = {}
    for number in (1, 2):  # the second save reuses the memory of the first
        state = flat_state(model, optimizer)
        assert isinstance(state["model.0.weight"], DTensor) and state["model.0.weight"].is_cuda
        expected[number] = {key: tensor.clone() for key, tensor in state.items()}
        checkpointer.save(number, state, state_of(number))
        step(model, optimizer)
    checkpointer.close()
    other = flat_state(*sharded(1))
    for number in (1, 2):
        checkpointer.load(tmp_path / f"step-{number:08d}", other)
        for key, tensor in other.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            was = expected[number][key]
            assert torch.equal(full, was.full_tensor() if isinstance(was, DTensor) else was), key
    plain = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    load_model_only(tmp_path / "step-00000002", plain)
    weight = expected[2]["model.0.weight"]
    assert isinstance(weight, DTensor)
    assert torch.equal(plain[0].weight, weight.full_tensor().cpu())


def test_staging_memory_is_page_locked_and_kept(group: None) -> None:
    state, staging = flat_state(*sharded(0)), Staging()
    first = staging.copy(state)
    again = staging.copy(state)
    for key, tensor in first.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert local.is_pinned() and not local.is_cuda
        assert again[key] is tensor


def test_the_flight_recorder_is_on(group: None) -> None:
    dist.all_reduce(torch.ones(1, device="cuda"))
    assert len(_flight_recording()) > 0
