"""The table at the start of a run (model, data, processes, plan), its summary at the end, and while it compiles."""

import logging
import math
import os
import shlex
import shutil
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.components.optimizer import describe, state_bytes
from torchxihe.config.checks import find_warnings
from torchxihe.config.load import FINE_TUNING_LR
from torchxihe.config.options import Config
from torchxihe.data.loader import causal_pairs
from torchxihe.data.order import Order
from torchxihe.data.store import Prepared
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.kernels.select import select_kernels
from torchxihe.model.flops import parameter_counts, training_flops
from torchxihe.utils.device import default_device
from torchxihe.utils.distributed import is_main
from torchxihe.utils.words import BYTES, FLOPS, counted, duration, scaled

WIDTH = 120
"""Columns of a line of the tables."""
log = logging.getLogger(__name__)


def versions(config: Config) -> str:
    """Lines for `torchxihe --version`: Python, torch, CUDA, the GPUs, and the kernels of a run of `config` here."""
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"
    return (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, {platform}\n"
        f"GPU: {', '.join(f'{count} × {name}' for name, count in gpus.items()) or 'none'}\n"
        f"kernels of {config.run.name}: {select_kernels(config, default_device()).describe()}"
    )


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
    """Log the start-up table, and what the run is too short for.

    devices: the processes and how they are arranged; shards: ranks that share one copy of the parameters.
    """
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
            f"{config.tokens_per_step:,} tokens, {counted(accumulation, 'micro-batch')}/step{ramp}",
        ),
        ("tokenizer", describe_tokenizer(config, prepared)),
        ("optimizer", describe(optimizer) + _why_this_rate(config)),
        (
            "plan",
            f"{counted(config.total_steps, 'step')}, {scaled(tokens)} tokens, {scaled(flops, FLOPS)}/step",
        ),
    ]
    # Weights and gradients are float32.
    held = (8 * total + state_bytes(optimizer)) / shards
    if accumulation > 1 and not config.parallelism.reshard_after_forward:
        held += 4 * total * (1 - 1 / shards)  # gradients are not sharded until the last micro-batch
    rows.insert(3, ("memory", f"{scaled(held, BYTES)} per process for model and optimizer, without activations"))
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
    _log_table(rows)
    for warning in find_warnings(config) if is_main() else []:  # other ranks print warnings, too
        log.warning("%s", warning)


def _why_this_rate(config: Config) -> str:
    """Of fine-tuning at its default rate."""
    if config.data.format != "chat" or not config.checkpoint.load or config.optimizer.lr != FINE_TUNING_LR:
        return ""
    return ", fine-tuning's default: far below pre-training's, to retain what was learned; optimizer.lr sets another"


def describe_tokenizer(config: Config, prepared: Prepared) -> str:
    """Where the tokenizer is from, its size, and its EOS and BOS tokens."""
    tokenizer = load_tokenizer(prepared.tokenizer_dir)

    def token(index: int) -> str:
        return f"{tokenizer.decode([index], special=True)!r} ({index})"

    origin = config.tokenizer.path or f"trained on data.sources ({prepared.tokenizer_dir})"
    bos = token(prepared.bos_id) if prepared.bos_id >= 0 else "none"
    return f"{origin}: {prepared.vocab_size:,} tokens, EOS {token(prepared.eos_id)}, BOS {bos}"


def _log_table(rows: list[tuple[str, str]]) -> None:
    """Log names and values in two columns, of lines no longer than `WIDTH` where words allow it."""
    for name, value in rows:
        lines = textwrap.wrap(value, WIDTH - 11, break_long_words=False, break_on_hyphens=False)
        for i, line in enumerate(lines):
            log.info("%-10s %s", "" if i else name, line)


@contextmanager
def compiling() -> Iterator[None]:
    """Announce the first step, which compiles inside; on a terminal with the seconds that it has taken so far."""
    log.info("compiling (first step; takes 1–3 min)")
    start, done = time.monotonic(), threading.Event()

    def show() -> None:
        while not done.wait(1):
            print(f"\rcompiling, {duration(time.monotonic() - start)}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, name="compiling", daemon=True)
    if is_main() and sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
    log.info("compiled in %s", duration(time.monotonic() - start))


def report_end(config: Config) -> None:
    """Log the result of a finished run, its files, and commands to use it."""
    metrics = config.run_dir / METRICS
    train, valid = read_metrics(metrics) if metrics.exists() else ([], [])  # the user may have deleted it
    # An earlier start may have got further than the checkpoint from which the last one resumed.
    train, valid = ([line for line in lines if line["step"] <= config.total_steps] for lines in (train, valid))
    rows = []
    if train:
        last = train[-1]
        rows += [
            ("finished", f"{counted(int(last['step']), 'step')}, {scaled(last['tokens'])} tokens"),
            ("loss", f"{last['loss']:.4f}, {last['bpb']:.4f} bits/byte"),
        ]
    if valid:
        metric = config.checkpoint.best_metric
        best = min(valid, key=lambda line: line.get(metric, math.inf))  # an earlier start may have had other sets
        loss, bpb = valid[-1]["validation/loss"], valid[-1]["validation/bpb"]
        by = "" if config.checkpoint.best_by == "sources" else f" of {config.checkpoint.best_by}"
        at = f"best{by} {best.get(metric, math.nan):.4f} at step {best['step']:,}"
        rows.append(("validation", f"loss {loss:.4f}, {bpb:.4f} bits/byte ({at})"))
    # The program as it can be called here: in a fresh clone it is in .venv, which is not in PATH.
    python = min(os.path.relpath(sys.executable), sys.executable, key=len)
    program = "torchxihe" if shutil.which("torchxihe") else f"{shlex.quote(python)} -m torchxihe"
    run_dir = shlex.quote(str(config.run_dir))
    optional = [
        f"{name}/" for name in ("exports", "tensorboard", "wandb", "profile") if (config.run_dir / name).is_dir()
    ]
    files = ["config.toml", METRICS, "logs/", "tokenizer/", "checkpoints/" * (not config.checkpoint.dir), *optional]
    rows += [
        ("files", f"{config.run_dir}/: {', '.join(filter(None, files))}"),
        ("next", f'{program} generate {run_dir}{" --chat" * (config.data.format == "chat")} --prompt "..."'),
        ("", f"{program} export {run_dir} --out DIR"),
        ("", f"{program} plot {run_dir}"),
    ]
    if "tensorboard/" in optional:
        rows.append(("", f"tensorboard --logdir {run_dir}/tensorboard"))
    if list((config.run_dir / "wandb").glob("offline-run-*")):
        rows.append(("", f"wandb sync {run_dir}/wandb/offline-run-*"))
    for name, value in rows:
        log.info("%-10s %s", name, value)  # not wrapped: commands are copied
