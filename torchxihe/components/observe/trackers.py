"""TensorBoard and Weights & Biases beside `metrics.jsonl`: rank 0 alone, and whatever happens to them stays theirs."""

import importlib.util
import logging
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchxihe.config.options import Config
from torchxihe.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """Somebody to tell of metrics."""

    name: str
    write: Callable[[int, dict[str, float]], None]
    """Step and finite values."""
    close: Callable[[], None]


class Trackers:
    """Those that a config asks for. One that fails is dropped with a warning: no run ends because of its curves."""

    def __init__(self, config: Config, step: int) -> None:
        """`step`: the one that training goes on from."""
        open_tracker = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
        self._live: list[Tracker] = []
        for module in wanted_trackers(config):
            try:
                self._live.append(open_tracker[module](config, step))
            except Exception as error:  # theirs to raise whatever they like, ours to go on
                log.warning("metrics.%s: cannot be started, so this run goes without: %s", module, _line(error))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Tell all of them."""
        for tracker in list(self._live):
            try:
                tracker.write(step, metrics)
            except Exception as error:  # as above
                self._live.remove(tracker)
                log.warning("metrics.%s: fails, so this run goes on without: %s", tracker.name, _line(error))

    def close(self) -> None:
        """Have them write what they still hold."""
        for tracker in self._live:
            try:
                tracker.close()
            except Exception as error:  # as above
                log.warning("metrics.%s: did not close: %s", tracker.name, _line(error))
        self._live = []


def wanted_trackers(config: Config) -> list[str]:
    """The packages that `config` asks for. Raises UserError if one of them is not installed."""
    wanted = {"tensorboard": config.metrics.tensorboard, "wandb": config.metrics.wandb != "disabled"}
    modules = [module for module, asked in wanted.items() if asked]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            remedy = f"pip install {module}, or switch it off"
            raise UserError(f"metrics.{module}: the package {module} is not installed; {remedy}")
    return modules


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _open_tensorboard(config: Config, step: int) -> Tracker:
    """Event files in the run's tensorboard/."""
    # slow and optional
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote beyond the checkpoint is not shown.
    writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30)

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                writer.add_scalar(name, value, step)

    return Tracker("tensorboard", write, writer.close)


def _open_wandb(config: Config, step: int) -> Tracker:
    """A wandb run that every start of ours continues; its files are in the run's wandb/."""
    import wandb  # slow and optional

    identity = config.run_dir / "wandb-id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
    library: Any = wandb
    run = library.init(
        project=config.metrics.wandb_project,
        name=config.run.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow",
        mode=config.metrics.wandb,
        dir=os.fspath(config.run_dir),
        config=config.model_dump(mode="json"),
        # Its own output would tear our lines, and what a terminal shows is in logs/ anyway.
        settings=library.Settings(console="off", silent=True, disable_git=True, save_code=False),
    )
    run.define_metric("*", step_metric="step")

    def write(step: int, metrics: dict[str, float]) -> None:
        run.log({**metrics, "step": step})

    def close() -> None:
        run.finish(exit_code=int(sys.exc_info()[0] is not None))  # closed on the way out of an error: a failed run

    return Tracker("wandb", write, close)
