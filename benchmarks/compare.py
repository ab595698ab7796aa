"""torchxihe and other trainers: `python benchmarks/compare.py --config configs/xihe_120m_llama.toml`.

Every entry runs in its own process, in the order A B A B, with the same shape, tokens per step, precision (bfloat16,
float32 master weights), AdamW and random tokens. Documents are not masked and the head is not tied, because torchtitan
has neither document masks for its fastest attention nor tied heads. Figures are medians of timed steps of the best
round, and one formula counts the FLOPs of all. The other trainers are installed by the user, unmodified; a missing one
is reported.

Entries are `name@rows`; rows is the micro-batch size. Names: torchxihe, torchxihe_plain (without the extra [kernels]),
torchtitan, transformers; torchxihe_float8 and torchtitan_float8 use tensorwise float8 (torchtitan with float8
all-gathers). With `--gpus N` each entry runs on N GPUs of this machine, torchxihe and torchtitan in the layout that the
config and flags such as `--parallelism.tp=2` name, with the same activation checkpointing ("selective": by operator).
Where a layout is pp and tp alone, torchtitan has no mixed precision: its weights and moments are bfloat16 there.
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
import signal
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
LAUNCHER_SECONDS = 45
"""torchrun gives its workers 30 s after SIGTERM, and then kills them."""


def main() -> None:
    """Parse the command line; run all entries, or (in a child process) one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="CONFIG")
    parser.add_argument("--entries", default="", help="comma-separated name@rows (default: all, at the config's rows)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of this machine for each entry (default 1)")
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
            result = run_peer(options.peer, config, options.steps, options.warmup)
            if os.environ.get("RANK", "0") == "0":
                print(json.dumps(result))
            return
        rows = config.training.micro_batch_size
        names = ["torchxihe", "torchxihe_plain", "torchtitan", "transformers"]
        entries = options.entries.split(",") if options.entries else [f"{name}@{rows}" for name in names]
    except UserError as error:
        sys.exit(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # as Ctrl-C does: ends the run under way
    results: dict[str, list[dict[str, Any]]] = {entry: [] for entry in entries}
    for entry in [*entries] * options.rounds:
        result = run_entry(entry, options, overrides)
        results[entry].append(result)
        print(f"{entry:26} {result.get('tokens_per_second', 0):>9,} tokens/s  {result.get('error', '')}", flush=True)
        if options.json:
            with Path(options.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    print_table(config, results, options.gpus)


def run_entry(entry: str, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """One run of `name@rows` in a new process."""
    name, _, rows = entry.partition("@")
    here = Path(__file__).parent
    shared = [f"--config={options.config}", f"--steps={options.steps}", f"--warmup={options.warmup}", *overrides]
    shared += [*SHARED, f"--training.micro_batch_size={rows}"]
    command = [sys.executable]
    if options.gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}"]
    if name in OURS:
        command += [str(here / "throughput.py"), *shared, *OURS[name]]
    else:
        command += [__file__, f"--peer={name}", *shared]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        stdout, stderr = run.communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        stop(run)
        said = run.communicate()[1].splitlines()
        said = list(itertools.takewhile(lambda line: "death signal" not in line, said))  # torchrun's, of being stopped
        last = f"; it last said: {said[-1][:200]}" if said else ""
        return {"entry": entry, "error": f"timeout after {options.timeout} s{last}"}
    finally:
        stop(run)
    if run.returncode:
        said = (stderr.strip() or stdout.strip() or "failed without an error message").splitlines()
        errors = [line for line in said if "Error" in line and "ChildFailedError" not in line]
        return {"entry": entry, "error": (errors or said)[-1][:300]}
    result = json.loads(stdout.splitlines()[-1])
    return {
        "entry": entry,
        "tokens_per_second": result["tokens_per_second_per_gpu"],
        "step_ms": result["step_ms"],
        "peak_gib": result["memory_allocated_gib"],
        "reserved_gib": result["memory_reserved_gib"],
        "seconds_to_first_step": result["seconds_to_first_step"],
        "loss": result["loss"],
        "version": result["versions"].get(name.partition("_")[0], ""),
    }


def stop(run: subprocess.Popen[str]) -> None:
    """End a run that has not ended. The launcher's workers have sessions of their own: only it can end them."""
    run.terminate()
    try:
        run.wait(timeout=LAUNCHER_SECONDS)
    except subprocess.TimeoutExpired:
        run.kill()


def run_peer(name: str, config: Config, steps: int, warmup: int) -> dict[str, Any]:
    """Train the shape of `config` with another trainer, in this process; the keys are those of throughput.py."""
    package, _, precision = name.partition("_")
    builders = {"torchtitan": torchtitan_step, "transformers": transformers_step}
    if package not in builders or precision not in ("", "float8"):
        raise UserError(f"--entries: no entry {name}; use one of {', '.join([*OURS, *builders])}")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed (pip install {package})")
    device = default_device(int(os.environ.get("LOCAL_RANK", "0")))
    step = builders[package](config, device, precision == "float8")
    loss = float(step())
    to_first_step = time.perf_counter() - STARTED
    for _ in range(warmup - 1):
        step()
    seconds = timed(step, steps, device)
    loss = float(step())
    median = float(np.median(seconds))
    return {
        "tokens_per_second_per_gpu": round(config.tokens_per_step / median / int(os.environ.get("WORLD_SIZE", "1"))),
        "step_ms": round(1e3 * median, 2),
        "memory_allocated_gib": round(memory_gib(device)[0], 2),
        "memory_reserved_gib": round(memory_gib(device)[1], 2),
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
    if "WORLD_SIZE" in os.environ:
        raise UserError("--entries: transformers runs on one GPU only; leave --gpus out")
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
    """torchtitan's trainer and Llama 3: compiled, layout and checkpointing of `config`, otherwise its defaults."""
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

    def batches(**_: Any) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        while True:  # on the host, like the batches of its own loader; it replaces what is in the dictionary
            yield {"input": inputs}, labels

    spec = dataclasses.replace(
        get_train_spec(), model_args={"ours": shape}, build_dataloader_fn=batches, build_tokenizer_fn=None
    )
    register_train_spec("compare", spec)
    job = JobConfig()
    job.job.dump_folder = tempfile.mkdtemp()
    job.model.name, job.model.flavor = "compare", "ours"
    job.training.local_batch_size, job.training.global_batch_size = len(rows), config.training.global_batch_size
    layout, theirs = config.parallelism, job.parallelism
    theirs.data_parallel_shard_degree, theirs.data_parallel_replicate_degree = layout.dp_shard, layout.dp_replicate
    theirs.tensor_parallel_degree, theirs.context_parallel_degree = layout.tp, layout.cp
    if layout.pp > 1:  # its local batch is cut into micro-batches
        theirs.pipeline_parallel_degree, theirs.pipeline_parallel_microbatch_size = layout.pp, len(rows)
        theirs.pipeline_parallel_schedule = {"1F1B": "1F1B", "interleaved": "Interleaved1F1B"}[layout.pp_schedule]
        sharing = layout.pp * layout.tp * layout.cp
        job.training.local_batch_size = config.training.global_batch_size * sharing // int(os.environ["WORLD_SIZE"])
        rows = rows.repeat(job.training.local_batch_size // len(rows), 1)
    if int(os.environ.get("WORLD_SIZE", "1")) == layout.pp * layout.tp > 1:
        job.training.dtype = "bfloat16"  # its mixed precision is FSDP's, and here it has none
    job.training.seq_len, job.training.steps = config.data.seq_len, 10**6
    job.compile.enable = True
    job.activation_checkpoint.mode = layout.activation_checkpointing
    job.activation_checkpoint.selective_ac_option = "op"
    job.metrics.log_freq = 10**9
    if float8:
        job.model.converters = ["quantize.linear.float8"]
        job.quantize.linear.float8.filter_fqns = ["output"]
        job.quantize.linear.float8.enable_fsdp_float8_all_gather = "WORLD_SIZE" in os.environ
        job.quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp = "WORLD_SIZE" in os.environ
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({name: value for name, value in alone.items() if name not in os.environ})
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


def print_table(config: Config, results: dict[str, list[dict[str, Any]]], gpus: int) -> None:
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
    where = f"{gpus} × {device_name(device)}" if gpus > 1 else device_name(device)
    print(f"\n{where}, torch {torch.__version__}, {config.tokens_per_step:,} tokens per step\n")
    columns = (
        "Version | tokens/s/GPU, best (all) | Ratio | MFU (PaLM's) | Peak GiB (reserved) | First step s, cold (warm)"
    )
    print(f"| Entry | {columns} |")
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
            f"{run['tokens_per_second'] / base:.3f} | {shown} | {run['peak_gib']} ({run['reserved_gib']}) | "
            f"{starts[0]} ({min(starts[1:], default='-')}) |"
        )


if __name__ == "__main__":
    main()
