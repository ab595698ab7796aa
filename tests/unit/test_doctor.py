"""Kernels compared with their references on this machine."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchxihe.__main__ import run
from torchxihe.commands import doctor
from torchxihe.config.load import load_config
from torchxihe.errors import UserError
from torchxihe.kernels import select
from torchxihe.kernels.attention import sdpa, varlen
from torchxihe.kernels.linear_cross_entropy import linear_cross_entropy
from torchxihe.kernels.select import PORTABLE, not_chosen, select_kernels

SMALL = ["--model.hidden_size=32", "--model.num_hidden_layers=1", "--model.num_attention_heads=2",
         "--model.num_key_value_heads=1", "--model.head_dim=16", "--model.intermediate_size=32",
         "--model.vocab_size=300", "--tokenizer.vocab_size=300", "--data.seq_len=40"]  # fmt: skip
CONFIG = "configs/xihe_debug.toml"


def test_what_is_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", CONFIG, *SMALL])
    out = capsys.readouterr().out
    assert "kernels    attention SDPA" in out and out.count("right, ") == 5 and "WRONG" not in out
    assert "not any of the faster kernels: they need an NVIDIA GPU" in out


def half_masked(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Attention that does not mask documents."""
    return sdpa(q, k, v, None)


def one_wrong_gradient(x: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A right loss whose gradient by the weight is off by half a percent."""
    loss, losses = linear_cross_entropy(x, w * 1.005 - (w * 0.005).detach(), targets)
    return loss, losses


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"attention": half_masked}, "attention in documents by half_masked"),
        ({"cross_entropy": one_wrong_gradient}, "head and loss by one_wrong_gradient"),
    ],
)
def test_a_broken_kernel_is_named(broken: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(select.LABELS, half_masked, "half_masked")
    monkeypatch.setitem(select.LABELS, one_wrong_gradient, "one_wrong_gradient")
    monkeypatch.setattr(doctor, "select_kernels", lambda config, device: replace(PORTABLE, **broken))
    with pytest.raises(UserError) as error:
        run(["doctor", CONFIG, *SMALL])
    assert f"wrong results on this machine: {named};" in str(error.value)


@pytest.mark.parametrize(
    ("capability", "flags", "lines"),
    [
        ((8, 6), [], ["FlashAttention 4: needs a Hopper GPU or newer (compute capability 9.0, this one has 8.6)",
                      "quack: its tiles were chosen for Hopper (compute capability 9.0, this one has 8.6)"]),
        ((9, 0), [], ["FlashAttention 4: not installed (pip install 'torchxihe[kernels]')",
                      "quack: not installed (pip install 'torchxihe[kernels]')"]),
        ((9, 0), ["--model.head_dim=80"], ["FlashAttention 4: has no head_dim of 80"]),
        ((9, 0), ["--model.attention=varlen", "--model.mlp=torch"], ['FlashAttention 4: model.attention is "varlen"',
                                                                     'quack: model.mlp is "torch"']),
        ((12, 0), ["--float8.recipe=tensorwise", "--float8.scope=all"], ["quack: float8.recipe is set"]),
    ],
)  # fmt: skip
def test_why_faster_kernels_are_not_used(
    capability: tuple[int, int], flags: list[str], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "compute_capability", lambda device: capability)
    monkeypatch.setattr(select, "has_flash_attention_4", lambda device: False)
    monkeypatch.setattr(select, "has_quack", lambda device: False)
    config = load_config("configs/xihe_120m.toml", flags)
    found = not_chosen(config, torch.device("cuda"), replace(PORTABLE, attention=varlen))
    assert all(line in found for line in lines), found


def test_bfloat16_on_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "compute_capability", lambda device: (7, 5))
    config = load_config("configs/xihe_120m.toml")
    with pytest.raises(UserError, match=r'training.dtype: "bfloat16" needs an Ampere .* has 7.5; use "float32"'):
        select_kernels(config, torch.device("cuda"))
