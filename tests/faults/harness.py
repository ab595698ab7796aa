"""Start training jobs of several ranks, break them on purpose, and compare what they did with an unbroken run.

The ranks are forked from a server that has imported torch, have torchrun's environment, and end as under torchrun: when
one fails, the others get SIGTERM. Each writes a *ledger*: for every step the hash of its rows by sample number, the
bits of loss and gradient norm, and the hash of its part of the state afterwards.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.distributed.tensor import DTensor

from tests.distributed.launch import PRELOAD, rank_environment
from tests.faults.faults import Fault

CONFIG = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
intermediate_size = 64
vocab_size = 512
tie_word_embeddings = true
[tokenizer]
path = "../tokenizer"
[data]
seq_len = 64
cache_dir = "../cache"
[[data.sources]]
path = "../text"
glob = "*.txt"
name = "first"
[[data.sources]]
path = "../more"
glob = "*.txt"
name = "second"
[validation]
fraction = 0.0
[training]
steps = 20
global_batch_size = 6
micro_batch_size = 2
dtype = "float32"
compile = false
[optimizer]
lr = 1e-2
[checkpoint]
every = 4
mode = "sync"
[metrics]
log_every = 1
sample_tokens = 0
"""

LIMIT_SECONDS = 30
"""A failure must end every rank within this."""


@dataclass
class Outcome:
    """How a job ended."""

    codes: list[int]
    """Exit code of each rank, negative for a signal."""
    log: str
    """What all ranks printed."""
    seconds: float
    """From the first rank's failure to the last one's end."""

    @property
    def succeeded(self) -> bool:
        """Whether every rank ended well."""
        return not any(self.codes)

    def check_failure(self, *words: str) -> None:
        """Fail unless some rank ended badly and all in time, and there is one line with all of `words`."""
        assert any(self.codes), f"no rank failed:\n{self.log}"
        assert self.seconds < LIMIT_SECONDS, f"took {self.seconds:.0f} s to end"
        lines = self.log.splitlines()
        assert any(all(word in line for word in words) for line in lines), f"no line with {words}:\n{self.log}"

    def check_mistake(self, *words: str) -> None:
        """`check_failure`, and every rank has ended with 1 and without a traceback."""
        self.check_failure(*words)
        assert "Traceback" not in self.log, self.log
        assert set(self.codes) <= {1, -15}, self.codes


class Workspace:
    """A directory with prepared data and a config; runs land in its `runs/`."""

    def __init__(self, root: Path) -> None:
        self.root = root / "work"
        if not self.root.exists():
            self.root.mkdir()
            (self.root / "config.toml").write_text(CONFIG)
        self.run_dir = self.root / "runs" / "config"

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints."""
        return self.run_dir / "checkpoints"

    def ledger(self) -> "Ledger":
        """See `ledger`."""
        return ledger(self.root)

    def forget_ledger(self) -> None:
        """Begin a new one, for another run."""
        for path in self.root.glob("ledger-*.jsonl"):
            path.unlink()

    def files(self, step: int) -> dict[str, str]:
        """Hashes of the tensors' files of a checkpoint."""
        files = json.loads((self.checkpoints / f"step-{step:08d}" / "MANIFEST.json").read_text())["files"]
        return {name: entry["xxh3_128"] for name, entry in files.items() if name.endswith(".distcp")}

    def steps(self) -> list[int]:
        """Steps of the directories there, whatever their state."""
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-????????"))

    def start(
        self, world_size: int, *flags: str, fault: Fault | None = None, env: dict[str, str] | None = None
    ) -> "Job":
        """Start `torchxihe train config.toml FLAGS` on `world_size` ranks."""
        return Job(self.root, world_size, ["train", "config.toml", *flags], fault, env or {})

    def run(
        self,
        world_size: int,
        *flags: str,
        fault: Fault | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 90,
    ) -> Outcome:
        """Start and wait."""
        return self.start(world_size, *flags, fault=fault, env=env).wait(timeout)

    def finish(self, world_size: int, *flags: str, env: dict[str, str] | None = None) -> str:
        """Run to the horizon; its log."""
        outcome = self.run(world_size, *flags, env=env)
        assert outcome.succeeded, outcome.log
        return outcome.log


