"""The trainer: build the parts, take a step, run to the horizon."""

import gc
import itertools
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from torchxihe.components.bad_steps import BadSteps
from torchxihe.components.checkpoint import Checkpointer, flat_state, resolve
from torchxihe.components.export import Exporter
from torchxihe.components.history import History
from torchxihe.components.lr_scheduler import learning_rate
from torchxihe.components.manifest import check_fresh_start, checkpoints_of
from torchxihe.components.metrics import MetricsWriter, StepSums, Window, sums_by_source, usage
from torchxihe.components.micro_batch import fit_micro_batch
from torchxihe.components.optimizer import build_optimizer, gradient_norm, optimizer_step
from torchxihe.components.profiler import Profiler, memory_explained
from torchxihe.components.ranks import Ranks
from torchxihe.components.report import report_end, report_start
from torchxihe.components.run_lock import run_locks, share_run_directory
from torchxihe.components.stop import Stop
from torchxihe.components.storage import Location, explained
from torchxihe.components.trackers import wanted_trackers
from torchxihe.components.validation import validate
from torchxihe.components.watchdog import Watchdog
from torchxihe.config import Config, UserError, dump_config
from torchxihe.data.chat import Chat
from torchxihe.data.loader import (
    Batch,
    BatchLayout,
    Loader,
    micro_batch_rows,
    micro_batches,
    random_batch,
    validation_batches,
)
from torchxihe.data.order import Order, Stage, check_epochs, plan_stages
from torchxihe.data.store import Prepared, open_prepared, write_bytes, write_text
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.model.generate import generate
from torchxihe.parallelisms.compile import compiles
from torchxihe.parallelisms.data_parallel import gradient_sync
from torchxihe.parallelisms.mesh import build_mesh, describe_mesh
from torchxihe.parallelisms.parallelize import parallelize
from torchxihe.utils.distributed import all_reduce_sum, is_main, process_group, rank, world_size
from torchxihe.utils.log import rank_log
from torchxihe.utils.words import counted

log = logging.getLogger(__name__)


