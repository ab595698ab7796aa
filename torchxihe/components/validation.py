"""Loss on the held-out documents, in whole and by the source that they belong to."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchxihe.data.loader import Batch
from torchxihe.utils.distributed import all_reduce_sum


def sums_by_source(losses_B: Tensor, batch: Batch, bytes_per_token_V: Tensor, sources: int) -> Tensor:
    """What a batch adds to each source's loss (nats), valid targets and the UTF-8 bytes that those stand for.

    losses: summed over each row's targets. Returns float64 [sources, 3] on the device, without waiting for it.
    """
    valid_BT = batch.targets >= 0
    bytes_B = (bytes_per_token_V[batch.targets.clamp(min=0)] * valid_BT).sum(1)
    sums_B3 = torch.stack([losses_B.double(), valid_BT.sum(1).double(), bytes_B.double()], dim=1)
    return sums_B3.new_zeros(sources, 3).index_add_(0, batch.sources, sums_B3)


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], bytes_per_token_V: Tensor, names: list[str]
) -> dict[str, float]:
    """Mean cross-entropy a token (nats) and bits per byte over all ranks' batches; ranks have equally many.

    "validation/loss" and "validation/bpb"; with several sources, which `names` names, "validation/<name>/loss" and
    so on for each that has documents held out.
    """
    sums_S3 = torch.zeros(len(names), 3, dtype=torch.float64, device=bytes_per_token_V.device)
    for batch in batches:
        _, losses_B = model(batch.tokens, batch.targets, batch.docs)
        sums_S3 += sums_by_source(losses_B, batch, bytes_per_token_V, len(names))
    by_source = all_reduce_sum(sums_S3).tolist()
    result = _means("validation", [sum(column) for column in zip(*by_source, strict=True)])
    for name, sums in zip(names, by_source, strict=True):
        if len(names) > 1 and sums[1]:
            result |= _means(f"validation/{name}", sums)
    return result


def _means(name: str, sums: list[float]) -> dict[str, float]:
    """Loss and bits per byte of summed loss, tokens and bytes."""
    loss, tokens, size = sums
    return {f"{name}/loss": loss / max(tokens, 1), f"{name}/bpb": loss / math.log(2) / max(size, 1)}
