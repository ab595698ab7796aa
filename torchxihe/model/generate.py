"""Sampling text from a decoder, one token at a time, with a key-value cache.

A cache is an attention callable: during generation each layer's attention is replaced by one.
"""

import logging
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchxihe.errors import UserError
from torchxihe.model.decoder import SelfAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on

log = logging.getLogger(__name__)


class Sampling(TypedDict, total=False):
    """How tokens are drawn; what is not given has the default of `draw_tokens`."""

    max_tokens: int
    """Default 200; the text may end before."""
    temperature: float
    """Default 0.8; 0: always the most likely token."""
    top_k: int
    """Draw from this many most likely tokens, default 50; 0: from all."""
    top_p: float
    """Draw from the most likely tokens of this total probability, default 0.95."""
    seed: int
    """The same one gives the same text, default 0."""


class Drawn(NamedTuple):
    """A token that was drawn."""

    token: int
    probability: float
    """That the model gives it after those before it, whatever the temperature and the cuts."""


def check_sampling(options: Sampling) -> None:
    """Raise UserError for a number that is out of its range."""
    if min(options.get("max_tokens", 0), options.get("top_k", 0)) < 0 or not 0 < options.get("top_p", 1.0) <= 1:
        raise UserError("generate: max_tokens and top_k must be 0 or more, top_p in (0, 1]")
    if not options.get("temperature", 0.0) >= 0 or not 0 <= options.get("seed", 0) < 2**63:
        raise UserError("generate: temperature must be 0 or more, and seed, which must also be below 2^63")


class CachedAttention:
    """Causal attention to all keys and values seen so far; the signature of `attention.py`, for a batch of one.

    Axes as there: B batch, T positions of this call, H query heads, K key and value heads, D head dimension; S
    positions seen so far, this call's included.
    """

    def __init__(self, size: int) -> None:
        """Room for `size` positions."""
        self.size, self.seen = size, 0
        self._keys_BSKD, self._values_BSKD = torch.empty(0), torch.empty(0)

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """[B, T, H, D] in q's dtype. The row is one document."""
        if not self.seen:
            shape = (k_BTKD.shape[0], self.size, *k_BTKD.shape[2:])
            self._keys_BSKD, self._values_BSKD = k_BTKD.new_empty(shape), v_BTKD.new_empty(shape)
        new, start = q_BTHD.shape[1], self.seen
        self.seen = end = start + new
        self._keys_BSKD[:, start:end], self._values_BSKD[:, start:end] = k_BTKD, v_BTKD
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, self._keys_BSKD[:, :end], self._values_BSKD[:, :end]))
        # One new position attends to everything; several attend causally to each other and to all before.
        mask_TS = torch.ones(new, end, dtype=torch.bool, device=q.device).tril(start) if new > 1 else None
        out = F.scaled_dot_product_attention(q, k, v, mask_TS, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


@contextmanager
def cached(model: nn.Module, size: int) -> Iterator[list[CachedAttention]]:
    """Inside, the layers of `model` attend through new caches for `size` positions; call it with `positions_T`."""
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    attentions = [layer.attention for layer in layers]
    caches = [CachedAttention(size) for _ in layers]
    try:
        for layer, cache in zip(layers, caches, strict=True):
            layer.attention = cache
        yield caches
    finally:
        for layer, attention in zip(layers, attentions, strict=True):
            layer.attention = attention


def window_start(length: int, context: int) -> int:
    """The first of `length` tokens that the model still sees.

    When the context is full its oldest quarter is dropped at once: dropping token by token would shift every position
    each time and invalidate the cache.
    """
    stride = max(1, context // 4)
    return max(0, -(-(length - context) // stride) * stride)


def sample(logits_V: Tensor, generator: torch.Generator, temperature: float, top_k: int, top_p: float) -> int:
    """Draw a token from one position's logits. temperature 0: the most likely; top_k 0 and top_p 1: no cut."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = (logits_V.double() - logits_V.max()) / temperature  # at most 0, however small the temperature
    if top_k:
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(min(top_k, len(logits_V))).values[-1], -torch.inf)
    p, index = logits_V.softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the first token beyond the mass, and all after it
    return int(index[torch.multinomial(p, 1, generator=generator)])


def draw_tokens(
    model: nn.Module,
    prompt: list[int],
    *,
    context: int,
    vocab_size: int,
    stop_id: int,
    max_tokens: int = 200,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
) -> Generator[Drawn, None, None]:
    """Yield up to `max_tokens` tokens that continue `prompt` (not empty), without the `stop_id` that ends it.

    `model` is a Decoder, wrapped or not, that sees at most the last `context` tokens (`window_start`); ids from
    `vocab_size` on are padding and never drawn. Logits that are not finite end it with a warning. Under FSDP2 all ranks
    must call this together; the same seed draws the same tokens. The model must not be
    used otherwise until the iterator is exhausted or closed.
    """
    tokens = list(prompt)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with cached(model, context) as caches:
        first = seen = 0  # of `tokens`, the caches hold those from `first` up to `seen`
        for _ in range(max_tokens):
            if window_start(len(tokens), context) != first:
                first = seen = window_start(len(tokens), context)
                for cache in caches:
                    cache.seen = 0
            # Eager, because each length would be compiled anew. no_grad ends at each yield.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                new_T = torch.tensor([tokens[seen:]], device=device)
                positions_T = torch.arange(seen - first, len(tokens) - first, device=device)
                logits_BTV = model(new_T, positions_T=positions_T)
            seen = len(tokens)
            logits_V = logits_BTV[0, -1, :vocab_size].cpu()
            if not logits_V.isfinite().all():
                log.warning("the model's logits are not finite (it has diverged); nothing to sample")
                return
            token = sample(logits_V, generator, temperature, top_k, top_p)
            if token == stop_id:
                return
            tokens.append(token)
            yield Drawn(token, float(logits_V.double().softmax(-1)[token]))


def generate(
    model: nn.Module, prompt: list[int], *, context: int, vocab_size: int, stop_id: int, **options: "Unpack[Sampling]"
) -> Iterator[int]:
    """The ids of `draw_tokens`."""
    # Closed with this one: that restores the model.
    with closing(
        draw_tokens(model, prompt, context=context, vocab_size=vocab_size, stop_id=stop_id, **options)
    ) as drawn:
        for token, _ in drawn:
            yield token
