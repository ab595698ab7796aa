"""Speed of a training step: `python benchmarks/throughput.py --config configs/xihe_120m.toml`.

Calls `Trainer.train_step` on synthetic rows (three documents per row if documents are masked) or, with `--data real`,
on prepared data. Under torchrun it measures all processes. Config options can be overridden
(`--training.micro_batch_size=32`). A step is the config's global batch, with gradient accumulation as in training.
Prints a table, then one line of JSON; `--json FILE` appends that line to a file. "kernels" of the start are those that
compile themselves at their first call, and autotuning.
"""

import time

STARTED = time.perf_counter()  # before torch is imported: the time to the first step includes the import

import argparse
import itertools
import json
import logging
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import compile_seconds, exposed_share, timed

from torchxihe.components.runtime.micro_batch import fit_micro_batch
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch, Loader, random_batch
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.store import open_prepared
from torchxihe.errors import UserError
from torchxihe.model.flops import palm_flops_per_token, parameter_counts, training_flops
from torchxihe.parallelisms.dims import build_dims
from torchxihe.trainer import Trainer, trial_step
from torchxihe.utils.device import device_name, memory_gib, peak_flops
from torchxihe.utils.distributed import all_gather_object, barrier, is_main, process_group, world_size

DOCUMENTS_A_ROW = 3


def main() -> None:
    """Parse the command line, measure, print."""
    imported = time.perf_counter() - STARTED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="CONFIG")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps (default 20)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps before them (default 5)")
    parser.add_argument("--data", choices=["synthetic", "real"], default="synthetic")
    parser.add_argument("--json", default="", metavar="FILE", help="append the result to FILE as a line of JSON")
    options, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stdout)
    try:
        config = load_config(options.config, [*overrides, "--training.batch_ramp=[]"])
        with process_group() as device:
            config = fit_micro_batch(config, device, trial_step, build_dims(config.parallelism).size("data"))
            result = measure(config, device, steps=options.steps, warmup=options.warmup, data=options.data)
            result["start_seconds"] = {"imports": round(imported, 1)} | result["start_seconds"]
    except UserError as error:
        sys.exit(str(error))
    if is_main():
        print_table(result)
        print(json.dumps(result))
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def measure(config: Config, device: torch.device, *, steps: int, warmup: int, data: str) -> dict[str, Any]:
    """Train `warmup + steps` steps of `config`; the figures of the last `steps`."""
    if data == "real":
        prepared = open_prepared(config)
        trainer = Trainer(config, device, prepared.bytes_per_token)
        order = Order(plan_stages(config, prepared), prepared.rows)
        loader: Iterator[Batch] = Loader(prepared, order, trainer.batch_spec)
    else:
        trainer = Trainer(config, device, np.full(config.model.vocab_size, 4, np.int32))
        batch = random_batch(trainer.batch_spec, config.model.vocab_size, DOCUMENTS_A_ROW)
        loader = itertools.repeat(batch)  # already on the device
    step = partial(trainer.train_step, loader)
    first_step = timed(step, 1, device)[0]
    to_first_step = time.perf_counter() - STARTED
    compiling = compile_seconds()
    timed(step, max(warmup - 1, 0), device)
    barrier()
    if isinstance(loader, Loader):
        loader.read_counts()
    seconds = timed(step, steps, device)
    loss = trainer.sums.read()["loss"]
    real = isinstance(loader, Loader)
    pairs = loader.read_counts()[2] // steps if real else next(loader).pairs * trainer.accumulation
    alone = exposed_share(step, 3, device) if world_size() > 1 else None  # last: more steps, another loss
    if real:
        loader.close()
    median = float(np.median(seconds))
    per_gpu = config.tokens_per_step / median / world_size()
    tokens, sharing = config.tokens_per_step // world_size(), world_size() // trainer.dims.size("data")
    peak, palm_flops = peak_flops(device), palm_flops_per_token(config.model, config.data.seq_len)
    memory = [max(values) for values in zip(*all_gather_object(memory_gib(device)), strict=True)]
    return {
        "config": config.run.name,
        "device": f"{world_size()} × {device_name(device)}",
        "layout": trainer.dims.describe(),
        "parameters": parameter_counts(config.model)[0],
        "seq_len": config.data.seq_len,
        "micro_batch_size": trainer.micro_batch_size,
        "accumulation": trainer.accumulation,
        "documents": config.data.document_mask,
        "data": data,
        "dtype": config.training.dtype,
        "tokens_per_second_per_gpu": round(per_gpu),
        "mfu": round(training_flops(config.model, tokens, pairs // sharing) / median / peak, 4) if peak else None,
        "mfu_palm": round(per_gpu * palm_flops / peak, 4) if peak else None,
        "memory_allocated_gib": round(memory[0], 2),
        "memory_reserved_gib": round(memory[1], 2),
        "step_ms": round(1e3 * median, 2),
        "step_ms_p10": round(1e3 * float(np.quantile(seconds, 0.1)), 2),
        "step_ms_p90": round(1e3 * float(np.quantile(seconds, 0.9)), 2),
        "exposed_communication": None if alone is None else round(alone, 4),
        "seconds_to_first_step": round(to_first_step, 1),
        "start_seconds": {
            **{part: round(seconds, 1) for part, seconds in compiling.items()},
            "kernels": round(max(first_step - sum(compiling.values()) - median, 0.0), 1),
        },
        "loss": round(loss, 4),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def print_table(result: dict[str, Any]) -> None:
    """Print the result as a table."""

    def percent(value: float | None) -> str:
        return "unknown device" if value is None else f"{100 * value:.1f} %"

    rows = [
        ("config", f"{result['config']}: {result['parameters'] / 1e6:.1f} M parameters, {result['dtype']}"),
        ("device", f"{result['device']}, {result['layout']}, torch {result['versions']['torch']}"),
        (
            "step",
            f"{result['accumulation']} × {result['micro_batch_size']} rows of {result['seq_len']} per GPU, "
            f"documents {'masked' if result['documents'] else 'off'}, {result['data']} data",
        ),
        ("tokens/s/GPU", f"{result['tokens_per_second_per_gpu']:,}"),
        ("MFU", f"{percent(result['mfu'])} (PaLM's convention, attention unmasked: {percent(result['mfu_palm'])})"),
        ("step time", f"{result['step_ms']} ms median, {result['step_ms_p10']} p10, {result['step_ms_p90']} p90"),
        (
            "memory",
            f"{result['memory_allocated_gib']} GiB allocated, {result['memory_reserved_gib']} reserved"
            if result["memory_reserved_gib"]
            else "not measured on a CPU",
        ),
        (
            "start",
            f"{result['seconds_to_first_step']} s to the first step: "
            + ", ".join(f"{part} {seconds}" for part, seconds in result["start_seconds"].items())
            + "; the rest is data, device and model",
        ),
        ("communication", f"{percent(result['exposed_communication'])} of a step alone on rank 0's GPU"),
        ("loss", f"{result['loss']}"),
    ]
    for name, value in rows:
        if name == "communication" and result["exposed_communication"] is None:
            continue  # one process, or no GPU
        print(f"{name:13} {value}")


if __name__ == "__main__":
    main()
