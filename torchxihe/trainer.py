"""The trainer: a model, its optimizer, and one step of training."""

import itertools
import logging
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.history import History
from torchxihe.components.checkpoint.state import described_state, flat_state
from torchxihe.components.checkpoint.storage import Location
from torchxihe.components.observe import StepSums, sums_by_source
from torchxihe.components.optimizer import (
    BadSteps,
    build_optimizer,
    gradient_norm,
    learning_rate,
    optimizer_step,
)
from torchxihe.components.validation import validation_metrics, validation_sums
from torchxihe.config.checks import micro_batch_limit
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch, BatchSpec, micro_batch_rows, micro_batches, random_batch, validation_batches
from torchxihe.data.prepare.chat import Chat
from torchxihe.data.store import Prepared
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.kernels.select import Kernels, select_kernels
from torchxihe.model.generate import generate
from torchxihe.parallelisms.compile import compiles
from torchxihe.parallelisms.context_parallel import context_method, cut_for, full_rows
from torchxihe.parallelisms.data_parallel import gradient_sync
from torchxihe.parallelisms.dims import ParallelDims, build_dims
from torchxihe.parallelisms.parallelize import parallelize
from torchxihe.parallelisms.pipeline_parallel import Pipeline
from torchxihe.parallelisms.tensor_parallel import sum_replicated_gradients

log = logging.getLogger(__name__)