@dataclass
class Job:
    """Ranks that are training."""

    root: Path
    world_size: int
    argv: list[str]
    fault: Fault | None
    env: dict[str, str]
    processes: list[ForkServerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [*PRELOAD, "torchxihe.trainer", "torchxihe.commands.train", "tests.faults.faults"]
        )
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        number = len(list(self.root.glob("log-*-0.txt")))
        self._logs = [self.root / f"log-{number:03d}-{rank}.txt" for rank in range(self.world_size)]
        for rank, log in enumerate(self._logs):
            log.touch()
            env = rank_environment(rank, self.world_size, self._store.port) | self.env
            daemon = self.argv[0] == "train"  # `prepare` has workers of its own
            process = context.Process(target=_rank, args=(self.root, self.argv, env, self.fault, log), daemon=daemon)
            process.start()
            self.processes.append(process)

    def log(self) -> str:
        """What has been printed so far."""
        return "".join(log.read_text(errors="replace") for log in self._logs)

    def wait_for_text(self, text: str, timeout: float = 60) -> None:
        """Wait until some rank has printed it."""
        deadline = time.monotonic() + timeout
        while text not in self.log():
            assert any(process.is_alive() for process in self.processes), f"{text!r} did not come:\n{self.log()}"
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.log()}"
            time.sleep(0.01)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(self.world_size):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self, timeout: float = 90) -> Outcome:
        """Wait for the end. As torchrun does, end the others when one has failed, with SIGTERM, then SIGKILL."""
        deadline = time.monotonic() + timeout
        failed_at = 0.0
        while any(process.is_alive() for process in self.processes):
            codes = [process.exitcode for process in self.processes]
            if not failed_at and any(codes):
                failed_at = time.monotonic()
                for process in self.processes:
                    process.terminate()
            if time.monotonic() > (failed_at + LIMIT_SECONDS if failed_at else deadline):
                log = self.log()
                self.kill()
                raise AssertionError(f"the job did not end; exit codes so far {codes}\n{log}")
            time.sleep(0.01)
        seconds = time.monotonic() - failed_at if failed_at else 0.0
        return Outcome([process.exitcode or 0 for process in self.processes], self.log(), seconds)

    def kill(self) -> None:
        """kill -9 all ranks, now."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _rank(root: Path, argv: list[str], env: dict[str, str], fault: Fault | None, log: Path) -> None:
    """One rank: everything as `python -m torchxihe` does it."""
    os.chdir(root)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1, closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )
    os.environ.update(env)
    if shift := float(env.get("CLOCK_SHIFT", "0")):
        real_time = time.time
        time.time = lambda: real_time() + shift
    torch.set_num_threads(1)
    _keep_ledger(root / f"ledger-{env['RANK']}.jsonl")
    if fault is not None:
        fault.arm(int(env["RANK"]))
    from torchxihe.__main__ import main

    sys.argv = ["torchxihe", *argv]
    main()


def digests(batch: Any) -> dict[int, str]:
    """The hash of every row of a batch, by its sample number."""
    tokens, targets = batch.tokens.cpu().numpy(), batch.targets.cpu().numpy()
    rows = {g: tokens[i].tobytes() + targets[i].tobytes() for i, g in enumerate(batch.samples) if g >= 0}
    return {g: hashlib.sha256(row).hexdigest()[:16] for g, row in rows.items()}


def _keep_ledger(path: Path) -> None:
    """Write a line a step from now on."""
    from torchxihe.components.optimizer.bad_steps import BadSteps
    from torchxihe.parallelisms import context_parallel
    from torchxihe.trainer import Trainer

    entry: dict[str, Any] = {}
    full_rows: dict[int, str] = {}  # of rows that are about to be cut
    train_step, judge, cut_batch = Trainer.train_step, BadSteps.judge, context_parallel.cut_batch

    def noted_cut(batch: Any, **options: Any) -> Any:
        full_rows.update(digests(batch))
        return cut_batch(batch, **options)

    def noted_batches(loader: Iterator[Any]) -> Iterator[Any]:
        for batch in loader:
            rows = digests(batch) if batch.positions is None else {g: full_rows.pop(g) for g in batch.samples if g >= 0}
            entry["rows"].update(rows)
            yield batch

    def noted_judge(self: Any, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        skip = judge(self, loss, grad_norm)
        entry.update(loss=loss.item().hex(), grad_norm=grad_norm.item().hex(), skip=bool(skip))
        return skip

    def noted_step(self: Any, loader: Iterator[Any]) -> None:
        entry.clear()
        entry.update(step=self.step + 1, rows={})
        train_step(self, noted_batches(loader))
        state = self.state()
        entry["state"] = _digest(state)
        entry["weights"] = _digest(
            {key: tensor for key, tensor in state.items() if key.startswith(("model.", "optim."))}
        )
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    Trainer.train_step = noted_step  # type: ignore[method-assign]
    BadSteps.judge = noted_judge  # type: ignore[method-assign]
    context_parallel.cut_batch = noted_cut


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in state.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(local.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


Ledger = dict[int, dict[str, Any]]
KEYS = ("loss", "grad_norm", "skip", "weights", "state")


def ledger(root: Path) -> Ledger:
    """By step: the rows of all ranks by sample number, loss, gradient norm, and the state's hash on each rank.

    A step that several attempts have made must have been the same each time, on as many ranks, or the test fails.
    """
    steps: Ledger = {}
    for path in sorted(root.glob("ledger-*.jsonl")):
        rank = int(path.stem[7:])
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            into = steps.setdefault(entry["step"], {"rows": {}} | {key: {} for key in KEYS})
            for g, digest in entry["rows"].items():
                assert into["rows"].setdefault(int(g), digest) == digest, f"step {entry['step']} saw another sample {g}"
            for key in KEYS:
                into[key].setdefault(rank, entry[key])
                assert into[key][rank] == entry[key], f"step {entry['step']} had another {key} on rank {rank}"
    return steps


def losses(entries: Ledger) -> dict[int, float]:
    """Rank 0's losses."""
    return {step: float.fromhex(entry["loss"][0]) for step, entry in sorted(entries.items())}


def token_ledger(entries: Ledger) -> dict[int, str]:
    """The hash of every global batch, whatever rank had which row."""
    return {
        step: hashlib.sha256(json.dumps(sorted(entry["rows"].items())).encode()).hexdigest()
        for step, entry in sorted(entries.items())
    }
