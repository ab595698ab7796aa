"""Cost of checkpoints: `python benchmarks/checkpoint.py --config configs/xihe_120m.toml`.

Saves the complete state of the config (weights, optimizer state) in both modes, then verifies and loads it, in a new
directory that is deleted afterwards. "Blocked" is the time for which training waits. The first async save also
allocates host memory, which later saves reuse. Under torchrun all processes take part. Prints a table, then one line of
JSON; `--json FILE` appends that line to a file.
"""

import argparse
import json
import logging
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.runtime.ranks import Ranks
from torchxihe.config.load import load_config
from torchxihe.config.options import Checkpoint, Config
from torchxihe.errors import UserError
from torchxihe.trainer import Trainer
from torchxihe.utils.device import device_name
from torchxihe.utils.distributed import barrier, is_main, process_group, world_size


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="CONFIG")
    parser.add_argument("--saves", type=int, default=5, help="saves in each mode (default 5)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="parent of the new directory, shared by all nodes")
    parser.add_argument("--json", default="", metavar="FILE", help="append the result to FILE as a line of JSON")
    options, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stdout)
    try:
        config = load_config(options.config, overrides)
        with process_group() as device:
            root = Path(Ranks().on_main(lambda: tempfile.mkdtemp(dir=options.dir)))
            try:
                result = measure(config, device, root, options.saves)
            finally:
                if is_main():
                    shutil.rmtree(root, ignore_errors=True)
    except UserError as error:
        sys.exit(str(error))
    if is_main():
        for key, value in result.items():
            print(f"{key:28} {value:.3f}" if isinstance(value, float) else f"{key:28} {value}")
        print(json.dumps(result))
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def measure(config: Config, device: torch.device, root: Path, saves: int) -> dict[str, Any]:
    """Seconds to save, verify and load a checkpoint of `config`; medians over `saves`."""
    trainer = Trainer(config, device, np.ones(config.model.vocab_size, np.int32))
    state = trainer.state()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_()  # moments start as zeros, which might be written and hashed faster
    train_state = {"stages": [], "config": config.model_dump(mode="json"), "changes": [], "tokenizer": "", "origin": ""}
    blocked: dict[str, list[float]] = {}
    total: dict[str, list[float]] = {}
    for mode in ("sync", "async"):
        checkpointer = Checkpointer(root / mode, Checkpoint(mode=mode, keep_last=2))
        blocked[mode], total[mode] = [], []
        for step in range(saves):
            barrier()
            start = time.perf_counter()
            checkpointer.save(step, state, train_state | {"step": step})
            blocked[mode].append(time.perf_counter() - start)
            checkpointer.wait()
            total[mode].append(time.perf_counter() - start)
        checkpointer.close()
    size = sum(file.stat().st_size for file in (root / "sync" / f"step-{saves - 1:08d}").iterdir())
    checkpointer = Checkpointer(root / "sync", Checkpoint(mode="sync"))
    verify, newest = timed(checkpointer.newest)
    assert newest is not None
    load, _ = timed(lambda: checkpointer.load(newest, state))
    checkpointer.close()
    return {
        "config": config.run.name,
        "device": device_name(device),
        "processes": world_size(),
        "layout": trainer.dims.describe(),
        "bytes_on_disk": size,
        "sync_save_blocked_s": statistics.median(blocked["sync"]),
        "async_first_save_blocked_s": blocked["async"][0],
        "async_save_blocked_s": statistics.median(blocked["async"][1:]),
        "async_share_of_sync": statistics.median(blocked["async"][1:]) / statistics.median(blocked["sync"]),
        "async_commit_s": statistics.median(total["async"][1:]),
        "verify_s": verify,
        "load_s": load,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `action` takes on the slowest rank, and its return value."""
    barrier()
    start = time.perf_counter()
    value = action()
    barrier()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    main()
