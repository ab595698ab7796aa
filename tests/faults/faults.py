"""What can go wrong, at a chosen place of a chosen rank."""

import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from torchxihe.components.runtime import stop

Where = Literal[
    "step",  # before optimizer step `number`
    "mid-step",  # after its backward pass
    "loss",  # its forward pass; `what` multiplies the loss
    "sample",  # before the sample after optimizer step `number`
    "write",  # the `number`-th file that this rank opens for a checkpoint
    "manifest",  # the `number`-th time a manifest is about to be written: uploaded, not committed
    "rename",  # the `number`-th time a finished draft is about to get its name
    "delete",  # the `number`-th step directory that loses its manifest: half-deleted
]


@dataclass(frozen=True)
class Fault:
    """`what` happens on `rank` (-1: all) at the `number`-th time (from 1) that it comes to `where`."""

    where: Where
    number: int
    what: Literal["kill", "sleep", "SIGTERM", "slow", "EIO", "nan", "spike"]
    """"slow": SIGTERM, and then nothing for longer than the watchdog's limit, which is shorter than usual."""
    rank: int = 0
    for_ever: bool = False
    """Losses only: at every later step too."""

    def arm(self, rank: int) -> None:
        """Arrange for it in this process."""
        if self.rank in (-1, rank):
            _ARM[self.where](self)
        if self.what == "slow":
            stop.AGREEMENT_TIMEOUT = 1.0

    def happen(self) -> None:
        """Do it."""
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "sleep":
            time.sleep(3600)
        elif self.what == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.what == "slow":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        elif self.what == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        else:
            raise AssertionError(self)


def _arm_step(fault: Fault) -> None:
    from torchxihe.trainer import Trainer

    train_step = Trainer.train_step

    def step(self: Any, loader: Any) -> None:
        due = self.step + 1 == fault.number or (fault.for_ever and self.step + 1 > fault.number)
        if due and fault.where == "step":
            fault.happen()
        handle = None
        if due and fault.where == "loss":
            factor = torch.nan if fault.what == "nan" else 1e4
            stages = [*self.module] if isinstance(self.module, torch.nn.ModuleList) else [self.module]
            handle = stages[-1].register_forward_hook(lambda module, args, losses: (losses[0] * factor, losses[1]))
        if due and fault.where == "mid-step":
            judge = self.bad_steps.judge

            def judge_and_fail(*args: Any) -> Any:
                fault.happen()
                return judge(*args)

            self.bad_steps.judge = judge_and_fail
        train_step(self, loader)
        if handle is not None:
            handle.remove()

    Trainer.train_step = step  # type: ignore[method-assign]


def _arm_sample(fault: Fault) -> None:
    from torchxihe.trainer import Trainer

    original = Trainer.sample

    def sample(self: Any, prepared: Any) -> str:
        if self.step == fault.number:
            fault.happen()
        return original(self, prepared)

    Trainer.sample = sample  # type: ignore[method-assign]


def _arm_write(fault: Fault) -> None:
    from torchxihe.components.checkpoint.storage import Location

    create, opened = Location.create, 0

    @contextmanager
    def create_counted(self: Location) -> Any:
        nonlocal opened
        opened += 1
        due = opened == fault.number
        with create(self) as file:
            if due:
                file.write(b"the first bytes")
                file._raw.flush()
                fault.happen()
            yield file

    Location.create = create_counted  # type: ignore[method-assign]


def _arm_manifest(fault: Fault) -> None:
    from torchxihe.components.checkpoint import checkpointer as checkpoint

    write, calls = checkpoint.write_manifest, 0

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fault.number:
            fault.happen()
        write(*args)

    checkpoint.write_manifest = counted


def _arm_rename(fault: Fault) -> None:
    from torchxihe.components.checkpoint.checkpointer import Location

    rename, calls = Location.rename, 0

    def counted(self: Location, to: Location) -> None:
        nonlocal calls
        calls += self.name.startswith("step-")
        if calls == fault.number and self.name.startswith("step-"):
            fault.happen()
        rename(self, to)

    Location.rename = counted  # type: ignore[method-assign]


def _arm_delete(fault: Fault) -> None:
    from torchxihe.components.checkpoint.storage import Location

    remove, calls = Location.remove, 0

    def counted(self: Location) -> None:
        nonlocal calls
        remove(self)
        if self.name == "MANIFEST.json":
            calls += 1
            if calls == fault.number:
                fault.happen()

    Location.remove = counted  # type: ignore[method-assign]


_ARM: dict[str, Callable[[Fault], None]] = {
    "step": _arm_step,
    "mid-step": _arm_step,
    "loss": _arm_step,
    "sample": _arm_sample,
    "write": _arm_write,
    "manifest": _arm_manifest,
    "rename": _arm_rename,
    "delete": _arm_delete,
}
