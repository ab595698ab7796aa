"""TensorBoard and Weights & Biases in addition to `metrics.jsonl`, on rank 0; their failures do not end the run."""

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
    """A library that records metrics."""

    name: str
    write: Callable[[int, dict[str, float]], None]
    """Step and finite values."""
    close: Callable[[], None]


class Trackers:
    """The trackers that a config enables. One that fails is dropped with a warning."""

    def __init__(self, config: Config, step: int) -> None:
        """`step`: the number of steps already taken."""
        open_tracker = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
        self._open: list[Tracker] = []
        for module in wanted_trackers(config):
            try:
                self._open.append(open_tracker[module](config, step))
            except Exception as error:  # these libraries raise errors of any type
                log.warning("metrics.%s: cannot be started; continuing without it: %s", module, _line(error))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        for tracker in list(self._open):
            try:
                tracker.write(step, metrics)
            except Exception as error:  # as above
                self._open.remove(tracker)
                log.warning("metrics.%s: failed; continuing without it: %s", tracker.name, _line(error))

    def close(self) -> None:
        """Write what is buffered, and close."""
        for tracker in self._open:
            try:
                tracker.close()
            except Exception as error:  # as above
                log.warning("metrics.%s: did not close: %s", tracker.name, _line(error))
        self._open = []


def wanted_trackers(config: Config) -> list[str]:
    """The packages that `config` needs for its trackers. Raises UserError if one of them is not installed."""
    wanted = {"tensorboard": config.metrics.tensorboard, "wandb": config.metrics.wandb != "disabled"}
    modules = [module for module, asked in wanted.items() if asked]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            remedy = f"pip install {module}, or switch it off"
            raise UserError(f"metrics.{module}: the package {module} is not installed; {remedy}")
    return modules


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def tensorboard_tag(metric: str) -> str:
    """The tag of a metric, which begins with the group it is shown in: train/, validation/, perf/ or memory/."""
    if metric.startswith("validation/"):
        return metric
    if "memory" in metric:
        return f"memory/{metric}"
    perf = metric.startswith("tokens_per_second") or metric in ("mfu", "step_seconds", "data_wait_fraction")
    return f"{'perf' if perf else 'train'}/{metric}"


def _open_tensorboard(config: Config, step: int) -> Tracker:
    """Event files in the run's tensorboard/."""
    # slow and optional
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote after the checkpoint.
    writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30)

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name not in ("step", "time"):
                writer.add_scalar(tensorboard_tag(name), value, step)

    return Tracker("tensorboard", write, writer.close)


def _open_wandb(config: Config, step: int) -> Tracker:
    """A wandb run, continued by every start of this run; its files are in the run's wandb/."""
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
        # Its output would break our lines, and the console's output is in logs/.
        settings=library.Settings(console="off", silent=True, disable_git=True, save_code=False),
    )
    run.define_metric("*", step_metric="step")

    def write(step: int, metrics: dict[str, float]) -> None:
        run.log({**metrics, "step": step})

    def close() -> None:
        run.finish(exit_code=int(sys.exc_info()[0] is not None))  # closed because of an error: a failed run

    return Tracker("wandb", write, close)
