"""torchxihe and other trainers on one GPU: `python benchmarks/compare.py --config configs/xihe_120m_llama.toml`.

Every entry runs in its own process, in the order A B A B, with the same shape, tokens per step, precision (bfloat16,
float32 master weights), AdamW and random tokens. Documents are not masked and the head is not tied, because torchtitan
has neither document masks for its fastest attention nor tied heads. Figures are medians of timed steps of the best
round, and one formula counts the FLOPs of all. The other trainers are installed by the user, unmodified; a missing one
is reported.

Entries are `name@rows`; rows is the micro-batch size. Names: torchxihe, torchxihe_plain (without the extra [kernels]),
torchtitan, transformers; torchxihe_float8 and torchtitan_float8 use tensorwise float8.
"""

import time

STARTED = time.perf_counter()  # before torch is imported: the time to the first step includes the import

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import timed

from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.loader import causal_pairs
from torchxihe.errors import UserError
from torchxihe.model.flops import palm_flops_per_token, training_flops
from torchxihe.model.hf import hf_config
from torchxihe.utils.device import default_device, device_name, memory_gib, peak_flops

SHARED = ["--data.document_mask=false", "--model.tie_word_embeddings=false", "--optimizer.name=adamw"]
OURS = {
    "torchxihe": [],
    "torchxihe_plain": ["--model.attention=sdpa", "--model.mlp=torch"],
    "torchxihe_float8": ["--float8.recipe=tensorwise"],
}


def main() -> None:
    """Parse the command line; run all entries, or (in a child process) one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="CONFIG")
    parser.add_argument("--entries", default="", help="comma-separated name@rows (default: all, at the config's rows)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each entry (default 2)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run (default 20)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps before them (default 5)")
    parser.add_argument("--timeout", type=int, default=600, help="time limit of one run in seconds (default 600)")
    parser.add_argument("--json", default="", metavar="FILE", help="append every run to FILE, a line of JSON each")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    try:
        config = load_config(options.config, [*overrides, *SHARED])
        if options.peer:
            print(json.dumps(run_peer(options.peer, config, options.steps, options.warmup)))
            return
        rows = config.training.micro_batch_size
        names = ["torchxihe", "torchxihe_plain", "torchtitan", "transformers"]
        entries = options.entries.split(",") if options.entries else [f"{name}@{rows}" for name in names]
    except UserError as error:
        sys.exit(str(error))
    results: dict[str, list[dict[str, Any]]] = {entry: [] for entry in entries}
    for entry in [*entries] * options.rounds:
        result = run_entry(entry, options, overrides)
        results[entry].append(result)
        print(f"{entry:26} {result.get('tokens_per_second', 0):>9,} tokens/s  {result.get('error', '')}", flush=True)
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    print_table(config, results)


def run_entry(entry: str, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """One run of `name@rows` in a new process."""
    name, _, rows = entry.partition("@")
    here = Path(__file__).parent
    shared = [f"--config={options.config}", f"--steps={options.steps}", f"--warmup={options.warmup}", *overrides]
    shared += [*SHARED, f"--training.micro_batch_size={rows}"]
    if name in OURS:
        command = [sys.executable, str(here / "throughput.py"), *shared, *OURS[name]]
    else:
        command = [sys.executable, __file__, f"--peer={name}", *shared]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {"entry": entry, "error": f"timeout after {options.timeout} s"}
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "failed without an error message").splitlines()
        return {"entry": entry, "error": said[-1][:300]}
    result = json.loads(done.stdout.splitlines()[-1])
    return {
        "entry": entry,
        "tokens_per_second": result["tokens_per_second_per_gpu"],
        "step_ms": result["step_ms"],
        "peak_gib": result["memory_allocated_gib"],
        "seconds_to_first_step": result["seconds_to_first_step"],
        "loss": result["loss"],
        "version": result["versions"].get(name.partition("_")[0], ""),
    }


def run_peer(name: str, config: Config, steps: int, warmup: int) -> dict[str, Any]:
    """Train the shape of `config` with another trainer, in this process; the keys are those of throughput.py."""
    package, _, precision = name.partition("_")
    builders = {"torchtitan": torchtitan_step, "transformers": transformers_step}
    if package not in builders or precision not in ("", "float8"):
        raise UserError(f"--entries: no entry {name}; use one of {', '.join([*OURS, *builders])}")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed (pip install {package})")
    device = default_device()
    step = builders[package](config, device, precision == "float8")
    loss = float(step())
    to_first_step = time.perf_counter() - STARTED
    for _ in range(warmup - 1):
        step()
    seconds = timed(step, steps, device)
    loss = float(step())
    median = float(np.median(seconds))
    return {
        "tokens_per_second_per_gpu": round(config.tokens_per_step / median),
        "step_ms": round(1e3 * median, 2),
        "memory_allocated_gib": round(memory_gib(device)[0], 2),
        "seconds_to_first_step": round(to_first_step, 1),
        "loss": round(loss, 4),
        "versions": {package: importlib.metadata.version(package)},
    }


def random_rows(config: Config) -> torch.Tensor:
    """A micro-batch of random tokens, int64 [rows, T + 1]."""
    shape = (config.training.micro_batch_size, config.data.seq_len + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def accumulation_of(config: Config) -> int:
    """Micro-batches per step. Raises UserError if the global batch is not a multiple of the micro-batch."""
    if config.training.global_batch_size % config.training.micro_batch_size:
        raise UserError("training.global_batch_size: must be a multiple of the rows of every entry")
    return config.training.global_batch_size // config.training.micro_batch_size


def transformers_step(config: Config, device: torch.device, float8: bool) -> Callable[[], torch.Tensor]:
    """`AutoModelForCausalLM`: SDPA, whole-model compile, autocast, fused AdamW, clipping."""
    if float8:
        raise UserError("--entries: transformers_float8: transformers has no float8 training; use transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    values = hf_config(
        config.model, seq_len=config.data.seq_len, vocab_size=config.model.vocab_size, eos_id=-1, bos_id=-1
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="sdpa")
    model = model.float().train()
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    accumulation, tokens = accumulation_of(config), random_rows(config)[:, :-1].to(device)

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for _ in range(accumulation):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def torchtitan_step(config: Config, device: torch.device, float8: bool) -> Callable[[], torch.Tensor]:
    """torchtitan's trainer and Llama 3: compiled, no activation checkpointing, otherwise its defaults."""
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    model = config.model
    if model.qk_norm or model.head_dim * model.num_attention_heads != model.hidden_size:
        raise UserError(
            "torchtitan: its Llama has no QK-norm, and needs heads * head_dim = hidden_size; use a config such as "
            "configs/xihe_120m_llama.toml"
        )
    shape = TransformerModelArgs(
        dim=model.hidden_size,
        n_layers=model.num_hidden_layers,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.num_key_value_heads,
        vocab_size=model.vocab_size,
        # It rounds ffn_dim_multiplier * 8/3 * dim up to a multiple: of the width itself, that is the width.
        multiple_of=model.intermediate_size,
        ffn_dim_multiplier=0.99 * model.intermediate_size / (8 / 3 * model.hidden_size),
        norm_eps=model.rms_norm_eps,
        rope_theta=model.rope_theta,
    )
    rows = random_rows(config)
    batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batches(**_: Any) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return itertools.repeat(({"input": batch[0]}, batch[1]))  # on the host, like the batches of its own loader

    spec = dataclasses.replace(
        get_train_spec(), model_args={"ours": shape}, build_dataloader_fn=batches, build_tokenizer_fn=None
    )
    register_train_spec("compare", spec)
    job = JobConfig()
    job.job.dump_folder = tempfile.mkdtemp()
    job.model.name, job.model.flavor = "compare", "ours"
    job.training.local_batch_size, job.training.global_batch_size = len(rows), config.training.global_batch_size
    job.training.seq_len, job.training.steps = config.data.seq_len, 10**6
    job.compile.enable = True
    job.activation_checkpoint.mode = "none"
    job.metrics.log_freq = 10**9
    if float8:
        job.model.converters = ["quantize.linear.float8"]
        job.quantize.linear.float8.filter_fqns = ["output"]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    os.environ.update(alone)
    trainer = Trainer(job)
    losses: list[torch.Tensor] = []
    forward_backward = trainer.forward_backward_step

    def kept(**inputs: Any) -> torch.Tensor:  # torchtitan's step returns nothing
        losses.append(forward_backward(**inputs).detach())
        return losses[-1]

    trainer.forward_backward_step = kept
    data = trainer.batch_generator(trainer.dataloader)

    def step() -> torch.Tensor:
        losses.clear()
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(data)
        return torch.stack(losses).sum()

    return step


