"""Throughput of data preparation and loading, compared with `datasets.map` on the same corpus and tokenizer.

    python benchmarks/data.py                       # a corpus of 100 MB
    python benchmarks/data.py --megabytes 1000      # for peak memory, which is polled and summed over all processes
    python benchmarks/data.py --permute             # only the randomness of the order: 10^6 indices, 100 keys

The corpus is JSON lines of Python source files ({stdlib} and {site-packages}), repeated with a number prepended up to
the requested size. Training the tokenizer is not measured. Every part runs in its own process.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from torchxihe.config.options import Config, Source, Tokenizer
from torchxihe.data.order import Order, Stage, make_quotas, permute
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.prepare.sources import find_pieces

CONFIG: dict[str, Any] = {
    "model": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 8,
        "vocab_size": 50304,
    },
    "training": {"steps": 1000, "global_batch_size": 64, "micro_batch_size": 64},
    "validation": {"fraction": 0.005},
}


def make_corpus(path: Path, size: int) -> None:
    """JSON lines of about `size` bytes."""
    pieces = [
        piece
        for name in ("{stdlib}", "{site-packages}")
        for piece in find_pieces(Source(path=name, glob="**/*.py"), name)
    ]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for turn in count():
            for piece in pieces:
                text = Path(piece.path).read_text(encoding="utf-8", errors="ignore")
                written += file.write(json.dumps({"text": f"# {turn}\n{text}"}) + "\n")
                if written > size:
                    return


def make_config(folder: Path, seq_len: int, **tokenizer: Any) -> Config:
    """A config whose only source is the corpus in `folder`."""
    data = {"sources": [{"path": str(folder / "corpus.jsonl")}], "seq_len": seq_len, "cache_dir": str(folder / "cache")}
    return Config.model_validate({**CONFIG, "data": data, "tokenizer": tokenizer})


# The parts. Each runs in its own process and returns the figures that are printed as one JSON object.


def run_prepare(folder: Path) -> dict[str, float]:
    """`torchxihe prepare` without training the tokenizer."""
    from torchxihe.data.prepare.pipeline import prepare

    started = time.perf_counter()
    prepared = prepare(make_config(folder, 1024, path=str(folder / "tokenizer")))
    return {"seconds": time.perf_counter() - started, "tokens": prepared.sources[0].tokens}


def run_map(folder: Path) -> dict[str, float]:
    """`datasets.map(tokenize, batched=True, num_proc=cores)`; loading is timed separately."""
    import datasets
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch_fast(rows["text"])]}

    loaded = time.perf_counter()
    dataset = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "datasets")
    )
    started = time.perf_counter()
    mapped = dataset.map(tokenize, batched=True, num_proc=_cores(), remove_columns=["text"])
    seconds = time.perf_counter() - started
    ids = sum(len(chunk.flatten()) for chunk in mapped.data.column("ids").chunks)
    ends = len(mapped)  # one EOS per document, which `prepare` writes and counts
    return {"seconds": seconds, "load_seconds": started - loaded, "tokens": ids + ends}


def run_loader(folder: Path) -> dict[str, float]:
    """The loader on one core; importing torch is not measured."""
    import torch

    started = time.perf_counter()
    from torchxihe.data.loader import BatchSpec, Loader
    from torchxihe.data.order import plan_stages
    from torchxihe.data.store import open_prepared

    config = make_config(folder, 1024, path=str(folder / "tokenizer"))
    prepared = open_prepared(config)
    order = Order(plan_stages(config, prepared), prepared.rows)
    loader = Loader(prepared, order, BatchSpec(1024, 64, torch.device("cpu")), step=10**9 // 64)
    next(loader)
    first = time.perf_counter() - started
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rates = []
    for _ in range(21):  # the median is reported, because other programs share the core and its caches
        cpu = time.process_time()
        for _ in range(50):
            next(loader)
        rates.append(50 * 64 * 1024 / (time.process_time() - cpu))
    loader.close()
    return {"first_batch_seconds": first, "tokens_per_cpu_second": sorted(rates)[10], "best": max(rates)}


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {"prepare": run_prepare, "map": run_map, "loader": run_loader}


def measure(part: str, folder: Path) -> dict[str, float]:
    """Run a part in its own process; its figures, CPU seconds, and the peak memory of the process and its children."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    before = os.times()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    most = 0.0
    while process.poll() is None:
        most = max(most, _resident(process.pid))
        time.sleep(0.2)
    assert process.stdout is not None
    output = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{part} failed")
    after = os.times()  # of children that have exited, and of their children
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {**json.loads(output[-1]), "cpu_seconds": cpu, "peak_gib": most / 2**30}


