"""Muon on a GPU: against PyTorch's Muon, which updates one matrix at a time; no host sync, no recompilation."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.gpu.test_step import VOCAB, batches, config, losses
from torchxihe.components.optimizer.adamw import BFloat16AdamW, create_state
from torchxihe.components.optimizer.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize
from torchxihe.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(256, 256)] * 6 + [(512, 256)] * 4 + [(256, 512)] * 2
LR, DECAY = 0.02, 0.1


def made(compile: bool, state_dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Muon]:
    generator = torch.Generator("cuda").manual_seed(0)
    parameters = [
        nn.Parameter(0.02 * torch.randn(shape, device="cuda", generator=generator)) for shape in [*SHAPES, (256,)]
    ]
    rest = BFloat16AdamW([{"params": parameters[-1:]}], lr=LR, weight_decay=0.0, fused=True)
    create_state(rest, torch.bfloat16)
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "momentum": 0.95, "dtype": torch.bfloat16}
    return parameters, Muon(parameters[:-1], rest, **options, state_dtype=state_dtype, replicas=None, compile=compile)


def gradients(parameters: list[nn.Parameter], number: int) -> None:
    generator = torch.Generator("cuda").manual_seed(100 + number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)


def test_orthogonalize_in_bfloat16() -> None:
    """Equal to the quintic applied to the singular values, within bfloat16 rounding."""
    a, b, c = COEFFICIENTS
    for shape in {*SHAPES}:
        x = torch.randn(3, *shape, device="cuda")
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        s = s / s.square().sum(-1, keepdim=True).sqrt()
        for _ in range(ITERATIONS):
            s = a * s + b * s**3 + c * s**5
        expected = u * s[:, None] @ v
        error = orthogonalize(x.bfloat16()).double() - expected
        assert error.norm() < 0.03 * expected.norm()
        assert (orthogonalize(x).double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_batched_steps_equal_pytorchs(compile: bool) -> None:
    """The updates of a step differ only by bfloat16 rounding; the momenta are equal."""
    parameters, optimizer = made(compile)
    others, _ = made(False)
    theirs = torch.optim.Muon(others[:-1], LR, DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    for number in range(5):
        before = [p.detach().clone() for p in parameters[:-1]]
        with torch.no_grad():
            for parameter, other in zip(parameters, others, strict=True):
                other.copy_(parameter)
        gradients(parameters, number)
        gradients(others, number)
        optimizer.step()
        theirs.step()
        for parameter, other, old in zip(parameters, others, before, strict=False):
            assert (parameter - other).norm() < 0.02 * (other - old).norm()
            ours, reference = (o.state[p]["momentum_buffer"] for o, p in ((optimizer, parameter), (theirs, other)))
            assert (ours - reference).abs().max() < 1e-6


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(compile: bool, state_dtype: torch.dtype) -> None:
    parameters, optimizer = made(compile, state_dtype)

    optimizer.grad_scale = torch.ones((), device="cuda")

    def bits() -> list[Tensor]:
        states = [value for p in parameters for value in optimizer.state[p].values() if value.ndim]
        return [tensor.detach().clone().view(torch.uint8) for tensor in [*parameters, *states]]

    for number in range(3):
        before = bits()
        gradients(parameters, number)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad[0] = float("nan")
        optimizer.found_inf = torch.ones((), device="cuda")
        optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(before, bits(), strict=True))
        gradients(parameters, number)
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.step()
        assert not any(torch.equal(x, y) for x, y in zip(before, bits(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_host_never_waits_and_nothing_recompiles(name: str, state_dtype: str) -> None:
    """Ten steps, each with a different learning rate."""
    options = {"name": name, "state_dtype": state_dtype}
    trainer = Trainer(
        config(optimizer=options, lr_scheduler={"warmup_steps": 100}), torch.device("cuda"), np.ones(VOCAB, np.int32)
    )
    loader = itertools.cycle(batches(trainer.micro_batch_size))
    for _ in range(3):
        trainer.train_step(loader)
    compiled = counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            trainer.train_step(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == compiled


def test_fast_path_learns_what_the_reference_learns() -> None:
    """bfloat16, compiled, against float32 in eager mode."""
    fast = np.array(losses(optimizer={"name": "muon"}))
    slow = np.array(
        losses(optimizer={"name": "muon"}, training={"dtype": "float32", "compile": False}, model={"attention": "sdpa"})
    )
    assert slow[-1] < slow[0] - 1
    assert np.abs(fast - slow).max() < 0.1
