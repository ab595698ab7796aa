"""A run: what it starts from, the loop, and the tasks between steps."""

import gc
import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.exporter import Exporter
from torchxihe.components.checkpoint.history import History, newest_train_state, read_train_state
from torchxihe.components.checkpoint.manifest import check_fresh_start, checkpoints_of, step_of
from torchxihe.components.checkpoint.state import corruption_explained, resolve
from torchxihe.components.checkpoint.storage import Location
from torchxihe.components.observe import (
    MetricsWriter,
    Noted,
    Profiler,
    Window,
    compiling,
    memory_explained,
    report_end,
    report_start,
    usage,
    wanted_trackers,
)
from torchxihe.components.runtime import (
    Compiled,
    Ranks,
    Stop,
    Watchdog,
    fit_micro_batch,
    run_lock,
    share_run_directory,
)
from torchxihe.components.validation import warn_of_few_rows
from torchxihe.config.load import dump_config
from torchxihe.config.options import Config
from torchxihe.data.loader import Loader
from torchxihe.data.order import Order, Stage, changed_sources, check_epochs, plan_stages
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.errors import LostPeerError, UserError, explained
from torchxihe.model.flops import training_flops
from torchxihe.parallelisms.compile import compiles
from torchxihe.parallelisms.dims import build_dims
from torchxihe.plan.check import check_memory
from torchxihe.trainer import Trainer, trial_step
from torchxihe.utils.device import device_name
from torchxihe.utils.distributed import is_main, process_group, rank
from torchxihe.utils.files import write_bytes, write_text
from torchxihe.utils.log import rank_log
from torchxihe.utils.words import counted

log = logging.getLogger(__name__)

OnStep = Callable[[dict[str, float]], object]
"""Called on every rank with what is written to metrics.jsonl."""


def run(config: Config, on_step: OnStep = lambda metrics: None) -> bool:
    """Train `config` to its horizon, from the newest checkpoint of the run if there is one.

    Whether it is finished; if not, it was asked to stop, and has saved.
    """
    limits = config.training.init_timeout, config.training.step_timeout
    # Collectives time out after the watchdog, whose report says more.
    timeout = max(limits) + 60 if all(limits) else 7 * 86_400
    wanted_trackers(config)  # fail before the model is built
    try:
        with Watchdog(config.run_dir, *limits) as watchdog, process_group(timeout) as device:
            ranks = Ranks()
            share_run_directory(config.run_dir, ranks)
            files = rank_log(config.run_dir / "logs", lambda: watchdog.phase)
            with files, Stop(watchdog, config.training.time_limit) as stop, run_locks(config, ranks):
                return _run(config, device, stop, watchdog, on_step)
    except OSError as error:  # missing data, a full disk: a traceback would not help
        raise explained(error) from error
    except RuntimeError as error:
        if not re.search("(closed|reset) by peer|Broken pipe", str(error)):  # gloo's messages
            raise
        raise LostPeerError("another rank exited; see its last message for the reason") from error


@contextmanager
def run_locks(config: Config, ranks: Ranks) -> Iterator[None]:
    """Lock the run directory, and the checkpoints if they are elsewhere; an object store cannot be locked."""
    checkpoints = checkpoints_of(config)
    directories = [config.run_dir, *([Path(checkpoints)] if config.checkpoint.dir and checkpoints.local else [])]
    with ExitStack() as locks:
        for directory in directories:
            locks.enter_context(run_lock(directory, ranks))
        yield


@dataclass(frozen=True)
class Start:
    """What a run starts from, if anything."""

    config: Config
    """With the progress so far."""
    directory: Location | None = None
    """The step directory that is loaded."""
    only: tuple[str, ...] = ()
    """The parts of it that are loaded; none: all."""
    saved: dict[str, Any] | None = None
    """Its train_state."""
    own: bool = False
    """Whether it is a checkpoint of this run (not `checkpoint.load`'s)."""

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.saved is not None and not self.only and is_finished(self.config, self.saved)


