"""Loss on the held-out documents, in whole and by the source or validation set that they belong to."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchxihe.components.metrics import sums_by_source
from torchxihe.data.loader import Batch
from torchxihe.data.store import Prepared
from torchxihe.utils.distributed import all_reduce_sum


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], bytes_per_token_V: Tensor, prepared: Prepared
) -> dict[str, float]:
    """Mean cross-entropy a token (nats), perplexity, bits per byte over all ranks' batches; ranks have equally many.

    "validation/loss", "validation/perplexity" and "validation/bpb" are of what the sources hold out (where they hold
    out nothing, of the validation sets together). "validation/<name>/loss" and so on follow for each set and, if there
    are several, for each source that has documents held out.
    """
    count = len(prepared.held_out)
    sums_S3 = torch.zeros(count, 3, dtype=torch.float64, device=bytes_per_token_V.device)
    for batch in batches:
        _, losses_B = model(batch.tokens, batch.targets, batch.docs)
        sums_S3 += sums_by_source(losses_B, batch, bytes_per_token_V, count)
    sums_S3 = all_reduce_sum(sums_S3).cpu()
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
