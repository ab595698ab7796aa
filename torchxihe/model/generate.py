"""Sampling text from a decoder, one token at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def sample(logits_V: Tensor, generator: torch.Generator, temperature: float, top_k: int, top_p: float) -> int:
    """Draw a token from one position's logits. temperature 0: the most likely; top_k 0 and top_p 1: no cut."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.float() / temperature
    if top_k:
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(min(top_k, len(logits_V))).values[-1], -torch.inf)
    p, index = logits_V.softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the first token beyond the mass, and all after it
    return int(index[torch.multinomial(p, 1, generator=generator)])


def generate(
    model: nn.Module,
    prompt: list[int],
    *,
    max_tokens: int,
    context: int,
    vocab_size: int,
    stop_id: int,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids that continue `prompt` (not empty), without the `stop_id` that ends it.

    The model sees the last `context` tokens; ids from `vocab_size` on are padding and never drawn. Under FSDP2 all
    ranks must call this together; the same seed draws the same tokens.
    """
    tokens = list(prompt)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        # Every length is a new shape: a compiled model would compile each. no_grad ends at each yield.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits_BTV = model(torch.tensor([tokens[-context:]], device=device))
        token = sample(logits_BTV[0, -1, :vocab_size].cpu(), generator, temperature, top_k, top_p)
        if token == stop_id:
            return
        tokens.append(token)
        yield token
