"""The decoder: Llama and Qwen3 in one class.

RMSNorm, rotary embeddings, grouped-query attention with optional QK-norm, SwiGLU, tied or untied head, no biases.
Parameters have Hugging Face's names and shapes, so that export is a prefix (see `hf.py`).

Axes: B batch, T position in the row, N = B·T tokens, C hidden size, H query heads, K key and value heads,
D head dimension, F feed-forward width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchxihe.config.options import Model
from torchxihe.kernels.select import PORTABLE, Kernels
from torchxihe.model.norm import RMSNorm, rms_norm
from torchxihe.model.rope import rope_tables
from torchxihe.utils.distributed import local_weight


class Linear(nn.Linear):
    """A linear layer without bias; its weight is cast to the input's dtype (mixed precision, alike in every layout)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], in the input's dtype."""
        return F.linear(input, local_weight(self.weight).to(input.dtype))


class Embedding(nn.Embedding):
    """The table of the tokens' vectors."""

    def __init__(self, config: Model) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.lookup: Callable[[Tensor, Tensor], Tensor] = F.embedding  # replaced by tensor parallelism

    def forward(self, input: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """[B, T] to [B, T, C] (or what of them this rank has), in `dtype`."""
        return self.lookup(input, local_weight(self.weight)).to(dtype)


class SelfAttention(nn.Module):
    """Multi-head attention with grouped keys and values and rotary positions."""

    def __init__(self, config: Model, kernels: Kernels) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention, self.qk_norm_rope = kernels.attention, kernels.qk_norm_rope
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k = self.qk_norm_rope(x_BTC, self.q_proj, self.k_proj, self.q_norm, self.k_norm, cos_TD, sin_TD)
        v = self.v_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.attention(q, k, v, cu_seqlens).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: Model, kernels: Kernels) -> None:
        super().__init__()
        self.swiglu = kernels.swiglu
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.swiglu(x_BTC, self.gate_proj, self.up_proj, self.down_proj)


