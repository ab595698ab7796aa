"""The choice of kernels: one value, chosen in one place, the references among its choices."""

from dataclasses import dataclass
from typing import Any

import torch

from torchxihe.config.options import Config, Model
from torchxihe.errors import UserError
from torchxihe.kernels.attention import Attention, sdpa, varlen
from torchxihe.kernels.flash_attention_4 import FA4_HEAD_DIMS, fa4, has_flash_attention_4
from torchxihe.kernels.float8_cross_entropy import float8_cross_entropy, has_float8_head
from torchxihe.kernels.float8_swiglu import has_float8, swiglu_float8
from torchxihe.kernels.linear_cross_entropy import (
    LinearCrossEntropy,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from torchxihe.kernels.qk_norm_rope import QKNormRope, qk_norm_rope_reference, qk_norm_rope_triton
from torchxihe.kernels.quack_swiglu import SIZE_MULTIPLE, has_quack, swiglu_quack
from torchxihe.kernels.swiglu import SwiGLU, swiglu_reference
from torchxihe.utils.device import compile_obstacle, compute_capability


@dataclass(frozen=True)
class Kernels:
    """The operations that a decoder is made of. A test or a benchmark passes the ones it wants; nothing is patched."""

    attention: Attention
    qk_norm_rope: QKNormRope
    swiglu: SwiGLU
    cross_entropy: LinearCrossEntropy

    def describe(self) -> str:
        """For the log: "attention FlashAttention 4, QK-norm/RoPE Triton, SwiGLU quack, loss chunked"."""
        parts = ("attention", self.attention), ("QK-norm/RoPE", self.qk_norm_rope), ("SwiGLU", self.swiglu)
        return ", ".join(f"{what} {LABELS[kernel]}" for what, kernel in (*parts, ("loss", self.cross_entropy)))


LABELS = {
    sdpa: "SDPA",
    varlen: "PyTorch varlen",
    fa4: "FlashAttention 4",
    qk_norm_rope_reference: "PyTorch",
    qk_norm_rope_triton: "Triton",
    swiglu_reference: "PyTorch",
    swiglu_quack: "quack",
    swiglu_float8: "float8",
    linear_cross_entropy: "chunked",
    float8_cross_entropy: "float8",
    linear_cross_entropy_reference: "full logits",
}

REFERENCE = Kernels(sdpa, qk_norm_rope_reference, swiglu_reference, linear_cross_entropy_reference)
"""The references of all tests: plain PyTorch, full float32 logits."""

PORTABLE = Kernels(sdpa, qk_norm_rope_reference, swiglu_reference, linear_cross_entropy)
"""Plain PyTorch, on any device, without full logits."""


def select_kernels(config: Config, device: torch.device) -> Kernels:
    """The kernels of a run: what `model.attention` and `model.mlp` name, or with "auto" the fastest that work here.

    Raises UserError if a named one does not work here.
    """
    model, dtype = config.model, getattr(torch, config.training.dtype)
    if device.type == "cuda" and dtype == torch.bfloat16 and compute_capability(device) < (8, 0):
        found = ".".join(map(str, compute_capability(device)))
        raise UserError(
            f'training.dtype: "bfloat16" needs an Ampere GPU or newer (compute capability 8.0), this one has {found}; '
            'use "float32"'
        )
    return Kernels(
        select_attention(model, device, dtype, config.data.document_mask),
        select_qk_norm_rope(model.head_dim, device, dtype),
        select_swiglu(model, device, dtype, config.float8_blocks, config.parallelism.tp),
        float8_cross_entropy
        if config.float8_head and has_float8_head(device, dtype, model.hidden_size, model.vocab_size)
        else linear_cross_entropy,
    )


def select_attention(model: Model, device: torch.device, dtype: torch.dtype, document_mask: bool) -> Attention:
    """FlashAttention 4, PyTorch's varlen (pays with documents only) or SDPA, by `model.attention`. Raises UserError."""
    aligned = dtype != torch.float32 and model.head_dim % 8 == 0  # 16-bit elements in 16 bytes
    usable = {
        "fa4": aligned and model.head_dim in FA4_HEAD_DIMS and has_flash_attention_4(device),
        "varlen": aligned and model.head_dim <= 256 and compute_capability(device) >= (8, 0),
        "sdpa": True,
    }
    name = model.attention
    if name == "auto":
        name = next(kernel for kernel, works in usable.items() if works and (kernel != "varlen" or document_mask))
    if not usable[name]:
        needs = {
            "fa4": "a Hopper GPU or newer, the extra torchxihe[kernels], a head_dim of 32, 64, 96 or 128",
            "varlen": "an Ampere GPU or newer, a head_dim of at most 256 and a multiple of 8",
        }
        raise UserError(f'model.attention: "{name}" needs {needs[name]} and training.dtype = "bfloat16"; use "auto"')
    return {"fa4": fa4, "varlen": varlen, "sdpa": sdpa}[name]


def select_qk_norm_rope(head_dim: int, device: torch.device, dtype: torch.dtype) -> QKNormRope:
    """The Triton kernel on a GPU, in 16-bit, with a head dimension that is a power of two; else PyTorch."""
    works = device.type == "cuda" and dtype != torch.float32 and head_dim >= 16 and head_dim & (head_dim - 1) == 0
    return qk_norm_rope_triton if works and not compile_obstacle() else qk_norm_rope_reference


def select_swiglu(model: Model, device: torch.device, dtype: torch.dtype, recipe: str, tp: int = 1) -> SwiGLU:
    """quack's, our own around float8 products, or PyTorch's, by `model.mlp`. Raises UserError.

    recipe: of the blocks' products. With `model.mlp = "torch"`, and with `tp` > 1, as our own kernel does not agree on
    scales, torchao computes the products, around PyTorch's activation.
    """
    sizes = model.hidden_size, model.intermediate_size
    if recipe and tp == 1 and model.mlp == "auto" and has_float8(device, dtype, recipe, *sizes):
        return swiglu_float8
    aligned = all(n % SIZE_MULTIPLE == 0 for n in sizes)
    usable = dtype != torch.float32 and aligned and not recipe and has_quack(device)
    if model.mlp == "quack" and not usable:
        raise UserError(
            'model.mlp: "quack" needs a Hopper GPU, training.dtype = "bfloat16", no float8.recipe, the extra '
            f'torchxihe[kernels], and sizes that are multiples of {SIZE_MULTIPLE}; use "auto"'
        )
    return swiglu_quack if usable and model.mlp != "torch" else swiglu_reference


def not_chosen(config: Config, device: torch.device, kernels: Kernels) -> list[str]:
    """Faster kernels that `kernels` does without, each with the first reason: "quack: not installed ..."."""
    model, capability, float32 = config.model, compute_capability(device), config.training.dtype == "float32"
    if device.type != "cuda":
        return ["any of the faster kernels: they need an NVIDIA GPU"]
    number = ".".join(map(str, capability))
    install = "not installed (pip install 'torchxihe[kernels]')"
    dtype = 'training.dtype is "float32"'
    asked = {"attention": f'model.attention is "{model.attention}"', "mlp": f'model.mlp is "{model.mlp}"'}
    reasons: dict[Any, list[tuple[bool, str]]] = {
        fa4: [
            (model.attention not in ("auto", "fa4"), asked["attention"]),
            (capability < (9, 0), f"needs a Hopper GPU or newer (compute capability 9.0, this one has {number})"),
            (float32, dtype),
            (model.head_dim not in FA4_HEAD_DIMS, f"has no head_dim of {model.head_dim}"),
            (not has_flash_attention_4(device), install),
        ],
        qk_norm_rope_triton: [
            (float32, dtype),
            (bool(compile_obstacle()), compile_obstacle()),
            (True, f"needs a head_dim that is a power of two, at least 16, not {model.head_dim}"),
        ],
        swiglu_quack: [
            (model.mlp not in ("auto", "quack"), asked["mlp"]),
            (bool(config.float8_blocks), "float8.recipe is set"),
            (capability[0] != 9, f"its tiles were chosen for Hopper (compute capability 9.0, this one has {number})"),
            (float32, dtype),
            (not has_quack(device), install),
            (True, f"needs sizes that are multiples of {SIZE_MULTIPLE}"),
        ],
    }
    chosen = (kernels.attention, kernels.qk_norm_rope, kernels.swiglu)
    return [
        f"{LABELS[kernel]}: {next((why for holds, why in found if holds), 'not the fastest here')}"
        for kernel, found in reasons.items()
        if kernel not in chosen and not (kernel is swiglu_quack and kernels.swiglu is swiglu_float8)
    ]