def find_start(config: Config, checkpointer: Checkpointer) -> Start:
    """The newest valid checkpoint of the run, else `checkpoint.load`, else nothing. Raises UserError."""
    on_main = checkpointer.ranks.on_main
    newest = checkpointer.newest(lambda saved: is_finished(config, saved))
    if newest is not None:
        saved = checkpointer.train_state(newest)
        return Start(resumed(config, saved), newest, (), saved, own=True)
    on_main(lambda: check_fresh_start(checkpointer.directory, config.run_dir))
    if not config.checkpoint.load:
        return Start(config)
    origin = on_main(lambda: resolve(config.checkpoint.load))
    only, saved = config.checkpoint.load_only, checkpointer.train_state(origin)
    start = Start(config if only else resumed(config, saved), origin, only, saved)
    if start.finished:
        why = f"{origin} has completed {counted(saved['step'], 'step')}, so this run has none left"
        weights = """--checkpoint.load_only='["model"]'"""
        longer = f"a larger --training.{config.horizon}=N"
        raise UserError(f"checkpoint.load: {why}; give {longer}, or {weights} to start from its weights only")
    return start


def resumed(config: Config, saved: dict[str, Any]) -> Config:
    """`config` with the progress of a checkpoint with the train_state `saved`."""
    stages = [Stage.from_json(stage) for stage in saved["stages"]]
    return config.resumed_at(saved["step"], Order(stages, {}).batch(saved["step"])[0] if stages else 0)


def is_finished(config: Config, saved: dict[str, Any]) -> bool:
    """Whether a checkpoint with the train_state `saved` is at the run's horizon."""
    return saved["step"] >= resumed(config, saved).total_steps


def planned_order(config: Config, prepared: Prepared) -> tuple[Config, Order]:
    """The data order of a run of `config` to its horizon, and the config with the progress so far.

    Of a run that has begun, or is to begin, from a checkpoint (which is not verified here), the order has the stages
    that were read before it.
    """
    saved = newest_train_state(config)
    if saved is None and config.checkpoint.load and not config.checkpoint.load_only:
        origin = resolve(config.checkpoint.load)
        with corruption_explained(origin):
            saved = read_train_state(origin)
    if saved is None:
        return config, Order(plan_stages(config, prepared), prepared.rows)
    config, stages = resumed(config, saved), [Stage.from_json(stage) for stage in saved["stages"]]
    return config, Order(plan_stages(config, prepared, stages, saved["step"]), prepared.rows)


def _run(config: Config, device: torch.device, stop: Stop, watchdog: Watchdog, on_step: OnStep) -> bool:
    """Find the start, build the trainer, and train; whether the run is finished."""
    dims = build_dims(config.parallelism)
    check_memory(config, device, dims.size("world"))
    checkpointer = Checkpointer(checkpoints_of(config), config.checkpoint)
    start = find_start(config, checkpointer)
    config, saved = start.config, start.saved
    if start.finished:
        assert saved is not None
        with Exporter(config, checkpointer):  # an export may have been interrupted
            watchdog.begin("exports", slow=True)
        log.info("%s is finished (%s).", config.run_dir, counted(saved["step"], "step"))
        longer = f"a larger --training.{config.horizon}=N"
        log.info("Continue it with %s, or start another run with --run.name=NAME.", longer)
        return True
    prepared = open_prepared(config)
    history = History(config, prepared.tokenizer_dir)
    if saved is not None and start.directory is not None:
        if start.own:
            history.resume(saved)
        else:
            history.start_from(saved, start.directory, full=not start.only)
    compiled = Compiled(config.run_dir) if compiles(config.training) else None
    with memory_explained(config):
        config = fit_micro_batch(config, device, trial_step, dims.size("data"))
        trainer = Trainer(config, device, prepared.bytes_per_token, dims=dims)
        if start.directory is not None:
            trainer.load(checkpointer, start.directory, start.only)
            what = "resuming" if start.own else f"starting with the {' and '.join(start.only) or 'state'}"
            log.info("%s from %s (step %d)", what, start.directory, step_of(start.directory.name))
    saved_stages = [Stage.from_json(stage) for stage in history.stages]
    for line in changed_sources(saved_stages, prepared, trainer.step):
        history.record_sources(line, trainer.step)
    stages = plan_stages(config, prepared, saved_stages, trainer.step)
    history.stages = [stage.to_json() for stage in stages]
    order = Order(stages, prepared.rows)
    check_epochs(config, prepared, order)
    report_start(
        config,
        prepared,
        order,
        trainer.optimizer,
        devices=f"{dims.size('world')} × {device_name(device)}, {dims.describe()}",
        accumulation=trainer.accumulation_at(config.total_steps),
        shards=dims.size("copy"),
    )
    warn_of_few_rows(config, prepared)
    hosts = checkpointer.ranks.gather(socket.gethostname)
    checkpointer.ranks.on_main(lambda: describe_run(config, prepared))
    noted = Noted(config.run_dir) if is_main() else None
    checkpointer.ranks.each(lambda: noted and noted.start(trainer.step, hosts))
    with memory_explained(config), Exporter(config, checkpointer) as exporter:
        Loop(trainer, order, prepared, history, checkpointer, stop, watchdog, on_step, compiled).run()
        if trainer.step < config.total_steps:
            exporter.cancel()
        watchdog.begin("exports", slow=True)
    if trainer.step < config.total_steps:
        if noted:
            noted.end(trainer.step, stop.reason)
            (config.run_dir / "PREEMPTED").write_text(f"{stop.reason} after step {trainer.step}\n", encoding="utf-8")
        log.info(
            "stopped after step %d (%s), checkpoint saved; run the same command to resume", trainer.step, stop.reason
        )
        return False
    log_sample(trainer, prepared)
    if noted:
        noted.end(trainer.step, "finished")
        report_end(config)
    return True