class Trainer:
    """A model, its optimizer and the step; `step` counts the optimizer steps taken."""

    def __init__(self, config: Config, device: torch.device, bytes_per_token: np.ndarray) -> None:
        """Build everything that the step needs; `bytes_per_token` is int32 [V or less]."""
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.config, self.device = config, device
        mesh = build_mesh(config.parallelism, world_size(), device.type)
        self.layout = describe_mesh(mesh)
        self.model, self.module = parallelize(config, device, mesh)
        self.optimizer = build_optimizer(self.model, config.optimizer, mesh, compile=compiles(config.training))
        training = config.training
        self.micro_batch_size = micro_batch_rows(training.global_batch_size, world_size(), training.micro_batch_size)
        self.bytes_per_token = torch.from_numpy(bytes_per_token).to(device)
        self.sums = StepSums(device, len(config.data.sources))
        self.keep_shards = config.parallelism.reshard_after_forward  # what is wanted is memory, not less traffic
        self.bad_steps = BadSteps(training, device)
        self.step = 0

    def train_step(self, loader: Iterator[Batch]) -> None:
        """One optimizer step on the next `accumulation` micro-batches; the host never waits for the device."""
        batches = [next(loader) for _ in range(self.accumulation)]
        tokens = all_reduce_sum(torch.full((), float(sum(batch.valid for batch in batches)), device=self.device))
        tokens = tokens.clamp(min=1)  # a batch of a conversation's prompts alone has none
        sources = len(self.config.data.sources)
        sums_S3 = torch.zeros(sources, 3, dtype=torch.float64, device=self.device)
        for i, batch in enumerate(batches):
            with gradient_sync(self.module, last=i == len(batches) - 1, keep_shards=self.keep_shards):
                loss, losses_B = self.module(batch.tokens, batch.targets, batch.docs)
                (loss / tokens).backward()  # summed over ranks and micro-batches: the global mean over valid targets
            sums_S3 += sums_by_source(losses_B, batch, self.bytes_per_token, sources)
        sums_S3 = all_reduce_sum(sums_S3)
        loss, grad_norm = sums_S3[:, 0].sum() / tokens, gradient_norm(self.model.parameters())
        skip = self.bad_steps.judge(loss, grad_norm)  # the same on all ranks; data and step are consumed
        optimizer_step(self.optimizer, self.lr, grad_norm, self.config.training.max_grad_norm, skip)
        self.sums.add(sums_S3, grad_norm, skip)
        self.step += 1

    @property
    def accumulation(self) -> int:
        """Micro-batches of the step about to be taken."""
        return micro_batches(self.config.batch_size(self.step), world_size(), self.micro_batch_size)

    @property
    def lr(self) -> float:
        """Learning rate of the step about to be taken."""
        return learning_rate(self.step, self.config.total_steps, self.config.optimizer.lr, self.config.lr_scheduler)

    @property
    def batch_layout(self) -> BatchLayout:
        """What a loader needs to know of this process and the model."""
        data = self.config.data
        return BatchLayout(data.seq_len, self.micro_batch_size, self.device, data.document_mask, rank(), world_size())

    def measure(self, order: Order, names: list[str], window: Window, loader: Loader, lr: float) -> dict[str, float]:
        """What a log step after this step reports; here the host waits for the device, and the ranks for each other."""
        tokens = order.batch(self.step)[0] * self.config.data.seq_len
        metrics = {"step": self.step, "tokens": tokens, "lr": lr} | self.sums.read(names)
        if len(names) > 1:
            metrics |= {f"epoch/{name}": n for name, n in zip(names, order.epochs(self.step), strict=True)}
        metrics |= window.close(self.step, tokens, loader.wait_seconds)
        loader.wait_seconds = 0.0
        metrics |= usage(self.config, self.device, metrics["tokens_per_second_per_gpu"])
        log.debug(
            "%.3f s a step, %.1f %% of it waiting for data, %.2f GiB of the host's memory",
            metrics["step_seconds"],
            100 * metrics["data_wait_fraction"],
            metrics[f"host_memory_gib/{rank()}"],
        )
        return metrics

    def validate(self, prepared: Prepared) -> dict[str, float]:
        """Loss on the held-out documents, in whole, by source and by set; all ranks must ask together."""
        batches = validation_batches(prepared, self.batch_layout, self.config.validation.max_tokens)
        return validate(self.module, batches, self.bytes_per_token, prepared)

    def load(self, checkpointer: Checkpointer, path: Location, only: tuple[str, ...] = ()) -> None:
        """Continue from a step directory; with parts in `only`, start at step 0 with nothing but these."""
        state = checkpointer.load(path, self.state(), only)
        self.step = 0 if only else state["step"]
        log.info("loaded %s of %s", " and ".join(only) or "everything", path)

    def save(self, checkpointer: Checkpointer, history: History, validation_loss: float | None = None) -> None:
        """Commit everything that the run consists of; at the end, if that is wanted, the model alone."""
        whole = self.step < self.config.total_steps or self.config.checkpoint.final == "full"
        checkpointer.save(self.step, self.state(whole), history.to_json(self.step), validation_loss)

    def state(self, whole: bool = True) -> dict[str, torch.Tensor]:
        """Every tensor that the run consists of, by name; not `whole`: the model alone."""
        return (
            flat_state(self.model, self.optimizer) | self.bad_steps.state() if whole else flat_state(self.model, None)
        )

    def log_sample(self, prepared: Prepared) -> None:
        """Print text that continues `metrics.sample_prompt`, or answers it; all ranks must ask together."""
        options = self.config.metrics
        if not options.sample_tokens:
            return
        tokenizer = load_tokenizer(prepared.tokenizer_dir)
        text, stop_id = options.sample_prompt, prepared.eos_id
        prompt = tokenizer.encode(text) or [stop_id]
        if self.config.data.format == "chat":
            chat = Chat(prepared.tokenizer_dir)
            prompt, stop_id = chat.prompt([{"role": "user", "content": text}]), chat.end_of_turn
            text += "\n"
        tokens = generate(
            self.module,
            prompt,
            max_tokens=options.sample_tokens,
            context=self.config.data.seq_len,
            vocab_size=prepared.vocab_size,
            stop_id=stop_id,
        )
        text += tokenizer.decode(list(tokens))
        log.info("a sample of its writing after step %d:\n%s", self.step, text)


