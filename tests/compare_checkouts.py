"""Compare two checkouts bitwise: `python tests/compare_checkouts.py record CHECKOUT FILE`, then `diff FILE FILE`.

`record` trains every case below with the code of CHECKOUT, through its command line only, in a temporary directory,
and writes to FILE (JSON): loss, gradient norm and every other reproducible metric of each step, the samples in training
order, keys, shapes, dtypes and hashes of the checkpoint's tensors, and the hash of each exported tensor. `diff` prints
what differs between two such files, and exits with 1 if anything does. A refactor is proven by an empty diff.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = "--training.steps=30"
SHARED = [STEPS, "--metrics.log_every=1", "--validation.every=15", "--checkpoint.every=15"]

# Name, preset, processes, overrides. Later cases may load checkpoints of earlier ones.
CASES: list[tuple[str, str, int, list[str]]] = [
    ("xihe_debug", "xihe_debug", 1, []),
    ("xihe_debug_sft", "xihe_debug_sft", 1, []),
    ("fsdp", "xihe_debug", 2, ["--training.micro_batch_size=2"]),
    ("ddp", "xihe_debug", 2, ["--parallelism.dp_replicate=2", "--training.micro_batch_size=2"]),
    ("muon", "xihe_debug", 2, ["--optimizer.name=muon", "--training.micro_batch_size=2"]),
    ("muon_ddp", "xihe_debug", 2, ["--optimizer.name=muon", "--parallelism.dp_replicate=2"]),
    ("ramp", "xihe_debug", 1, ["--training.batch_ramp=[[3,10],[5,20]]", "--training.skip_spikes_beyond=3.0"]),
    ("compiled", "xihe_debug", 1, ["--training.compile=true", "--parallelism.activation_checkpointing=selective"]),
    ("llama", "xihe_debug", 1, ["--model.qk_norm=false", "--model.tie_word_embeddings=false", "--data.packing=concat"]),
]

READ = """
import hashlib, json, sys
from pathlib import Path
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from safetensors import safe_open

def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

step, exported = map(Path, sys.argv[1:])
reader = FileSystemReader(step)
meta = reader.read_metadata().state_dict_metadata
state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in meta.items()}
load(state, storage_reader=FileSystemReader(step), no_dist=True)
tensors = {key: [list(value.shape), str(value.dtype), digest(value)] for key, value in sorted(state.items())}
with safe_open(exported / "model.safetensors", framework="pt") as file:
    export = {name: digest(file.get_tensor(name)) for name in sorted(file.keys())}
print(json.dumps({"checkpoint": tensors, "export": export}))
"""


def record(checkout: Path) -> dict[str, Any]:
    """The results of every case with the code of `checkout`."""
    result = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

        def python(*args: str, processes: int = 1) -> str:
            command = [sys.executable, "-P", *args]
            env = {**environment, "NGPU": str(processes)}
            done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(args)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            return done.stdout

        for name, preset, processes, flags in CASES:
            config = str(checkout / "configs" / f"{preset}.toml")
            overrides = [*SHARED, f"--run.name={name}", *flags]
            python("-m", "torchxihe", "launch", config, *overrides, processes=processes)
            rows = python("-m", "torchxihe", "data", config, *overrides, "--rows=240").partition("=== sample")[2]
            run = Path(scratch) / "runs" / name
            python("-m", "torchxihe", "export", str(run), f"--out={scratch}/exported/{name}")
            tensors = python("-c", READ, str(run / "checkpoints/step-00000030"), f"{scratch}/exported/{name}")
            result[name] = {
                "metrics": metrics(run / "metrics.jsonl"),
                "samples": hashlib.sha256(rows.encode()).hexdigest(),
                **json.loads(tensors),
            }
            print(f"{name}: last loss {result[name]['metrics'][-1]}", file=sys.stderr, flush=True)
    return result


def metrics(path: Path) -> list[dict[str, Any]]:
    """The reproducible metrics of a run: without times and memory."""
    kept = ("step", "tokens", "loss", "bpb", "grad_norm", "lr", "skipped")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in kept or k.startswith(("validation/", "loss/"))} for line in lines]


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """The differences of two recordings, one line each."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted({*a, *b}) for d in differences(a.get(key), b.get(key), f"{at}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{at}/{i}")]
    return [] if a == b else [f"{at}: {a!r} | {b!r}"]


def main() -> None:
    """Record one checkout, or compare two recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "diff"))
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    if options.action == "record":
        options.second.write_text(json.dumps(record(options.first.resolve()), indent=1))
        return
    found = differences(*(json.loads(path.read_text()) for path in (options.first, options.second)))
    print("\n".join(found[:40]) or "identical")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
