"""The trainer: build the parts, take a step, run to the horizon."""

import gc
import itertools
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from torchxihe.components.bad_steps import BadSteps
from torchxihe.components.checkpoint import Checkpointer, checkpoints_of, flat_state, resolve
from torchxihe.components.export import Exporter
from torchxihe.components.history import History
from torchxihe.components.lr_scheduler import learning_rate
from torchxihe.components.manifest import step_of
from torchxihe.components.metrics import MetricsWriter, StepSums, Window, memory_of_ranks
from torchxihe.components.optimizer import build_optimizer, clip_gradients, optimizer_step
from torchxihe.components.profiler import Profiler, memory_explained
from torchxihe.components.ranks import Ranks, explained
from torchxihe.components.report import report_end, report_start
from torchxihe.components.run_lock import run_lock
from torchxihe.components.stop import Stop
from torchxihe.components.storage import Location
from torchxihe.components.validation import sums_by_source, validate
from torchxihe.components.watchdog import Watchdog
from torchxihe.config import Config, UserError, dump_config
from torchxihe.data.loader import Batch, BatchLayout, Loader, validation_batches
from torchxihe.data.order import Order, Stage, check_epochs, micro_batch_rows, micro_batches, plan_stages
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.model.decoder import flops_per_token
from torchxihe.model.generate import generate
from torchxihe.parallelisms.data_parallel import gradient_sync
from torchxihe.parallelisms.mesh import build_mesh
from torchxihe.parallelisms.parallelize import parallelize
from torchxihe.utils.device import compile_obstacle, memory_gib, peak_flops
from torchxihe.utils.distributed import (
    all_gather_object,
    all_reduce_sum,
    broadcast_object,
    is_main,
    process_group,
    rank,
    world_size,
)
from torchxihe.utils.log import rank_log

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.92  # of the free memory that a micro-batch may fill: the rest is for fragments and workspaces


