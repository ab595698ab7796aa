"""What a training process of a network namespace records for the tests; its `sitecustomize.py` calls `observe`."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from tests.faults.harness import _keep_ledger
from torchxihe.trainer import Trainer


def observe(folder: Path) -> None:
    """Keep a ledger and a line for every step; slow steps down to 0.4 s as long as there is a file `slow`."""
    name = f"{socket.gethostname()}-{os.getpid()}"
    _keep_ledger(folder / f"ledger-{name}.jsonl")
    kept = Trainer.train_step

    def step(self: Any, loader: Any) -> None:
        kept(self, loader)
        line = {"time": time.time(), "step": self.step, "host": socket.gethostname(), "pid": os.getpid()}
        line["world"] = int(os.environ["WORLD_SIZE"])
        with (folder / f"steps-{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if (folder / "slow").exists():
            time.sleep(0.4)

    Trainer.train_step = step  # type: ignore[method-assign]
