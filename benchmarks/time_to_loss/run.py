"""Time to loss: train entries, and print the steps and seconds in which they reach the target.

    python benchmarks/time_to_loss/run.py ENTRY [ENTRY ...] [--seeds 0 1 2] [--section.key=value ...]

ENTRY is the name of a file in entries/; without one, the jobs of track.toml run in their order. Corpus, tokenizer and
token store are made first, if they are not there. Every job is a normal run in `run.dir`: it resumes if it was
interrupted, and a finished one is only printed. A line of JSON per finished job is appended to --json.

Seconds are those of the training steps: validation, checkpoints and compilation are not counted; steps that compile,
and those up to the first log step, count as steps of median duration. Steps and seconds to the target are interpolated
between validations. --deadline: seconds after which no job may run; jobs that would take longer are left out.
With --partly they are begun, saved at the deadline, and continued by the next call. --write-list makes the corpus's
list of packages from what is installed here, and ends.
"""

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

BEGIN = time.monotonic()
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo
from convergence import steps_to
from corpus import collect, write_hub_list, write_list
from pydantic import Field, ValidationError
from trials import check_same, lines_of, taken

import torchxihe
from torchxihe.config.load import load_config, tomllib
from torchxihe.config.options import Config, Section
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.store import open_prepared
from torchxihe.errors import UserError
from torchxihe.utils.device import default_device, device_name
from torchxihe.utils.log import setup_logging

HUB = {"code": ("", []), "english": ("HuggingFaceFW/fineweb-edu", ["sample/10BT/000_00000.parquet"])}
"""The corpora; dataset and files of those on the hub."""
FIXED = "data", "tokenizer", "validation"
"""Sections that an entry does not change."""
START_SECONDS = 90.0, 25.0
"""Start, compilation and last checkpoint of the first and of a later job, for the deadline."""
SMALLEST_PART, SAVING = 120.0, 20.0
"""Seconds for which beginning a job is worth it; seconds before the deadline at which it stops, to save."""


class Reference(Section):
    """What was measured on a corpus."""

    target: float
    """Held-out loss to reach. 0: not yet measured."""
    data_key: str
    """Content key of the prepared source. "": unknown."""


class Track(Section):
    """track.toml."""

    code: Reference
    english: Reference
    jobs: Annotated[tuple[Annotated[tuple[str, int], Field(strict=False)], ...], Field(strict=False)]
    """Entry and seed, in the order in which they run."""


def main() -> None:
    """Parse the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="ENTRY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each ENTRY (default 0)")
    parser.add_argument("--corpus", choices=list(HUB), default="code", help="what to train on (default code)")
    parser.add_argument("--target", type=float, default=0.0, help="held-out loss (default: that of track.toml)")
    parser.add_argument("--json", default="", metavar="FILE", help="results (default: results.jsonl in run.dir)")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help="from now (default: none)")
    parser.add_argument("--partly", action="store_true", help="begin jobs that do not end before the deadline")
    parser.add_argument("--step-seconds", type=float, default=0.25, help="for the deadline, until it was measured")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="with the packages that are not installed here")
    parser.add_argument("--write-list", type=Path, metavar="FILE", help="write the list of packages, and end")
    parser.add_argument("--track", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="another track")
    options, overrides = parser.parse_known_args()
    try:
        if options.write_list:
            repository, files = HUB[options.corpus]
            write_hub_list(options.write_list, repository, files) if files else write_list(options.write_list)
            return
        setup_logging()
        # One process compiles once for all jobs: models of the same shape share their graphs. Others need more of them.
        torch._dynamo.config.recompile_limit = 64
        run_jobs(options, overrides)
    except UserError as error:
        sys.exit(str(error))


def run_jobs(options: argparse.Namespace, overrides: list[str]) -> None:
    """Train and report every job that ends before the deadline. Raises UserError."""
    track = read_track(options.track / "track.toml")
    jobs = [(entry, seed) for entry in options.entries for seed in options.seeds] or list(track.jobs)
    # All mistakes before the first job.
    configs = {job: entry_config(options.track, options.corpus, *job, overrides) for job in jobs}
    reference: Reference = getattr(track, options.corpus)
    target, step_seconds = options.target or reference.target, options.step_seconds
    check_data(options, next(iter(configs.values())), reference.data_key)
    results: list[dict[str, Any]] = []
    for (entry, seed), config in configs.items():
        left = options.deadline - (time.monotonic() - BEGIN)
        needed = (config.total_steps - taken(config)) * step_seconds * 1.05 + START_SECONDS[bool(results)]
        if needed > left and not (options.partly and left > SMALLEST_PART):
            print(f"{entry}, seed {seed}: needs about {needed:.0f} s, {left:.0f} are left: not started", flush=True)
            continue
        if not train(config, left):
            print(f"{entry}, seed {seed}: stopped; the same command resumes it", flush=True)
            return
        result = {"entry": entry, "corpus": options.corpus, "seed": seed} | measure(config)
        step_seconds = result["step_seconds"] or step_seconds
        target = target or (result["validation"][-1][1] if entry == "adamw" and seed == 0 else 0.0)
        result |= reached(result, target)
        append(Path(options.json or Path(config.run.dir) / "results.jsonl"), result)
        print_row(result, header=not results)
        results.append(result)
    for entry in dict.fromkeys(result["entry"] for result in results):
        print(markdown_row([result for result in results if result["entry"] == entry]))


def read_track(path: Path) -> Track:
    """track.toml. Raises UserError."""
    try:
        return Track.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def entry_config(track: Path, corpus: str, entry: str, seed: int, overrides: list[str]) -> Config:
    """The config of a run. Raises UserError, also if the entry changes what the track keeps fixed."""
    file = track / "entries" / f"{entry}.toml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.toml")))
        raise UserError(f"{file}: no such entry; there are {there}")
    own = [f"--training.seed={seed}", f"--run.name={corpus}-{entry}-seed{seed}"]
    config = load_config(file, [*own, *overrides])
    base = load_config(track / "code.toml", overrides)
    for section in FIXED:
        for name, value in getattr(base, section):
            if value != getattr(getattr(config, section), name):
                raise UserError(f"{file}: {section}.{name}: is the same for all entries (code.toml); remove it")
    of_corpus = load_config(track / f"{corpus}.toml", overrides)
    return config.model_copy(update={section: getattr(of_corpus, section) for section in FIXED})


def check_data(options: argparse.Namespace, config: Config, data_key: str) -> None:
    """Collect and prepare the corpus, unless it is there. Raises UserError if it is not the track's."""
    collect(options.track / f"{options.corpus}.json", Path(config.data.sources[0].path), options.wheels)
    key = prepare(config).sources[0].key
    print(f"data key: {key}", flush=True)
    if data_key and key != data_key:
        raise UserError(f"{options.track / 'track.toml'}: data_key is {data_key}, but what was prepared here is {key}")


