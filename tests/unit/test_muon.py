"""Muon in one process: against the definition by singular values and PyTorch's Muon; skipped steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchxihe.components.optimizer.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize
from torchxihe.utils.device import compile_obstacle

SHAPES = [(32, 32)] * 3 + [(48, 32)] * 4 + [(32, 48)] * 2 + [(8, 32)]
LR, DECAY = 0.02, 0.1


def made(
    dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32, compile: bool = False
) -> tuple[list[nn.Parameter], Muon]:
    """The same matrices at every call, and at the end a vector, which AdamW updates."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in [*SHAPES, (32,)]]
    adamw = torch.optim.AdamW(parameters[-1:], lr=LR, weight_decay=0.0, fused=True)
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "momentum": 0.95, "state_dtype": state_dtype}
    return parameters, Muon(parameters[:-1], adamw, **options, dtype=dtype, replicas=None, compile=compile)


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int, skip: bool = False) -> None:
    """One step on the gradients generated from seed `number`."""
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if skip:
            parameter.grad[0] = float("nan")
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
    optimizer.step()


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 48), (1, 32)])
def test_orthogonalize_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    """Each matrix separately. Seen to fail with another coefficient, and with one norm over all matrices."""
    x = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalize(x), u * s[:, None] @ v, atol=1e-10)
    assert torch.allclose(orthogonalize(x.float()).double(), u * s[:, None] @ v, atol=1e-4)
    assert not orthogonalize(torch.zeros(2, *shape)).any()


def reference_step(weight: Tensor, buffer: Tensor, grad: Tensor) -> None:
    """The update of one matrix, from the definition."""
    a, b, c = COEFFICIENTS
    moved = buffer.float().lerp(grad, 0.05)
    buffer.copy_(moved)
    x = grad.lerp(moved, 0.95)
    x = x / x.norm()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    weight.copy_(weight * (1 - LR * DECAY) - LR * 0.2 * max(weight.shape) ** 0.5 * x)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_batched_steps_equal_the_definition(state_dtype: torch.dtype) -> None:
    parameters, optimizer = made(state_dtype=state_dtype)
    weights = [p.detach().clone() for p in parameters[:-1]]
    buffers = [torch.zeros_like(w, dtype=state_dtype) for w in weights]
    for number in range(10):
        step(parameters, optimizer, number)
        for parameter, weight, buffer in zip(parameters, weights, buffers, strict=False):
            assert parameter.grad is not None
            reference_step(weight, buffer, parameter.grad)
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)
            assert (parameter - weight).abs().max() < 1e-5


def test_batched_steps_equal_pytorchs() -> None:
    """torch.optim.Muon, which computes in bfloat16 everywhere, one matrix at a time."""
    parameters, optimizer = made(torch.bfloat16)
    others, _ = made()
    theirs = torch.optim.Muon(others[:-1], LR, DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others[-1:], LR, weight_decay=0.0)
    for number in range(10):
        step(parameters, optimizer, number)
        step(others, theirs, number)
        adamw.step()
    for parameter, other in zip(parameters, others, strict=True):
        assert (parameter - other).abs().max() < 1e-6
        state = theirs.state.get(other)
        assert state is None or torch.equal(optimizer.state[parameter]["momentum_buffer"], state["momentum_buffer"])


COMPILED = pytest.param(True, marks=pytest.mark.skipif(bool(compile_obstacle()), reason="needs a C++ compiler"))


@pytest.mark.parametrize("compile", [False, COMPILED])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(compile: bool, state_dtype: torch.dtype) -> None:
    """Bit for bit, at the first and a later step, for any gradients. Seen to fail without each `where`."""
    parameters, optimizer = made(state_dtype=state_dtype, compile=compile)
    with torch.no_grad():
        parameters[0][0] = -0.0

    def bits() -> list[Tensor]:
        tensors = [*parameters, *(value for p in parameters for value in optimizer.state[p].values())]
        return [
            tensor.detach().clone().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
            for tensor in tensors
        ]

    other_parameters, other = made(state_dtype=state_dtype, compile=compile)
    with torch.no_grad():
        other_parameters[0][0] = -0.0
    for number in range(4):
        before = bits()
        step(parameters, optimizer, 50 + number, skip=True)
        after = bits()[: len(before)]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        step(parameters, optimizer, number)
        step(other_parameters, other, number)
    assert all(torch.equal(x, y) for x, y in zip(parameters, other_parameters, strict=True))
