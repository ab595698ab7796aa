"""What a run says before its first step (the model, the data, the layout, the plan), and after its last."""

import logging
import math
import os
import shutil
import sys

import torch

from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.components.optimizer import describe, state_bytes
from torchxihe.config.options import Config
from torchxihe.data.loader import causal_pairs
from torchxihe.data.order import Order
from torchxihe.data.store import Prepared
from torchxihe.model.flops import parameter_counts, training_flops
from torchxihe.utils.words import BYTES, FLOPS, counted, scaled

log = logging.getLogger(__name__)


def report_start(
    config: Config,
    prepared: Prepared,
    order: Order,
    optimizer: torch.optim.Optimizer,
    *,
    devices: str,
    accumulation: int,
    shards: int,
) -> None:
    """Print the start-up table. `devices`: processes and their layout; `shards`: ranks that share one copy."""
    model, training = config.model, config.training
    total, _ = parameter_counts(model)
    tokens = order.batch(config.total_steps)[0] * config.data.seq_len
    rows, seq_len = training.global_batch_size, config.data.seq_len
    flops = training_flops(model, rows * seq_len, rows * causal_pairs(seq_len))  # at most: documents need less
    ramp = "".join(f", {sequences:,} rows until step {until:,}" for sequences, until in training.batch_ramp)
    shape = f"{model.num_hidden_layers} layers of {model.hidden_size}, {model.num_attention_heads} heads"
    rows = [
        ("run", f"{config.run_dir}"),
        ("model", f"{scaled(total)} parameters, {shape} of {model.head_dim}, vocabulary {model.vocab_size:,}"),
        ("device", f"{devices}, {training.dtype}"),
        (
            "batch",
            f"{counted(training.global_batch_size, 'row')} of {config.data.seq_len:,} = "
            f"{config.tokens_per_step:,} tokens, {accumulation} micro-batch{'es' * (accumulation > 1)} a step{ramp}",
        ),
        ("updates", describe(optimizer)),
        (
            "plan",
            f"{counted(config.total_steps, 'step')}, {scaled(tokens)} tokens, {scaled(flops, FLOPS)} a step",
        ),
    ]
    # Weights and gradients are float32.
    held = (8 * total + state_bytes(optimizer)) / shards
    if accumulation > 1 and not config.parallelism.reshard_after_forward:
        held += 4 * total * (1 - 1 / shards)  # gradients are whole until the last micro-batch
    rows.insert(3, ("memory", f"{scaled(held, BYTES)} a process for the model and optimizer, before activations"))
    weights = sum(source.weight for source in prepared.sources)
    for source, epochs in zip(prepared.sources, order.epochs(config.total_steps), strict=True):
        share = source.weight / weights
        held_out = f", {counted(source.valid_rows, 'row')} held out" if source.valid_rows else ""
        rows.append(
            (
                "data",
                f"{source.name}: {counted(source.documents, 'document')}, {scaled(source.tokens)} tokens, "
                f"{100 * share:.1f} % of the mixture, {epochs:.2f} epochs{held_out}",
            )
        )
    for documents in prepared.sets:
        size = f"{counted(documents.documents, 'document')}, {scaled(documents.tokens)} tokens"
        rows.append(("data", f"{documents.name}: {size}, {counted(documents.valid_rows, 'row')}, all held out"))
    for name, value in rows:
        log.info("%-8s %s", name, value)


def report_end(config: Config) -> None:
    """Print what a finished run came to, and what can be done with it."""
    metrics = config.run_dir / METRICS
    train, valid = read_metrics(metrics) if metrics.exists() else ([], [])  # deleted, for all that we know
    # An earlier start may have gone further than the checkpoint that the last one went on from.
    train, valid = ([line for line in lines if line["step"] <= config.total_steps] for lines in (train, valid))
    rows = []
    if train:
        last = train[-1]
        rows += [
            ("finished", f"{counted(int(last['step']), 'step')}, {scaled(last['tokens'])} tokens"),
            ("loss", f"{last['loss']:.4f}, {last['bpb']:.4f} bits a byte"),
        ]
    if valid:
        metric = config.checkpoint.best_metric
        best = min(valid, key=lambda line: line.get(metric, math.inf))  # an earlier start may have had other sets
        loss, bpb = valid[-1]["validation/loss"], valid[-1]["validation/bpb"]
        by = "" if config.checkpoint.best_by == "sources" else f" of {config.checkpoint.best_by}"
        at = f"best{by} {best.get(metric, math.nan):.4f} at step {best['step']:,}"
        rows.append(("held out", f"loss {loss:.4f}, {bpb:.4f} bits a byte ({at})"))
    # As it can be typed here: in a fresh clone the program is in .venv, which is not on the path.
    python = min(os.path.relpath(sys.executable), sys.executable, key=len)
    program = "torchxihe" if shutil.which("torchxihe") else f"{python} -m torchxihe"
    rows += [
        ("files", f"{config.run_dir}/ holds config.toml, {METRICS}, logs/, tokenizer/ and checkpoints/"),
        ("next", f'{program} generate {config.run_dir}{" --chat" * (config.data.format == "chat")} --prompt "..."'),
        ("", f"{program} export {config.run_dir} --out DIR"),
        ("", f"{program} plot {config.run_dir}"),
    ]
    for name, value in rows:
        log.info("%-8s %s", name, value)
