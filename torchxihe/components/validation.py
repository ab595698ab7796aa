"""Loss on the held-out documents, in whole and by the source or validation set that they belong to."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchxihe.components.observe import sums_by_source
from torchxihe.data.loader import Batch
from torchxihe.data.store import Prepared


@torch.no_grad()
def validation_sums(model: nn.Module, batches: Iterable[Batch], bytes_per_token_V: Tensor, sets: int) -> Tensor:
    """This rank's sums of loss (nats), tokens and bytes of each of `sets` sets of documents: float64 [sets, 3].

    Ranks have equally many batches.
    """
    sums_S3 = torch.zeros(sets, 3, dtype=torch.float64, device=bytes_per_token_V.device)
    for batch in batches:
        _, losses_B = model(batch.tokens, batch.targets, batch.cu_seqlens)
        sums_S3 += sums_by_source(losses_B, batch, bytes_per_token_V, sets)
    return sums_S3


def validation_metrics(sums_S3: Tensor, prepared: Prepared) -> dict[str, float]:
    """Mean cross-entropy per token (nats), perplexity and bits per byte from the sums over all ranks.

    "validation/loss", "validation/perplexity" and "validation/bpb" are of what the sources hold out (where they hold
    out nothing, of the validation sets together). "validation/<name>/loss" and so on follow for each set and, if there
    are several, for each source that has documents held out.
    """
    sums_S3 = sums_S3.cpu()
    sources = len(prepared.sources)
    of_sources = sums_S3[:sources].sum(0)
    result = _means("validation", of_sources if of_sources[1] else sums_S3.sum(0))
    for i, (documents, sums) in enumerate(zip(prepared.held_out, sums_S3, strict=True)):
        if sums[1] and (i >= sources or sources > 1):
            result |= _means(f"validation/{documents.name}", sums)
    return result


def _means(name: str, sums: Tensor) -> dict[str, float]:
    """Loss, perplexity and bits per byte of summed loss, tokens and bytes."""
    loss, tokens, size = sums.tolist()
    mean = loss / max(tokens, 1)
    perplexity = math.exp(min(mean, 700))  # beyond, a float64 would overflow
    return {f"{name}/loss": mean, f"{name}/perplexity": perplexity, f"{name}/bpb": loss / math.log(2) / max(size, 1)}