def trial_step(config: Config, device: torch.device) -> None:
    """Build a trainer and take a step of random tokens; nothing is kept."""
    trainer = Trainer(config, device, np.ones(config.model.vocab_size, np.int32))
    batch = random_batch(trainer.batch_layout, config.model.vocab_size, documents=1)
    trainer.train_step(itertools.repeat(batch))


def run(config: Config) -> None:
    """Train `config` to its horizon, from the newest checkpoint of the run if there is one."""
    limits = config.training.init_timeout, config.training.step_timeout
    # The collectives' own limit comes after the watchdog's, which tells more.
    patience = max(limits) + 60 if all(limits) else 7 * 86_400
    wanted_trackers(config)  # one that is not installed is no reason to have built a model
    try:
        with Watchdog(config.run_dir, *limits) as watchdog, process_group(patience) as device:
            ranks = Ranks()
            share_run_directory(config.run_dir, ranks)
            files = rank_log(config.run_dir / "logs", lambda: watchdog.phase)
            with files, Stop(watchdog, config.training.time_limit) as stop, run_locks(config, ranks):
                _run(config, device, stop, watchdog)
    except OSError as error:  # data that is gone, a disk that is full: nothing that a traceback would explain
        raise explained(error) from error
    except RuntimeError as error:
        if not re.search("(closed|reset) by peer|Broken pipe", str(error)):  # gloo's words
            raise
        raise UserError("another rank is gone; what it said last tells why") from error


def going_on(config: Config, saved: dict[str, Any]) -> Config:
    """`config` for a run that has come as far as a checkpoint with the train_state `saved`."""
    stages = [Stage.from_json(stage) for stage in saved["stages"]]
    return config.gone_on(saved["step"], Order(stages, {}).batch(saved["step"])[0] if stages else 0)


def is_finished(config: Config, saved: dict[str, Any]) -> bool:
    """Whether a checkpoint with the train_state `saved` is at the run's horizon."""
    return saved["step"] >= going_on(config, saved).total_steps


def _run(config: Config, device: torch.device, stop: Stop, watchdog: Watchdog) -> None:
    """Find out where the run stands, build it, and train."""
    checkpointer = Checkpointer(checkpoints_of(config), config.checkpoint)
    newest = checkpointer.newest(lambda saved: is_finished(config, saved))
    start, only = newest, ()
    if newest is None:
        checkpointer.ranks.on_main(lambda: check_fresh_start(checkpointer.directory, config.run_dir))
        if config.checkpoint.load:
            start = checkpointer.ranks.on_main(lambda: resolve(config.checkpoint.load))
            only = config.checkpoint.load_only
    saved = checkpointer.train_state(start) if start is not None else {}
    if saved and not only:
        config = going_on(config, saved)
        done, longer = counted(saved["step"], "step"), f"a larger --training.{config.horizon}=N"
        if is_finished(config, saved) and newest is None:
            weights = """--checkpoint.load_only='["model"]'"""
            why = f"{start} has done {done}, which is all of this run"
            raise UserError(f"checkpoint.load: {why}; give {longer}, or {weights} to begin with its weights alone")
        if is_finished(config, saved):
            with Exporter(config, checkpointer):  # the last export may have been interrupted
                watchdog.begin("exports", slow=True)
            log.info("%s is finished: it has done %s.", config.run_dir, done)
            log.info("Go on with %s, or start another run with --run.name=NAME.", longer)
            return
    prepared = open_prepared(config)
    history = History(config, prepared.tokenizer_dir)
    if newest is not None:
        history.go_on(saved)
    elif start is not None:
        history.start_from(saved, start, whole=not only)
    with memory_explained(config):
        config = fit_micro_batch(config, device, trial_step)
        trainer = Trainer(config, device, prepared.bytes_per_token)
        if start is not None:
            trainer.load(checkpointer, start, only)
    stages = plan_stages(config, prepared, [Stage.from_json(stage) for stage in history.stages], trainer.step)
    history.stages = [stage.to_json() for stage in stages]
    order = Order(stages, prepared.rows)
    check_epochs(config, prepared, order)
    report_start(config, prepared, order, trainer.optimizer, trainer.layout, device, trainer.micro_batch_size)

    def describe_run() -> None:
        (config.run_dir / "PREEMPTED").unlink(missing_ok=True)
        write_text(config.run_dir / "config.toml", dump_config(config))
        (config.run_dir / "tokenizer").mkdir(exist_ok=True)
        for file in prepared.tokenizer_dir.iterdir():
            write_bytes(config.run_dir / "tokenizer" / file.name, file.read_bytes())

    checkpointer.ranks.on_main(describe_run)
    with memory_explained(config), Exporter(config, checkpointer) as exporter:
        _train(trainer, order, prepared, history, checkpointer, stop, watchdog)
        if trainer.step < config.total_steps:
            exporter.cancel()
        watchdog.begin("exports", slow=True)
    if trainer.step < config.total_steps:
        if is_main():
            (config.run_dir / "PREEMPTED").write_text(f"{stop.reason} after step {trainer.step}\n", encoding="utf-8")
        log.info("stopped after step %d (%s) with a checkpoint; the same command goes on", trainer.step, stop.reason)
        return
    trainer.log_sample(prepared)
    if is_main():
        report_end(config)