class Trainer:
    """A model, its optimizer and the step; `step` counts the optimizer steps taken."""

    def __init__(self, config: Config, device: torch.device, bytes_per_token: np.ndarray) -> None:
        """Build everything that the step needs; `bytes_per_token` is int32 [V or less]."""
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.config, self.device = config, device
        self.mesh = build_mesh(config.parallelism, world_size(), device.type)
        self.model, self.module = parallelize(config, device, self.mesh)
        compiled = config.training.compile and not compile_obstacle()
        self.optimizer = build_optimizer(self.model, config.optimizer, self.mesh, compile=compiled)
        training = config.training
        self.micro_batch_size = micro_batch_rows(training.global_batch_size, world_size(), training.micro_batch_size)
        self.bytes_per_token = torch.from_numpy(bytes_per_token).to(device)
        self.sums = StepSums(device, len(config.data.sources))
        self.bad_steps = BadSteps(training, device)
        self.step = 0

    def train_step(self, loader: Iterator[Batch]) -> None:
        """One optimizer step on the next `accumulation` micro-batches; the host never waits for the device."""
        batches = [next(loader) for _ in range(self.accumulation)]
        tokens = all_reduce_sum(torch.full((), float(sum(batch.valid for batch in batches)), device=self.device))
        tokens = tokens.clamp(min=1)  # a batch of a conversation's prompts alone has none
        sources = len(self.config.data.sources)
        sums = torch.zeros(1 + 3 * sources, dtype=torch.float64, device=self.device)
        for i, batch in enumerate(batches):
            with gradient_sync(self.module, last=i == len(batches) - 1):
                loss, losses_B = self.module(batch.tokens, batch.targets, batch.docs)
                (loss / tokens).backward()  # summed over ranks and micro-batches: the global mean over valid targets
            by_source_S3 = sums_by_source(losses_B, batch, self.bytes_per_token, sources)
            sums += torch.cat([loss.detach().double().view(1), by_source_S3.flatten()])
        sums = all_reduce_sum(sums)
        grad_norm = clip_gradients(self.model.parameters(), self.config.training.max_grad_norm)
        skip = self.bad_steps.judge(sums[0] / tokens, grad_norm)  # the same on all ranks; data and step are consumed
        optimizer_step(self.optimizer, self.lr, skip)
        self.sums.add(sums, grad_norm, skip)
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
    def layout(self) -> str:
        """The parallelism in use, for people."""
        if self.mesh is None:
            return "one process"
        replicate, shard = self.mesh["dp_replicate"].size(), self.mesh["dp_shard"].size()
        if shard == 1:
            return f"DDP over {replicate}"
        return f"FSDP2 over {shard}" if replicate == 1 else f"HSDP of {replicate} × {shard}"

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
        metrics |= self.usage(metrics["tokens_per_second_per_gpu"]) | memory_of_ranks(self.device)
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

    def usage(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP/s utilisation at this rank's speed, where the device's peak is known, and its peak memory."""
        allocated, reserved = memory_gib(self.device)
        usage = {"memory_allocated_gib": allocated, "memory_reserved_gib": reserved}
        if peak := peak_flops(self.device):
            flops = flops_per_token(self.config.model, self.config.data.seq_len)
            usage["mfu"] = flops * tokens_per_second / peak
        return usage

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
        # Training needs no tokenizer library until it samples.
        from torchxihe.data.chat import Chat
        from torchxihe.data.tokenizer import load_tokenizer

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


def fit_micro_batch(config: Config, device: torch.device) -> Config:
    """`config` with the largest micro-batch that fits in `training.micro_batch_size`'s place if that is 0.

    Up to three trial steps on random tokens: of one row, of two, and of as many as these two promise, which is few,
    because the loss's chunks stop growing. Memory is a line in the rows; all ranks take the smallest answer.
    """
    if config.training.micro_batch_size:
        return config
    if device.type != "cuda":
        raise UserError("training.micro_batch_size: 0 looks for what fits on a GPU; on a CPU give a number")
    most = -(-config.training.global_batch_size // world_size())
    peaks = {rows: max(all_gather_object(_peak_memory(config, device, rows))) for rows in range(1, min(most, 2) + 1)}
    limit = MEMORY_SHARE * min(all_gather_object(torch.cuda.mem_get_info(device)[0]))
    promised = rows_that_fit(peaks, limit, most)
    if promised > 2:
        peaks[promised] = max(all_gather_object(_peak_memory(config, device, promised)))
    rows = rows_that_fit(peaks, limit, most)
    if peaks[1] > limit:
        needed = f"a step of one row takes {peaks[1] / 2**30:.1f} GiB of the {limit / 2**30:.1f} that are to be had"
        raise UserError(f"training.micro_batch_size: {needed}; see parallelism.activation_checkpointing, or more GPUs")
    log.info("micro-batch: %d rows fit in %.1f GiB (training.micro_batch_size)", rows, limit / 2**30)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": rows})})


def rows_that_fit(peaks: dict[int, int], limit: float, most: int) -> int:
    """The largest micro-batch, 1 to `most`, under `limit` bytes on the line through the two largest of `peaks` (bytes
    by rows)."""
    if most == 1:
        return 1
    a, b = sorted(peaks)[-2:]
    slope = max((peaks[b] - peaks[a]) / (b - a), 1.0)
    return int(min(max(b + (limit - peaks[b]) // slope, 1), most))


def _peak_memory(config: Config, device: torch.device, rows: int) -> int:
    """Bytes allocated at most in a step of two micro-batches of `rows` rows, model and optimizer included."""
    rank_rows = {"micro_batch_size": rows, "global_batch_size": 2 * rows * world_size(), "batch_ramp": ()}
    trial = config.model_copy(update={"training": config.training.model_copy(update=rank_rows)})
    torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(trial, device, np.ones(config.model.vocab_size, np.int32))
    trainer.train_step(itertools.repeat(random_batch(config, device, rows, documents=1)))
    peak = torch.cuda.max_memory_allocated(device)
    del trainer
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def random_batch(config: Config, device: torch.device, rows: int, documents: int) -> Batch:
    """A micro-batch of random tokens, with as many documents in each row where documents are masked."""
    seq_len = config.data.seq_len
    generator = torch.Generator().manual_seed(rank())
    tokens = torch.randint(0, config.model.vocab_size, (rows, seq_len + 1), generator=generator).to(device)
    docs = None
    if config.data.document_mask:
        starts = [b * seq_len + d * seq_len // documents for b in range(rows) for d in range(documents)]
        docs = torch.tensor([*starts, rows * seq_len], dtype=torch.int32, device=device)
    sources = torch.zeros(rows, dtype=torch.int64, device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), docs, (-1,) * rows, sources, rows * seq_len)


def run(config: Config) -> None:
    """Train `config` to its horizon, from the newest checkpoint of the run if there is one."""
    limits = config.training.init_timeout, config.training.step_timeout
    # The collectives' own limit comes after the watchdog's, which tells more.
    patience = max(limits) + 60 if all(limits) else 7 * 86_400
    try:
        with Watchdog(config.run_dir, "start", limits[0]) as watchdog, process_group(patience) as device:
            _share_run_directory(config)
            files = rank_log(config.run_dir / "logs", lambda: watchdog.phase)
            with files, Stop(config.training.time_limit) as stop, run_lock(config.run_dir), _checkpoints_lock(config):
                _run(config, device, stop, watchdog)
    except OSError as error:  # data that is gone, a disk that is full: nothing that a traceback would explain
        raise explained(error) from error
    except RuntimeError as error:
        if not re.search("(closed|reset) by peer|Broken pipe", str(error)):  # gloo's words
            raise
        raise UserError("another rank is gone; what it said last tells why") from error


def _run(config: Config, device: torch.device, stop: Stop, watchdog: Watchdog) -> None:
    """Find out where the run stands, build it, and train."""
    checkpointer = Checkpointer(checkpoints_of(config), config.checkpoint)
    newest = checkpointer.newest(config.total_steps)
    if newest is not None and step_of(newest.name) >= config.total_steps:
        with Exporter(config, checkpointer):  # the last export may have been interrupted
            watchdog.begin("exports", config.training.init_timeout)
        log.info("%s is finished: it has done %d steps.", config.run_dir, step_of(newest.name))
        log.info("Go on with a larger --training.steps=N, or start another run with --run.name=NAME.")
        return
    prepared = open_prepared(config)
    history = History(config, prepared.tokenizer_dir)
    start, only = newest, ()
    if newest is not None:
        history.go_on(checkpointer.train_state(newest))
    elif config.checkpoint.load:
        start, only = resolve(config.checkpoint.load), config.checkpoint.load_only
        history.start_from(checkpointer.train_state(start), start, whole=not only)
    config = fit_micro_batch(config, device)
    trainer = Trainer(config, device, prepared.bytes_per_token)
    if start is not None:
        trainer.load(checkpointer, start, only)
    stages = plan_stages(config, prepared, [Stage.from_json(stage) for stage in history.stages], trainer.step)
    history.stages = [stage.to_json() for stage in stages]
    order = Order(stages, prepared.rows)
    check_epochs(config, prepared, order)
    report_start(config, prepared, order, trainer.optimizer, trainer.layout, device, trainer.micro_batch_size)
    if is_main():
        (config.run_dir / "PREEMPTED").unlink(missing_ok=True)
        (config.run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
        shutil.copytree(prepared.tokenizer_dir, config.run_dir / "tokenizer", dirs_exist_ok=True)
    with memory_explained(config), Exporter(config, checkpointer) as exporter:
        _train(trainer, order, prepared, history, checkpointer, stop, watchdog)
        if trainer.step < config.total_steps:
            exporter.cancel()
        watchdog.begin("exports", config.training.init_timeout)
    if trainer.step < config.total_steps:
        if is_main():
            (config.run_dir / "PREEMPTED").write_text(f"{stop.reason} after step {trainer.step}\n", encoding="utf-8")
        log.info("stopped after step %d (%s) with a checkpoint; the same command goes on", trainer.step, stop.reason)
        return
    trainer.log_sample(prepared)
    if is_main():
        report_end(config)


def _checkpoints_lock(config: Config) -> AbstractContextManager[None]:
    """Hold the checkpoints too, where they are not in the run directory. Nothing locks an object store."""
    place = checkpoints_of(config)
    return run_lock(Path(place)) if config.checkpoint.dir and place.local else nullcontext()


def _share_run_directory(config: Config) -> None:
    """Make the run directory; a node that does not see what rank 0 wrote there does not share it."""
    mark = config.run_dir / f".shared-{broadcast_object(uuid.uuid4().hex)}"

    def touch() -> None:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()

    Ranks().on_main(touch)
    blind = [r for r, sees in enumerate(all_gather_object(mark.exists())) if not sees]
    if is_main():
        mark.unlink()
    if blind:
        raise UserError(f"run.dir: ranks {blind} do not see rank 0's {config.run_dir}; put it where all nodes share it")


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
    limits = config.training
    loader = Loader(prepared, order, trainer.batch_layout, trainer.step)
    writer = MetricsWriter(config, trainer.step) if is_main() else None
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
        first = trainer.step  # compiles
        while trainer.step < total and not stop.agreed():
            limit = limits.init_timeout if trainer.step == first else limits.step_timeout
            watchdog.begin(f"step {trainer.step + 1}", limit)
            lr = trainer.lr
            profiler.before_step(trainer.step + 1)
            with stop.unhurried(trainer.step == first):
                trainer.train_step(loader)
            checkpointer.poll()
            if due(config.metrics.log_every) or trainer.step == 1:  # the first loss tells most about a new model
                metrics = trainer.measure(order, prepared.names, window, loader, lr)
                if writer:
                    writer.train(metrics)
                trainer.bad_steps.check(_describe_batch(order, prepared, trainer.step - 1))
                gc.collect(1)
            with window.pause(), stop.unhurried():
                validation_loss = None
                if due(validate_every):
                    watchdog.begin(f"validation after step {trainer.step}", limits.init_timeout)
                    result = trainer.validate(prepared)
                    validation_loss = result["validation/loss"]
                    if writer:
                        writer.validation(trainer.step, result)
                if due(config.metrics.sample_every) and trainer.step < total:
                    watchdog.begin(f"sample after step {trainer.step}", limits.init_timeout)
                    trainer.log_sample(prepared)
                if due(config.checkpoint.every or total):
                    watchdog.begin(f"checkpoint of step {trainer.step}", limits.init_timeout)
                    trainer.save(checkpointer, history, validation_loss)
        watchdog.begin(f"last checkpoint, of step {trainer.step}", limits.init_timeout)
        stop.over()
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


def _describe_batch(order: Order, prepared: Prepared, step: int) -> str:
    """The global batch that `step` took, in words: its samples' numbers and the sources they come from."""
    first, size = order.batch(step)
    sources = sorted(set(order.samples(np.arange(first, first + size))[0].tolist()))
    names = ", ".join(prepared.sources[i].name for i in sources)
    return f"the last of them with samples g = {first} to {first + size - 1} from {names}"
