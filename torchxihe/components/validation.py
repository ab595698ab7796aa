"""Loss on held-out documents: of all sources, by source and by validation set; which of them decides what is best."""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchxihe.components.observe import sums_by_source
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch
from torchxihe.data.store import Prepared
from torchxihe.utils.words import counted

FEW_ROWS = 32
"""Below this, the validation loss of one checkpoint differs from another's mostly by which rows were held out."""

log = logging.getLogger(__name__)


@torch.no_grad()
def validation_sums(model: nn.Module, batches: Iterable[Batch], bytes_per_token_V: Tensor, sets: int) -> Tensor:
    """This rank's sums of loss (nats), tokens and bytes of each of `sets` sets of documents: float64 [sets, 3].

    Every rank must have the same number of batches.
    """
    sums_S3 = torch.zeros(sets, 3, dtype=torch.float64, device=bytes_per_token_V.device)
    for batch in batches:
        _, losses_B = model(batch.tokens, batch.targets, batch.cu_seqlens, batch.positions)
        if losses_B is not None:  # a pipeline's last stage has them
            sums_S3 += sums_by_source(losses_B, batch, bytes_per_token_V, sets)
    return sums_S3


def validation_metrics(sums_S3: Tensor, prepared: Prepared) -> dict[str, float]:
    """Mean cross-entropy (nats/token), perplexity and bits per byte from the sums over all ranks.

    "validation/loss", "validation/perplexity" and "validation/bpb" are of the documents held out of the sources (where
    none are, of the validation sets together). "validation/<name>/loss" and so on follow for each set and, if there are
    several, for each source that has held-out documents.
    """
    sums_S3 = sums_S3.cpu()
    sources = len(prepared.sources)
    of_sources = sums_S3[:sources].sum(0)
    result = _means("validation", of_sources if of_sources[1] else sums_S3.sum(0))
    for i, (documents, sums) in enumerate(zip(prepared.held_out, sums_S3, strict=True)):
        if sums[1] and (i >= sources or sources > 1):
            result |= _means(f"validation/{documents.name}", sums)
    return result


def warn_of_few_rows(config: Config, prepared: Prepared) -> None:
    """Log a warning if so few rows decide which checkpoint is the best that the loss on them is mostly noise."""
    if not 0 < config.validation.every <= config.total_steps:
        return
    best_by = config.checkpoint.best_by
    chosen = prepared.sources if best_by == "sources" else [s for s in prepared.sets if s.name == best_by]
    what = "the sources" if best_by == "sources" else best_by
    rows = sum(documents.valid_rows for documents in chosen)
    if not rows and best_by == "sources":
        rows, what = sum(documents.valid_rows for documents in prepared.sets), "the validation sets"
    if rows < FEW_ROWS:
        remedy = "raise validation.fraction, or name a larger validation set in checkpoint.best_by"
        held_out = f"only {counted(rows, 'row')} of {what} {'is' if rows == 1 else 'are'} held out"
        log.warning(
            "%s: %s is noisy, and decides which checkpoint is the best; %s",
            held_out,
            config.checkpoint.best_metric,
            remedy,
        )


def _means(name: str, sums: Tensor) -> dict[str, float]:
    """Loss, perplexity and bits per byte of summed loss, tokens and bytes."""
    loss, tokens, size = sums.tolist()
    mean = loss / max(tokens, 1)
    perplexity = math.exp(min(mean, 700))  # beyond, a float64 would overflow
    return {f"{name}/loss": mean, f"{name}/perplexity": perplexity, f"{name}/bpb": loss / math.log(2) / max(size, 1)}
