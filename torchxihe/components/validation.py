"""Loss on the held-out documents, in whole and by the source that they belong to."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchxihe.data.loader import Batch
from torchxihe.utils.distributed import all_reduce_sum


def target_bytes(targets_BT: Tensor, bytes_per_token_V: Tensor) -> Tensor:
    """UTF-8 bytes that the valid targets stand for, a scalar on their device."""
    valid_BT = targets_BT >= 0
    return (bytes_per_token_V[targets_BT.clamp(min=0)] * valid_BT).sum()


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], bytes_per_token_V: Tensor, names: list[str]
) -> dict[str, float]:
    """Mean cross-entropy a token (nats) and bits per byte over all ranks' batches; ranks have equally many.

    "validation/loss" and "validation/bpb"; with several sources, which `names` names, "validation/<name>/loss" and
    so on for each that has documents held out. A batch's rows are of one source.
    """
    sums_S3 = torch.zeros(len(names), 3, dtype=torch.float64, device=bytes_per_token_V.device)
    for batch in batches:
        loss = model(batch.tokens, batch.targets, batch.docs)
        valid = (batch.targets >= 0).sum()
        size = target_bytes(batch.targets, bytes_per_token_V)
        # A batch of padding alone (-1) adds nothing, wherever.
        sums_S3[max(batch.sources)] += torch.stack([loss.double(), valid.double(), size.double()])
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