def _train(
    trainer: Trainer,
    order: Order,
    prepared: Prepared,
    history: History,
    checkpointer: Checkpointer,
    stop: Stop,
    watchdog: Watchdog,
) -> None:
    """The loop: steps, and between them what is due. Ends at the horizon or when the ranks agree to stop, saved."""
    config, total = trainer.config, trainer.config.total_steps
    loader = Loader(prepared, order, trainer.batch_layout, trainer.step)
    writer = checkpointer.ranks.each(lambda: MetricsWriter(config, trainer.step) if is_main() else None)
    profiler = Profiler(config, trainer.device)
    window = Window(trainer.step, order.batch(trainer.step)[0] * config.data.seq_len)

    def due(every: int) -> bool:
        return bool(every) and (trainer.step % every == 0 or trainer.step == total)

    # A trial of two steps shall not end in an hour of validation.
    validate_every = config.validation.every if config.validation.every <= total else 0

    # A collection of all the objects that torch has made takes half a second, at a moment of its own on every rank.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        first = trainer.step
        while trainer.step < total:
            watchdog.begin(f"step {trainer.step + 1}", slow=trainer.step == first)  # which compiles
            if stop.agreed():
                break
            lr = trainer.lr
            profiler.before_step(trainer.step + 1)
            trainer.train_step(loader)
            checkpointer.poll()
            if due(config.metrics.log_every) or trainer.step == 1:  # the first loss tells most about a new model
                metrics = trainer.measure(order, prepared.names, window, loader, lr)
                if writer:
                    writer.train(metrics)
                trainer.bad_steps.check(order.describe(trainer.step - 1, prepared.names))
                gc.collect(1)
            validating, saving = due(validate_every), due(config.checkpoint.every or total)
            sampling = due(config.metrics.sample_every) and trainer.step < total
            if not (validating or sampling or saving):
                continue
            with window.pause(trainer.device):
                validation_loss = None
                if validating:
                    watchdog.begin(f"validation after step {trainer.step}", slow=True)
                    result = trainer.validate(prepared)
                    validation_loss = result["validation/loss"]
                    if writer:
                        writer.validation(trainer.step, result)
                if sampling:
                    watchdog.begin(f"sample after step {trainer.step}", slow=True)
                    trainer.log_sample(prepared)
                if saving:
                    watchdog.begin(f"checkpoint of step {trainer.step}", slow=True)
                    trainer.save(checkpointer, history, validation_loss)
        watchdog.begin(f"last checkpoint, of step {trainer.step}", slow=True)
        if trainer.step < total:
            trainer.save(checkpointer, history)
        checkpointer.close()
    finally:
        profiler.close()
        loader.close()
        if writer:
            writer.close()
        gc.enable()
        gc.unfreeze()