class Block(nn.Module):
    """One decoder layer: attention, then feed-forward, each with a pre-norm and a residual connection.

    The last addition, of what the feed-forward returns, is left to the next layer. Compiled block by block, it then
    becomes a part of that layer's norm instead of a pass over memory of its own.

    Tensor parallelism sets `gather` and `scatter`: between the sublayers x is then sharded over the tokens.
    """

    def __init__(self, config: Model, kernels: Kernels) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, kernels)
        self.gather: Callable[[Tensor, int], Tensor] = _same  # a sublayer's input, [B, T, C]
        self.scatter: Callable[[Tensor, Tensor], Tensor] = _same  # its output, laid out as x
        self.checkpoint: Callable[..., tuple[Tensor, Tensor]] | None = None  # of `body`; set from outside

    def body(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """From x to (x with attention's output, the feed-forward's): [B, T, C], or what of them this rank has."""
        x, seq_len = x_BTC, cos_TD.shape[0]
        h_BTC = self.gather(self.input_layernorm(x), seq_len)
        x = x + self.scatter(self.self_attn(h_BTC, cos_TD, sin_TD, cu_seqlens), x)
        h_BTC = self.gather(self.post_attention_layernorm(x), seq_len)
        return x, self.scatter(self.mlp(h_BTC), x)

    def forward(
        self, x_BTC: Tensor, added_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`body` of the sum of what the layer before has returned, checkpointed if so set."""
        x_BTC = x_BTC + added_BTC
        if self.checkpoint is not None:
            return self.checkpoint(self.body, x_BTC, cos_TD, sin_TD, cu_seqlens)
        return self.body(x_BTC, cos_TD, sin_TD, cu_seqlens)


def _same(x: Tensor, *_: Any) -> Tensor:
    return x


class _Zeros(torch.autograd.Function):
    """Zeros like x, for the first layer to add. They have a gradient, which nobody needs, if x has one: as what the
    other layers add, so that one compilation serves all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        return None


class Head(nn.Module):
    """Final norm, then the summed loss or the logits. It owns no parameters: the decoder passes them, tied or not."""

    def __init__(self, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.eps, self.cross_entropy = eps, kernels.cross_entropy
        self.gather: Callable[[Tensor, int], Tensor] = _same  # set by tensor parallelism, as a block's
        self.gather_logits: Callable[[Tensor], Tensor] = _same

    def forward(
        self, w_VC: Tensor, x_BTC: Tensor, norm_C: Tensor, targets_BT: Tensor | None, seq_len: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With targets the summed cross-entropy, over all (float32 scalar) and by row (float32 [B], without a
        gradient); without them logits [B, T, V] in x's dtype."""
        x_BTC, w_VC = self.gather(rms_norm(x_BTC, local_weight(norm_C), self.eps), seq_len), local_weight(w_VC)
        if targets_BT is None:
            return self.gather_logits(F.linear(x_BTC, w_VC.to(x_BTC.dtype)))
        loss, losses_N = self.cross_entropy(x_BTC.flatten(0, 1), w_VC, targets_BT.flatten())
        return loss, losses_N.view(targets_BT.shape).sum(1)


class Output(Linear):
    """The weight of a head that is not tied: a module, so that FSDP2 can gather it around what is computed with it."""

    def forward(self, head: Head, *args: Any) -> Any:  # type: ignore[override]
        """`head` called with this weight before the other arguments."""
        return head(self.weight, *args)


class Decoder(nn.Module):
    """A decoder-only language model. Build it on the meta device, then `to_empty(device=...)` and `init_weights()`."""

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(
        self,
        config: Model,
        *,
        seq_len: int,
        dtype: torch.dtype,
        kernels: Kernels = PORTABLE,
    ) -> None:
        super().__init__()
        self.config, self.seq_len, self.dtype = config, seq_len, dtype
        self.first, self.last = True, True  # of a pipeline's stages, which embeds the tokens and which has the head
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config.rms_norm_eps, kernels)
        if not config.tie_word_embeddings:
            self.lm_head = Output(config.hidden_size, config.vocab_size)
        cos, sin = rope_tables(seq_len, config.head_dim, config.rope_theta, torch.device("meta"))
        self.register_buffer("cos_TD", cos, persistent=False)
        self.register_buffer("sin_TD", sin, persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions_T: Tensor | None = None,
        x_BTC: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(cross-entropy summed over the valid targets, the same by row); without targets logits [B, T, V].

        tokens, targets: int64 [B, T], T at most `seq_len`; targets of -100 count nothing. cu_seqlens: see
        `kernels/attention.py`.
        The first is a float32 scalar, the second float32 [B], for reports, without a gradient.
        positions: int64 [T], each token's position in its row; None: 0 to T - 1.
        The loss is computed inside, where FSDP2 has gathered the head's weight.
        A stage of a pipeline takes x, what the stage before it has returned, and returns x unless it is the last.
        """
        at = slice(tokens_BT.shape[1]) if positions_T is None else positions_T
        cos_TD, sin_TD = self.cos_TD[at], self.sin_TD[at]
        if x_BTC is None:
            x_BTC = self.embed_tokens(tokens_BT, self.dtype)
        added_BTC: Tensor = _Zeros.apply(x_BTC)  # type: ignore[assignment, no-untyped-call]
        for layer in self.layers:
            x_BTC, added_BTC = layer(x_BTC, added_BTC, cos_TD, sin_TD, cu_seqlens)
        assert x_BTC is not None
        x_BTC = x_BTC + added_BTC
        if not self.last:
            return x_BTC
        del added_BTC  # not needed during the loss
        inputs = x_BTC, self.norm.weight, targets_BT, cos_TD.shape[0]
        if self.config.tie_word_embeddings:
            return self.head(self.embed_tokens.weight, *inputs)
        return self.lm_head(self.head, *inputs)

    def init_tables(self) -> None:
        """Fill RoPE's tables, which are not in checkpoints."""
        cos, sin = rope_tables(self.seq_len, self.config.head_dim, self.config.rope_theta, self.cos_TD.device)
        self.cos_TD.copy_(cos)
        self.sin_TD.copy_(sin)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise every parameter and table, in place.

        Norms are one. Matrices and the embedding are truncated normals of sigma `initializer_range`, cut at 3 sigma;
        the two projections that write to the residual stream get sigma / sqrt(2 layers), so that its variance does
        not grow with depth (GPT-2). Each parameter has its own generator, keyed by seed and name, so the weights do not
        depend on the layout or on other parameters.
        """
        self.init_tables()
        device = self.cos_TD.device
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "big") >> 1)
            full = torch.empty(parameter.shape, device=device)
            nn.init.trunc_normal_(full, std=std, a=-3 * std, b=3 * std, generator=generator)
            if isinstance(parameter, DTensor):  # all ranks draw the same and keep their shard; no communication
                mesh, placements = parameter.device_mesh, parameter.placements
                full = distribute_tensor(full, mesh, placements, src_data_rank=None)
            parameter.copy_(full)