def print_table(config: Config, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print a Markdown table of the comparison; ratios are to torchtitan's best run, or else to the first entry."""
    device = default_device()
    best = {
        entry: max(done, key=lambda run: run["tokens_per_second"])
        for entry, runs in results.items()
        if (done := [run for run in runs if "error" not in run])
    }
    peers = [run["tokens_per_second"] for entry, run in best.items() if entry.startswith("torchtitan@")]
    base = max(peers) if peers else next((run["tokens_per_second"] for run in best.values()), 0)
    model, seq_len, peak = config.model, config.data.seq_len, peak_flops(device)
    flops = training_flops(model, seq_len, causal_pairs(seq_len)) / seq_len, palm_flops_per_token(model, seq_len)
    print(f"\n{device_name(device)}, torch {torch.__version__}, {config.tokens_per_step:,} tokens per step\n")
    print("| Entry | Version | tokens/s, best (all) | Ratio | MFU (PaLM's) | Peak GiB | First step s, cold (warm) |")
    print("|---|---|---|---|---|---|---|")
    for entry, runs in results.items():
        if entry not in best:
            print(f"| `{entry}` | | not measured: {runs[0]['error']} | | | | |")
            continue
        run = best[entry]
        every = ", ".join(f"{r['tokens_per_second']:,}" if "error" not in r else r["error"] for r in runs)
        mfu = [f"{100 * per_token * run['tokens_per_second'] / peak:.1f}" for per_token in flops] if peak else []
        shown = f"{mfu[0]} % ({mfu[1]} %)" if mfu else "unknown device"
        starts = [r["seconds_to_first_step"] for r in runs if "error" not in r]
        print(
            f"| `{entry}` | {run['version']} | {run['tokens_per_second']:,} ({every}) | "
            f"{run['tokens_per_second'] / base:.3f} | {shown} | {run['peak_gib']} | "
            f"{starts[0]} ({min(starts[1:], default='-')}) |"
        )


if __name__ == "__main__":
    main()
