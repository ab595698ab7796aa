"""Validation loss of variants of a config, by step.

    python benchmarks/convergence.py CONFIG --variant="adamw:" --variant="muon: --optimizer.name=muon"

Trains each variant from the same seed on the same data and validates every `--every` steps. A variant is a name and
overrides; overrides outside of variants apply to all. The target loss is `--target`, or the final loss of the first
variant; the number of steps to reach it is interpolated between validations. The data must be prepared. Under torchrun,
all processes train. `--reference NAME` computes that variant with the reference implementations of all kernels, without
compilation. `--json FILE` appends a line for each variant, with the loss of every step.
"""

import argparse
import itertools
import json
import logging
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.loader import Loader
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.store import open_prepared
from torchxihe.errors import UserError
from torchxihe.kernels.select import REFERENCE, Kernels
from torchxihe.trainer import Trainer
from torchxihe.utils.device import device_name
from torchxihe.utils.distributed import is_main, process_group, world_size

SLOW = ["--training.compile=false"]


def main() -> None:
    """Parse the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--variant", action="append", required=True, metavar='"NAME: --section.key=value ..."')
    parser.add_argument("--every", type=int, default=25, help="steps between validations (default 25)")
    parser.add_argument(
        "--target", type=float, default=0.0, help="validation loss to reach (default: the first variant's final one)"
    )
    parser.add_argument(
        "--reference", default="", metavar="NAME", help="the variant to compute with the reference kernels"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="append the results to FILE, a line of JSON each")
    options, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stdout)
    results: list[dict[str, Any]] = []
    try:
        variants = [variant.partition(":")[::2] for variant in options.variant]
        if options.reference and options.reference not in dict(variants):
            raise UserError(f"--reference: no variant {options.reference!r}; use one of {', '.join(dict(variants))}")
        configs = {
            name: load_config(options.config, overrides + flags.split() + (SLOW if name == options.reference else []))
            for name, flags in variants
        }
        with process_group() as device:
            for name, config in configs.items():
                kernels = REFERENCE if name == options.reference else None
                results.append({"variant": name} | train(config, device, options.every, kernels))
                if not is_main():
                    continue
                print_row(results[-1], options.target or results[0]["validation"][-1][1], header=len(results) == 1)
                if options.json:
                    with Path(options.json).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(results[-1]) + "\n")
    except UserError as error:
        sys.exit(str(error))


def train(config: Config, device: torch.device, every: int, kernels: Kernels | None) -> dict[str, Any]:
    """Train `config` to its last step; training loss of every step, [step, validation loss] of every `every`-th.

    kernels: those of the model; None: chosen by `config`.
    """
    prepared = open_prepared(config)
    trainer = Trainer(config, device, prepared.bytes_per_token, kernels=kernels)
    order = Order(plan_stages(config, prepared), prepared.rows)
    loader = Loader(prepared, order, trainer.batch_spec)
    losses, validation, seconds = [], [], 0.0
    while trainer.step < config.total_steps:
        start = time.perf_counter()
        trainer.train_step(loader)
        losses.append(trainer.sums.read()["loss"])  # waits for the device
        seconds += time.perf_counter() - start
        if trainer.step % every == 0 or trainer.step == config.total_steps:
            validation.append([trainer.step, trainer.validate(prepared)["validation/loss"]])
    loader.close()
    return {
        "config": config.run.name,
        "optimizer": config.optimizer.model_dump(),
        "lr_scheduler": config.lr_scheduler.model_dump(),
        "tokens_per_step": config.tokens_per_step,
        "device": f"{world_size()} × {device_name(device)}",
        "seconds": round(seconds, 1),
        "losses": [round(loss, 5) for loss in losses],
        "validation": [[step, round(loss, 5)] for step, loss in validation],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def steps_to(validation: list[list[float]], target: float) -> float:
    """The first step, interpolated between validations, at which the loss is `target`; infinity if there is none."""
    if validation[0][1] <= target:
        return validation[0][0]
    for (step, loss), (next_step, next_loss) in itertools.pairwise(validation):
        if next_loss <= target < loss:
            return step + (next_step - step) * (loss - target) / (loss - next_loss)
    return float("inf")


def print_row(result: dict[str, Any], target: float, *, header: bool) -> None:
    """Print one variant as a row of a table."""
    if header:
        reach = f"to {target:.4f}"
        print(f"{'variant':20} {'steps':>6} {'tokens':>12} {'train':>8} {'valid':>8} {reach:>11} {'s/step':>8}")
    steps, last = len(result["losses"]), result["losses"][-20:]
    reached = steps_to(result["validation"], target)
    print(
        f"{result['variant']:20} {steps:6,} {steps * result['tokens_per_step']:12,} {sum(last) / len(last):8.4f} "
        f"{result['validation'][-1][1]:8.4f} {'never' if reached == float('inf') else format(reached, ',.0f'):>11} "
        f"{result['seconds'] / steps:8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