def _resident(pid: int) -> float:
    """Proportional set size (PSS) of a process and its descendants, in bytes."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * float(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += _resident(int(child))
    except (OSError, ProcessLookupError):  # the process has just exited
        pass
    return total


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def resume_seconds() -> float:
    """Time from a saved stage to the row of sample 10^9, in seconds."""
    keys = ("a", "b", "c")
    saved = Stage(0, 0, 512, 0, keys, make_quotas([0.7, 0.2, 0.1]), (0, 0, 0)).to_json()
    started = time.perf_counter()
    Order([Stage.from_json(saved)], dict.fromkeys(keys, 12_345_678)).sample(10**9)
    return time.perf_counter() - started


def worst_correlation(keys: int, rows: int = 10**6) -> float:
    """The largest correlation of any output bit of `permute` with any input bit, over `keys` keys."""

    def bits(values: np.ndarray) -> np.ndarray:
        signs = ((values[None] >> np.arange(rows.bit_length())[:, None]) & 1).astype(np.float32)
        signs -= signs.mean(1, keepdims=True)
        return signs / np.sqrt((signs**2).mean(1, keepdims=True))

    index = np.arange(rows)
    inputs = bits(index)
    return max(
        float(np.abs(inputs @ bits(permute(key, "source", key % 3, index, rows)).T / rows).max()) for key in range(keys)
    )


def report(results: dict[str, Any]) -> dict[str, str]:
    """The figures as rows of a table."""
    loader = results["loader"]
    lines = {}
    for part, name in (
        ("prepare", f"torchxihe prepare, {_cores()} cores"),
        ("map", f"datasets.map, {_cores()} processes"),
    ):
        if part in results:
            rate = results[part]["tokens"] / results[part]["seconds"] / 1e6
            lines[name] = f"{rate:.2f} M tokens/s, peak {results[part]['peak_gib']:.2f} GiB"
    if "map" in results:
        times = [results["map"][clock] / results["prepare"][clock] for clock in ("seconds", "cpu_seconds")]
        lines["prepare / map"] = f"{times[0]:.1f}; by CPU seconds {times[1]:.1f}"
    return {
        **lines,
        "loader, one core": f"{loader['tokens_per_cpu_second'] / 1e6:.0f} M tokens/s, best {loader['best'] / 1e6:.0f}",
        "first batch of a new process, torch imported": f"{loader['first_batch_seconds']:.2f} s",
        "resume at sample 10^9": f"{results['resume_seconds'] * 1e3:.2f} ms",
    }


def make_empty(folder: Path) -> None:
    """Empty `folder`, or create it. Ends the program if it has files that this benchmark did not make."""
    mark = folder / ".torchxihe_benchmark"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        sys.exit(f"--folder {folder}: not a folder; name an empty folder")
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        sys.exit(f"--folder {folder}: has files that this benchmark did not make; name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()  # first, so that the folder of a killed run can be emptied
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()


def main() -> None:
    """Run everything and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmark_data"), help="emptied first")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--without-map", action="store_true", help="skip datasets.map, the slowest part")
    parser.add_argument("--permute", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return
    if options.permute:
        print(f"largest correlation of an output bit with an input bit: {worst_correlation(100):.4f}")
        return
    folder = options.folder
    make_empty(folder)
    make_corpus(folder / "corpus.jsonl", options.megabytes * 10**6)
    with (folder / "corpus.jsonl").open("rb") as file:
        sample = (json.loads(line)["text"] for line in file.readlines(16_000_000))
    trained = obtain(Tokenizer(vocab_size=options.vocab_size), folder / "cache", sample, "benchmark")
    shutil.copytree(trained, folder / "tokenizer")
    parts = [part for part in PARTS if part != "map" or not options.without_map]
    results: dict[str, Any] = {part: measure(part, folder) for part in parts}
    results["resume_seconds"] = resume_seconds()
    libraries = {name: version(name) for name in ("torch", "numpy", "tokenizers", "tiktoken", "datasets")}
    results["machine"] = {"cores": _cores(), "cpu": platform.processor() or platform.machine(), **libraries}
    results["corpus"] = {
        "megabytes": options.megabytes,
        "tokens": results["prepare"]["tokens"],
        "date": str(date.today()),
    }
    for what, figure in report(results).items():
        print(f"{what:<50} {figure}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