def describe_run(config: Config, prepared: Prepared) -> None:
    """Write the resolved config and the tokenizer into the run directory."""
    (config.run_dir / "PREEMPTED").unlink(missing_ok=True)
    write_text(config.run_dir / "config.toml", dump_config(config))
    (config.run_dir / "tokenizer").mkdir(exist_ok=True)
    for file in prepared.tokenizer_dir.iterdir():
        write_bytes(config.run_dir / "tokenizer" / file.name, file.read_bytes())


def log_sample(trainer: Trainer, prepared: Prepared) -> None:
    """Log a sample of the model's text; called on all ranks together."""
    if trainer.config.metrics.sample_tokens:
        log.info("sample at step %d:\n%s", trainer.step, trainer.sample(prepared))


@dataclass(frozen=True)
class Task:
    """Something to do after some of the steps."""

    every: int
    """Interval in steps, 0: never. Also due after the last step."""
    action: Callable[[], None]
    phase: str = ""
    """Name for the watchdog; its time does not count as training time. "": a task of no notable duration."""
    first: bool = False
    """Whether it is also due after the first step of a run."""
    last: bool = True
    """Whether it is due after the last step of a run."""

    def due(self, step: int, total: int) -> bool:
        """Whether it is due after `step` of `total`."""
        if not self.every:
            return False
        return self.last if step == total else step % self.every == 0 or (self.first and step == 1)


