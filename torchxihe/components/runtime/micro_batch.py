"""The largest micro-batch that fits into memory, found by trial steps."""

import gc
import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from torchxihe.config.checks import micro_batch_limit
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.utils.distributed import all_gather_object

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.92  # of the free memory; the rest is for fragmentation and workspaces

Trial = Callable[[Config, torch.device], object]
"""Builds what a step needs, takes one step, and keeps nothing."""


def fit_micro_batch(config: Config, device: torch.device, trial: Trial, data_ranks: int) -> Config:
    """`config` with the largest micro-batch that fits if `training.micro_batch_size` is 0.

    `data_ranks`: ranks that read different rows. Up to three trials: of one row, of two, and of as many as these two
    predict, which are too few, because the loss's chunks stop growing. Memory is linear in the rows; all ranks use the
    smallest result. Raises UserError.
    """
    if config.training.micro_batch_size:
        return config
    if device.type != "cuda":
        raise UserError("training.micro_batch_size: 0 searches for what fits on a GPU; on a CPU give a number")
    most = min(-(-config.training.global_batch_size // data_ranks), micro_batch_limit(config, data_ranks))
    peaks = {1: peak_memory(config, device, trial, 1, data_ranks)}
    if most > 1 and peaks[1] < math.inf:
        peaks[2] = peak_memory(config, device, trial, 2, data_ranks)
    limit = MEMORY_SHARE * min(all_gather_object(torch.cuda.mem_get_info(device)[0]))
    if peaks[1] > limit:
        why = f"a step of one row does not fit in the {limit / 2**30:.1f} GiB available"
        raise UserError(f"training.micro_batch_size: {why}; see parallelism.activation_checkpointing, or more GPUs")
    promised = rows_that_fit(peaks, limit, most)
    if promised > 2:
        peaks[promised] = peak_memory(config, device, trial, promised, data_ranks)
    rows = rows_that_fit(peaks, limit, most)
    log.info("micro-batch: %d rows fit in %.1f GiB (training.micro_batch_size)", rows, limit / 2**30)
    return _changed(config, micro_batch_size=rows)


def rows_that_fit(peaks: dict[int, float], limit: float, most: int) -> int:
    """The largest micro-batch, 1 to `most`, under `limit` bytes on the line through the two largest of `peaks` (bytes
    by rows; infinite: out of memory)."""
    most = min([most, *(rows - 1 for rows, peak in peaks.items() if peak == math.inf)])
    measured = sorted(rows for rows, peak in peaks.items() if peak < math.inf)
    if most == 1 or len(measured) < 2:
        return 1
    a, b = measured[-2:]
    slope = max((peaks[b] - peaks[a]) / (b - a), 1.0)
    return int(min(max(b + (limit - peaks[b]) // slope, 1), most))


def peak_memory(config: Config, device: torch.device, trial: Trial, rows: int, data_ranks: int) -> float:
    """Peak bytes allocated, by any rank, in a step of two micro-batches (as many as a pipeline has stages) of `rows`
    rows, with model and optimizer.

    Infinite if a single process runs out of memory. Several cannot continue then: some may wait in a collective.
    """
    torch.cuda.reset_peak_memory_stats(device)
    try:
        batch = max(2, config.parallelism.pp) * rows * data_ranks
        trial(_changed(config, micro_batch_size=rows, global_batch_size=batch, batch_ramp=()), device)
        peak = float(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        if dist.is_initialized():
            raise
        peak = math.inf
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return max(all_gather_object(peak))


def _changed(config: Config, **training: object) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})
