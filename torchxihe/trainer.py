"""The trainer: build the parts, take a step, run to the horizon."""

import gc
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchxihe.components.checkpoint import Checkpointer, flat_state, resolve
from torchxihe.components.lr_scheduler import learning_rate
from torchxihe.components.manifest import step_of
from torchxihe.components.metrics import MetricsWriter, StepSums, Window
from torchxihe.components.optimizer import build_optimizer, clip_gradients, optimizer_step
from torchxihe.components.report import report_start
from torchxihe.components.validation import target_bytes, validate
from torchxihe.config import Config, UserError, dump_config
from torchxihe.data.loader import Batch, Loader, validation_batches
from torchxihe.data.order import Order, Stage, plan_micro_batches, plan_stages
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.model.decoder import flops_per_token
from torchxihe.model.generate import generate
from torchxihe.parallelisms.data_parallel import gradient_sync
from torchxihe.parallelisms.mesh import build_mesh
from torchxihe.parallelisms.parallelize import parallelize
from torchxihe.utils.device import memory_gib, peak_flops
from torchxihe.utils.distributed import (
    all_gather_object,
    all_reduce_sum,
    barrier,
    broadcast_object,
    is_main,
    process_group,
    rank,
    world_size,
)

log = logging.getLogger(__name__)


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
        self.optimizer = build_optimizer(self.model, config.optimizer)
        training = config.training
        self.accumulation, self.micro_batch_size = plan_micro_batches(
            training.global_batch_size, world_size(), training.micro_batch_size
        )
        self.bytes_per_token = torch.from_numpy(bytes_per_token).to(device)
        self.sums = StepSums(device)
        self.step = 0

    def train_step(self, loader: Iterator[Batch]) -> None:
        """One optimizer step on the next `accumulation` micro-batches; the host never waits for the device."""
        batches = [next(loader) for _ in range(self.accumulation)]
        tokens = all_reduce_sum(torch.full((), float(sum(batch.valid for batch in batches)), device=self.device))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i, batch in enumerate(batches):
            with gradient_sync(self.module, last=i == len(batches) - 1):
                loss = self.module(batch.tokens, batch.targets, batch.docs)
                (loss / tokens).backward()  # summed over ranks and micro-batches: the global mean over valid targets
            sums += torch.stack([loss.detach().double(), target_bytes(batch.targets, self.bytes_per_token).double()])
        loss, size = all_reduce_sum(sums)
        grad_norm = clip_gradients(self.model.parameters(), self.config.training.max_grad_norm)
        skip = ~torch.isfinite(grad_norm + loss)  # the same on all ranks; data and step number are consumed
        optimizer_step(self.optimizer, self.lr, skip)
        self.sums.add(loss, tokens, size, grad_norm, skip)
        self.step += 1

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
    def batch_layout(self) -> dict[str, Any]:
        """What a loader needs to know of this process and the model."""
        return {
            "seq_len": self.config.data.seq_len,
            "document_mask": self.config.data.document_mask,
            "rank": rank(),
            "world_size": world_size(),
            "micro_batch": self.micro_batch_size,
            "device": self.device,
        }

    def usage(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP/s utilisation at this rank's speed, where the device's peak is known, and its peak memory."""
        allocated, reserved = memory_gib(self.device)
        usage = {"memory_allocated_gib": allocated, "memory_reserved_gib": reserved}
        if peak := peak_flops(self.device):
            flops = flops_per_token(self.config.model, self.config.data.seq_len)
            usage["mfu"] = flops * tokens_per_second / peak
        return usage

    def load(self, checkpointer: Checkpointer, path: Path) -> tuple[Stage, ...]:
        """Continue from a step directory; returns the stages of the data order up to there."""
        state = checkpointer.load(path, flat_state(self.model, self.optimizer))
        self.step = state["step"]
        log.info("resumed from %s", path)
        return tuple(Stage.from_json(stage) for stage in state["stages"])

    def save(self, checkpointer: Checkpointer, stages: tuple[Stage, ...]) -> None:
        """Commit everything that the run consists of."""
        state = {"step": self.step, "stages": [stage.to_json() for stage in stages]}
        path = checkpointer.save(self.step, flat_state(self.model, self.optimizer), state)
        log.info("saved %s", path)

    def sample_text(self, prepared: Prepared) -> str:
        """Text that continues `metrics.sample_prompt`; all ranks must ask together."""
        options = self.config.metrics
        if not options.sample_tokens:
            return ""
        # Rank 0 of a training run needs no tokenizer library until its last second.
        from torchxihe.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(prepared.tokenizer_dir)
        prompt = tokenizer.encode(options.sample_prompt) or [prepared.eos_id]
        tokens = generate(
            self.module,
            prompt,
            max_tokens=options.sample_tokens,
            context=self.config.data.seq_len,
            vocab_size=prepared.vocab_size,
            stop_id=prepared.eos_id,
        )
        return options.sample_prompt + tokenizer.decode(list(tokens))


def run(config: Config) -> None:
    """Train `config` to its horizon, from the newest checkpoint of the run if there is one."""
    with process_group() as device:
        _share_run_directory(config)
        checkpointer = Checkpointer(config.run_dir / "checkpoints", config.checkpoint)
        newest = checkpointer.newest()
        if newest is not None and step_of(newest.name) >= config.total_steps:
            log.info("%s is finished: it has done %d steps.", config.run_dir, step_of(newest.name))
            log.info("Go on with a larger --training.steps=N, or start another run with --run.name=NAME.")
            return
        prepared = open_prepared(config)
        trainer = Trainer(config, device, prepared.bytes_per_token)
        report_start(config, prepared, trainer.layout, device, trainer.accumulation)
        start = newest or (resolve(config.checkpoint.load) if config.checkpoint.load else None)
        saved = trainer.load(checkpointer, start) if start is not None else ()
        stages = plan_stages(config, prepared, saved, trainer.step)
        if is_main():
            (config.run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
            shutil.copytree(prepared.tokenizer_dir, config.run_dir / "tokenizer", dirs_exist_ok=True)
        _train(trainer, checkpointer, prepared, stages)
        text = trainer.sample_text(prepared)
        if text:
            log.info("a sample of its writing:\n%s", text)
        log.info("finished: %s holds config.toml, metrics.jsonl, tokenizer/ and checkpoints/", config.run_dir)


def _share_run_directory(config: Config) -> None:
    """Make the run directory; a node that does not see what rank 0 wrote there does not share it."""
    mark = config.run_dir / f".shared-{broadcast_object(uuid.uuid4().hex)}"
    if is_main():
        config.run_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier()
    blind = [r for r, sees in enumerate(all_gather_object(mark.exists())) if not sees]
    if is_main():
        mark.unlink()
    if blind:
        raise UserError(f"run.dir: ranks {blind} do not see rank 0's {config.run_dir}; put it where all nodes share it")


def _train(trainer: Trainer, checkpointer: Checkpointer, prepared: Prepared, stages: tuple[Stage, ...]) -> None:
    """The loop: steps, and between them what is due."""
    config, total = trainer.config, trainer.config.total_steps
    order = Order(stages, {source.key: source.train_rows for source in prepared.sources})
    loader = Loader(prepared, order, step=trainer.step, accumulation=trainer.accumulation, **trainer.batch_layout)
    writer = MetricsWriter(config.run_dir / "metrics.jsonl", total) if is_main() else None
    window = Window(trainer.step)

    def due(every: int) -> bool:
        return bool(every) and (trainer.step % every == 0 or trainer.step == total)

    # A collection of all the objects that torch has made takes half a second, at a moment of its own on every rank.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        while trainer.step < total:
            lr = trainer.lr
            trainer.train_step(loader)
            first, size = order.batch(trainer.step - 1)
            if due(config.metrics.log_every):
                metrics = {"step": trainer.step, "tokens": (first + size) * config.data.seq_len, "lr": lr}
                metrics |= trainer.sums.read()
                metrics |= window.close(trainer.step, size * config.data.seq_len, loader.wait_seconds)
                metrics |= trainer.usage(metrics["tokens_per_second_per_gpu"])
                loader.wait_seconds = 0.0
                if writer:
                    writer.train(metrics)
                gc.collect(1)
            with window.pause():
                if due(config.validation.every):
                    batches = validation_batches(
                        prepared, max_tokens=config.validation.max_tokens, **trainer.batch_layout
                    )
                    result = validate(trainer.module, batches, trainer.bytes_per_token)
                    if writer:
                        writer.validation(trainer.step, result)
                if due(config.checkpoint.every or total):
                    trainer.save(checkpointer, stages)
        checkpointer.close()
    finally:
        loader.close()
        if writer:
            writer.close()
        gc.enable()
        gc.unfreeze()
