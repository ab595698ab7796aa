"""Memory: a model that cannot fit is refused, and the largest micro-batch that fits is found by trial steps."""

import gc
import logging
import math
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from torchxihe.config.checks import micro_batch_limit
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.model.flops import parameter_counts
from torchxihe.utils.device import host_memory_bytes
from torchxihe.utils.distributed import all_gather_object
from torchxihe.utils.words import BYTES, scaled

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.92  # of the free memory; the rest is for fragmentation and workspaces

Trial = Callable[[Config, torch.device], object]
"""Builds what a step needs, takes one step, and keeps nothing."""


def check_memory(config: Config, device: torch.device, shards: int, data_ranks: int, ranks: int) -> None:
    """Raise UserError if the run cannot fit in the memory of `device`; called before anything is allocated.

    A lower bound: weights, gradients and optimizer state (float32, of Muon the momentum alone), divided by `shards`,
    and one activation of the embedding, divided by the `ranks` that read the same rows. It never refuses what fits.
    """
    training, model, seq_len = config.training, config.model, config.data.seq_len
    moments = (2 if config.optimizer.name == "adamw" else 1) * (4 if config.optimizer.state_dtype == "float32" else 2)
    state = parameter_counts(model)[0] * (4 + 4 + moments) // shards
    rows = min(training.micro_batch_size or 1, -(-training.global_batch_size // data_ranks))
    activation = rows * seq_len * model.hidden_size * (2 if training.dtype == "bfloat16" else 4)
    needed = state + activation * data_ranks // ranks
    if device.type == "cuda":
        available, where = torch.cuda.get_device_properties(device).total_memory, "GPU has"
    else:
        available, where = host_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "process has here"
    if needed > available:
        what = f"{scaled(state, BYTES)} for weights, gradients and optimizer"
        raise UserError(
            f"model: a process needs at least {scaled(needed, BYTES)} ({what}), more than the "
            f"{scaled(available, BYTES)} that a {where}; make it smaller, or use more GPUs"
        )


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