class Trainer:
    """A model, its optimizer and the step; `step` counts the optimizer steps taken."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        bytes_per_token: np.ndarray,
        *,
        dims: ParallelDims | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """Build everything that the step needs; `bytes_per_token` is int32 [V or less].

        `dims` and `kernels` are what `config` asks for unless given.
        """
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.config, self.device = config, device
        self.dims = dims or build_dims(config.parallelism)
        self.model, self.module = parallelize(config, device, self.dims, kernels or select_kernels(config, device))
        replicas = self.dims.group("dp_replicate")
        training = config.training
        dtype = getattr(torch, training.dtype)
        self.optimizer = build_optimizer(self.model, config.optimizer, replicas, dtype, compile=compiles(training))
        data_ranks = self.dims.size("data")
        self.micro_batch_size = micro_batch_rows(
            training.global_batch_size, data_ranks, micro_batch_limit(config, data_ranks)
        )
        copied = self.model.copied if isinstance(self.model, Pipeline) else frozenset()
        self.own_parameters = [p for name, p in self.model.named_parameters() if name not in copied]
        self.bytes_per_token = torch.from_numpy(bytes_per_token).to(device)
        self.sums = StepSums(device, len(config.data.sources))
        self.keep_shards = config.parallelism.reshard_after_forward  # less memory, more traffic
        self.bad_steps = BadSteps(training, device)
        self.step = 0

    def train_step(self, loader: Iterator[Batch]) -> None:
        """One optimizer step on the next `accumulation` micro-batches; the host never waits for the device."""
        batches = [next(loader) for _ in range(self.accumulation)]
        tokens = torch.full((), float(sum(batch.valid for batch in batches)), device=self.device)
        tokens = self.dims.sum(tokens, "data").clamp(min=1)  # a batch of prompts only has none
        losses = self._forward_backward(batches, tokens)
        sources = len(self.config.data.sources)
        sums_S3 = torch.zeros(sources, 3, dtype=torch.float64, device=self.device)
        for losses_B, batch in zip(losses, batches, strict=False):  # a pipeline's last stage has them, the others none
            sums_S3 += sums_by_source(losses_B, batch, self.bytes_per_token, sources)
        sum_replicated_gradients(self.model, self.dims)
        sums_S3 = self.dims.sum(sums_S3, "loss")
        loss = sums_S3[:, 0].sum() / tokens
        grad_norm = gradient_norm(self.own_parameters, self.dims.sum, self.dims.size("stage"))
        skip = self.bad_steps.judge(loss, grad_norm)  # the same on all ranks; data and step are consumed
        optimizer_step(self.optimizer, self.lr, grad_norm, self.config.training.max_grad_norm, skip)
        self.sums.add(sums_S3, grad_norm, skip)
        self.step += 1

    def _forward_backward(self, batches: list[Batch], tokens: Tensor) -> list[Tensor]:
        """The passes of a step; returns each micro-batch's losses by row (float32 [B])."""
        if isinstance(self.model, Pipeline):
            return self.model.forward_backward(batches, tokens)
        losses = []
        for i, batch in enumerate(batches):
            with gradient_sync(self.module, last=i == len(batches) - 1, keep_shards=self.keep_shards):
                loss, losses_B = self.module(batch.tokens, batch.targets, batch.cu_seqlens, batch.positions)
                (loss / tokens).backward()  # summed over ranks and micro-batches: the global mean over valid targets
            losses.append(losses_B)
        return losses

    @property
    def accumulation(self) -> int:
        """Micro-batches of the step about to be taken."""
        return self.accumulation_at(self.step)

    def accumulation_at(self, step: int) -> int:
        """Micro-batches of `step`, counted from 0."""
        return micro_batches(self.config.batch_size(step), self.dims.size("data"), self.micro_batch_size)

    @property
    def lr(self) -> float:
        """Learning rate of the step about to be taken."""
        return learning_rate(self.step, self.config.total_steps, self.config.optimizer.lr, self.config.lr_scheduler)

    @property
    def batch_spec(self) -> BatchSpec:
        """What a loader needs to know of this process and the model."""
        data, dims = self.config.data, self.dims
        place = dims.rank("data"), dims.size("data")
        cut = cut_for(dims, context_method(self.config, dims.cp))
        return BatchSpec(data.seq_len, self.micro_batch_size, self.device, data.document_mask, *place, cut)

    def validate(self, prepared: Prepared) -> dict[str, float]:
        """Loss on the held-out documents, in total, by source and by set; all ranks must ask together."""
        batches = validation_batches(prepared, self.batch_spec, self.config.validation.max_tokens)
        sums_S3 = validation_sums(self.module, batches, self.bytes_per_token, len(prepared.held_out))
        return validation_metrics(self.dims.sum(sums_S3, "loss"), prepared)

    def sample(self, prepared: Prepared) -> str:
        """Text that continues `metrics.sample_prompt`, or answers it; all ranks must ask together."""
        options = self.config.metrics
        tokenizer = load_tokenizer(prepared.tokenizer_dir)
        text, stop_id = options.sample_prompt, prepared.eos_id
        prompt = tokenizer.encode(text) or [stop_id]
        if self.config.data.format == "chat":
            chat = Chat(prepared.tokenizer_dir)
            prompt, stop_id = chat.prompt([{"role": "user", "content": text}]), chat.end_of_turn
            text += "\n"
        with full_rows(self.model):
            tokens = generate(
                self.module,
                prompt,
                max_tokens=options.sample_tokens,
                context=self.config.data.seq_len,
                vocab_size=prepared.vocab_size,
                stop_id=stop_id,
            )
            return text + tokenizer.decode(list(tokens))

    def load(self, checkpointer: Checkpointer, path: Location, only: tuple[str, ...] = ()) -> None:
        """Load a step directory; with parts in `only`, only these, and start at step 0."""
        state = checkpointer.load(path, self.state(), only)
        self.step = 0 if only else state["step"]

    def save(self, checkpointer: Checkpointer, history: History, validation_loss: float | None = None) -> None:
        """Save the run's state; after the last step, with `checkpoint.final = "model"`, the model only."""
        full = self.step < self.config.total_steps or self.config.checkpoint.final == "full"
        train_state = history.to_json(self.step)
        checkpointer.save(self.step, self.state(full), train_state, validation_loss, expected=self.expected)

    def state(self, full: bool = True) -> dict[str, Tensor]:
        """Every tensor of this rank's part of the run's state by name; with `full = False` those of the model only."""
        if not full:
            return flat_state(self.model, None)
        return flat_state(self.model, self.optimizer) | self.bad_steps.state()

    @property
    def expected(self) -> set[str] | None:
        """Names that some rank's state must have; None: every rank's state has all names."""
        return {*described_state(self.config.model)} if isinstance(self.model, Pipeline) else None


def trial_step(config: Config, device: torch.device) -> None:
    """Build a trainer and take one step on random tokens; nothing is kept."""
    trainer = Trainer(config, device, np.ones(config.model.vocab_size, np.int32))
    batch = random_batch(trainer.batch_spec, config.model.vocab_size, documents=1)
    trainer.train_step(itertools.repeat(batch))