def train(config: Config, seconds: float) -> bool:
    """Train `config` to its end or for `seconds`; whether it is finished. Raises UserError."""
    check_same(config)
    if seconds < math.inf:
        limit = config.training.model_copy(update={"time_limit": max(seconds - SAVING, 1.0)})
        config = config.model_copy(update={"training": limit})
    torchxihe.train(config)
    gc.collect()  # the trainer is part of reference cycles; its memory is needed for the next
    return taken(config) == config.total_steps


def measure(config: Config) -> dict[str, Any]:
    """What the files of a finished run say of it; `validation` has [step, loss, seconds of training]."""
    lines, validations = lines_of(config.run_dir)
    known = [line["step_seconds"] for line in lines if "step_seconds" in line]
    median = statistics.median(known) if known else 0.0
    seconds, step, at = 0.0, 0, {0: 0.0}
    for line in lines:
        seconds += (line["step"] - step) * (line.get("step_seconds", median) if step else median)
        step = int(line["step"])
        at[step] = seconds
    curve = [(int(line["step"]), line["validation/loss"]) for line in validations]
    return {
        "steps": config.total_steps,
        "tokens_per_step": config.tokens_per_step,
        "step_seconds": round(median, 5),
        "seconds": round(seconds, 2),
        "skipped": sum(int(line["skipped"]) for line in lines),
        "memory_gib": round(max(line["memory_allocated_gib"] for line in lines), 2),
        "losses": [[int(line["step"]), round(line["loss"], 5)] for line in lines],
        "validation": [[step, round(loss, 5), round(interpolated(at, step), 2)] for step, loss in curve],
        "optimizer": config.optimizer.model_dump(),
        "lr_scheduler": config.lr_scheduler.model_dump(),
        "data_key": open_prepared(config).sources[0].key,
        "device": device_name(default_device()),
        "versions": {
            "torchxihe": torchxihe.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def interpolated(at: dict[int, float], step: float) -> float:
    """Seconds of training up to `step`, from those at other steps (at least step 0)."""
    before, after = max(s for s in at if s <= step), min((s for s in at if s >= step), default=max(at))
    share = (step - before) / (after - before) if after > before else 0.0
    return at[before] + share * (at[after] - at[before])


def reached(result: dict[str, Any], target: float) -> dict[str, Any]:
    """Steps and seconds to `target`, null if it was not reached."""
    curve = result["validation"]
    steps = steps_to([[step, loss] for step, loss, _ in curve], target)
    if not target or math.isinf(steps):
        return {"target": target, "steps_to_target": None, "seconds_to_target": None}
    seconds = interpolated({0: 0.0} | {step: seconds for step, _, seconds in curve}, steps)
    return {"target": target, "steps_to_target": round(steps, 1), "seconds_to_target": round(seconds, 2)}


def append(file: Path, result: dict[str, Any]) -> None:
    """Append a line of JSON, unless the file has it."""
    line = json.dumps(result)
    if file.exists() and line in file.read_text(encoding="utf-8").splitlines():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def print_row(r: dict[str, Any], *, header: bool) -> None:
    """Print a job's held-out curve and its row of the table."""
    print("held-out loss: " + ", ".join(f"{step} {loss:.4f}" for step, loss, _ in r["validation"]))
    if header:
        print(
            f"{'entry':24} {'seed':>4} {'steps':>6} {'s/step':>7} {'seconds':>8} {'loss':>8} {'target':>8} reached at"
        )
    at = f"step {r['steps_to_target']:,.0f}, {r['seconds_to_target']:,.1f} s" if r["steps_to_target"] else "-"
    print(
        f"{r['entry']:24} {r['seed']:4} {r['steps']:6,} {r['step_seconds']:7.4f} {r['seconds']:8.1f} "
        f"{r['validation'][-1][1]:8.4f} {format(r['target'], '8.4f') if r['target'] else ' unknown'} {at}",
        flush=True,
    )


def markdown_row(seeds: list[dict[str, Any]]) -> str:
    """The row of README.md for the runs of an entry: mean (lowest to highest)."""

    def cell(values: list[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return f"reached by {len(known)} of {len(values)}"
        mean = format(statistics.mean(known), form)
        return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"

    first = seeds[0]
    cells = [
        f"[{first['entry']}](entries/{first['entry']}.toml)",
        f"{len(seeds)}",
        f"{first['steps']:,}",
        cell([r["validation"][-1][1] for r in seeds], ".4f"),
        cell([r["steps_to_target"] for r in seeds], ",.0f"),
        cell([r["seconds_to_target"] for r in seeds], ".1f"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
