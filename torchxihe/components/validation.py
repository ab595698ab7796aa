"""Loss on the held-out documents."""

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
def validate(model: nn.Module, batches: Iterable[Batch], bytes_per_token_V: Tensor) -> dict[str, float]:
    """Mean cross-entropy a token (nats) and bits per byte over all ranks' batches; ranks have equally many."""
    sums = torch.zeros(3, dtype=torch.float64, device=bytes_per_token_V.device)
    for batch in batches:
        loss = model(batch.tokens, batch.targets, batch.docs)
        valid = (batch.targets >= 0).sum()
        sums += torch.stack([loss.double(), valid.double(), target_bytes(batch.targets, bytes_per_token_V).double()])
    loss, tokens, size = all_reduce_sum(sums).tolist()
    return {"validation/loss": loss / max(tokens, 1), "validation/bpb": loss / math.log(2) / max(size, 1)}