class Loop:
    """Steps and the tasks between them. Ends at the horizon or when the ranks agree to stop, with a checkpoint."""

    def __init__(
        self,
        trainer: Trainer,
        order: Order,
        prepared: Prepared,
        history: History,
        checkpointer: Checkpointer,
        stop: Stop,
        watchdog: Watchdog,
        on_step: OnStep,
        compiled: Compiled | None,
    ) -> None:
        config = trainer.config
        self.trainer, self.order, self.prepared, self.history = trainer, order, prepared, history
        self.checkpointer, self.stop, self.watchdog, self.on_step = checkpointer, stop, watchdog, on_step
        self.compiled = compiled if is_main() else None
        self.total, self.lr = config.total_steps, 0.0
        self.validation_loss: float | None = None
        # A trial of two steps must not end in an hour of validation.
        validate_every = config.validation.every if config.validation.every <= self.total else 0
        self.tasks = [
            Task(config.metrics.log_every, self._log, first=True),  # the first loss shows mistakes soonest
            Task(validate_every, self._validate, "validation"),
            Task(config.metrics.sample_every, self._sample, "sample", last=False),
            Task(config.checkpoint.every or self.total, self._save, "checkpoint"),
        ]

    def run(self) -> None:
        """Train to the end."""
        trainer, config = self.trainer, self.trainer.config
        self.loader = Loader(self.prepared, self.order, trainer.batch_spec, trainer.step)
        self.writer = self.checkpointer.ranks.each(lambda: MetricsWriter(config, trainer.step) if is_main() else None)
        self.profiler = Profiler(config, trainer.device)
        self._begin_window()
        # A full garbage collection takes half a second, and hits ranks at different steps (stragglers).
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            self._steps()
            self.watchdog.begin(f"last checkpoint, at step {trainer.step}", slow=True)
            if trainer.step < self.total:
                trainer.save(self.checkpointer, self.history)
            self.checkpointer.close()
        finally:
            self.profiler.close()
            self.loader.close()
            if self.writer:
                self.writer.close()
            gc.enable()
            gc.unfreeze()

    def _steps(self) -> None:
        trainer, first = self.trainer, self.trainer.step
        while trainer.step < self.total:
            self.watchdog.begin(f"step {trainer.step + 1}", slow=trainer.step == first)  # compiles
            if self.stop.agreed():
                return
            self.lr = trainer.lr
            self.profiler.before_step(trainer.step + 1)
            if trainer.step == first and compiles(trainer.config.training):
                with compiling():
                    trainer.train_step(self.loader)
                if self.compiled:
                    self.compiled.save()
                self._begin_window()  # the first step's time is not that of a step
            else:
                trainer.train_step(self.loader)
            self.checkpointer.poll()
            self.validation_loss = None
            for task in self.tasks:
                if task.due(trainer.step, self.total):
                    self._do(task)

    def _begin_window(self) -> None:
        """Measure speed from here on."""
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        self.loader.read_counts()
        self.window = Window(self.trainer.step, self._tokens(), self.trainer.dims.size("world"))

    def _do(self, task: Task) -> None:
        if not task.phase:
            task.action()
            return
        with self.window.pause(self.trainer.device):
            self.watchdog.begin(f"{task.phase} after step {self.trainer.step}", slow=True)
            task.action()

    def _tokens(self) -> int:
        """Of all steps before the next one, padding included."""
        return self.order.batch(self.trainer.step)[0] * self.trainer.config.data.seq_len

    def _log(self) -> None:
        """Synchronises the host with the device and the ranks with each other."""
        trainer, names = self.trainer, self.prepared.names
        metrics = {"step": trainer.step, "tokens": self._tokens(), "lr": self.lr} | trainer.sums.read(names)
        if len(names) > 1:
            metrics |= {f"epoch/{name}": n for name, n in zip(names, self.order.epochs(trainer.step), strict=True)}
        wait_seconds, tokens, pairs = self.loader.read_counts()
        steps = trainer.step - self.window.step
        metrics |= self.window.close(trainer.step, self._tokens(), wait_seconds)
        seconds = steps * metrics.get("step_seconds", 0.0)
        sharing = trainer.dims.size("world") / trainer.dims.size("data")  # ranks that work on the same rows
        flops = training_flops(trainer.config.model, tokens, pairs) / sharing
        metrics |= usage(trainer.device, flops / seconds if seconds else 0.0)
        if steps:
            log.debug(
                "%.3f s/step, %.1f %% of it waiting for data, %.2f GiB of host memory",
                metrics["step_seconds"],
                100 * metrics["data_wait_fraction"],
                metrics[f"host_memory_gib/{rank()}"],
            )
        if self.writer:
            self.writer.train(metrics)
        self.on_step(metrics)
        trainer.bad_steps.check(self.order.describe(trainer.step - 1, names))
        gc.collect(1)

    def _validate(self) -> None:
        result = self.trainer.validate(self.prepared)
        self.validation_loss = result.get(self.trainer.config.checkpoint.best_metric)
        if self.writer:
            self.writer.validation(self.trainer.step, result)
        self.on_step({"step": self.trainer.step, **result})

    def _sample(self) -> None:
        log_sample(self.trainer, self.prepared)

    def _save(self) -> None:
        self.trainer.save(self.checkpointer, self.history, self.validation_loss)
        if self.compiled:
            self.compiled.save()
