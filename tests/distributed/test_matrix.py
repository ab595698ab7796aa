"""Random layouts, shapes, optimizers and features through the real data path, and chains of restarts over them.

A case is drawn from a seed. It is prepared, read by the loader, trained and saved as a run is, in one process and in
its layouts; the rows of every step, losses, gradient norms and parameters must agree. With --long 200 seeds and 20
chains; a seed that has failed once stays in `FAILED_ONCE`.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.launch import run_distributed
from tests.distributed.layouts import processes
from tests.unit.saved_runs import state_of
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.config.checks import find_conflicts
from torchxihe.config.options import Checkpoint, Config
from torchxihe.data.loader import Batch, Loader
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.store import open_prepared
from torchxihe.parallelisms import data_parallel
from torchxihe.trainer import Trainer

STEPS, TOKENS = 6, 300
FLOAT8 = 5e-3
"""By how much losses and parameters may differ after float8 products, and norms ten times that."""
ROUNDING = 10
"""Times the effect of rounding, seen in one process with other micro-batches, by which a layout may differ beyond the
tolerance: some steps amplify it a thousandfold (a gradient norm of 49 between norms of 3)."""
FAILED_ONCE = (59,)  # "budget" with tensor parallelism
Values = dict[str, dict[str, Any]]


@dataclass
class Segment:
    """What one rank saw in some steps."""

    history: np.ndarray
    """Loss, gradient norm, loss of either source, by step."""
    rows: list[tuple[int, list[int]]]
    """Its number among the ranks that read different rows, and the samples it read, by step."""
    parameters: dict[str, Tensor]
    """After the last step."""
    noise: np.ndarray | None = None
    """By how much the history differs with micro-batches of one row."""


def draw(seed: int, layouts: int) -> tuple[Values, list[dict[str, Any]]]:
    """A config without a layout, and so many layouts that it can be trained in."""
    choose = random.Random(seed)
    while True:
        values = draw_values(choose, compile=seed % 20 == 19)
        drawn = (draw_layout(choose, values) for _ in range(60))
        valid = [layout for layout in drawn if processes(layout) <= 8 and is_valid(values, layout)]
        if len(valid) >= layouts:
            return values, choose.sample(valid, layouts)


def draw_values(choose: random.Random, compile: bool) -> Values:
    """Shape, data, optimizer and features."""
    heads, float8 = choose.choice([4, 8]), choose.random() < 0.15
    width = choose.choice([16, 32] if float8 else [4, 6, 8])
    mode = choose.choice(["none", "selective", "full", "budget"] if compile else ["none", "selective", "full"])
    chat = choose.random() < 0.3
    return {
        "model": {
            "hidden_size": heads * choose.choice([4, 8]),
            "num_hidden_layers": choose.randint(2, 8),
            "num_attention_heads": heads,
            "num_key_value_heads": choose.choice([1, 2, 4, 4]),
            "head_dim": width,
            "intermediate_size": 16 * choose.randint(2, 4) if float8 else 4 * choose.randint(6, 12),
            "vocab_size": TOKENS + choose.randint(0, 20),
            "qk_norm": choose.random() < 0.5,
            "tie_word_embeddings": choose.random() < 0.5,
        },
        "tokenizer": {"vocab_size": TOKENS},
        "data": {
            "format": "chat" if chat else "text",
            "seq_len": 16 * choose.randint(2, 5),
            "packing": choose.choice(["best_fit", "concat"]),
            "document_mask": choose.random() < 0.75,
        },
        "validation": {"fraction": 0.0},
        "training": {
            "steps": STEPS,
            "global_batch_size": choose.choice([8, 8, 12, 16, 7]),
            "micro_batch_size": choose.choice([1, 2, 4]),
            "batch_ramp": [[choose.choice([4, 6]), 3]] if choose.random() < 0.3 else [],
            "dtype": "float32",
            "compile": compile,
        },
        "optimizer": {"name": choose.choice(["adamw", "muon"]), "lr": 2e-3},
        "lr_scheduler": {"warmup_steps": 4},
        "float8": {"recipe": "tensorwise" if float8 else "", "scope": "blocks"},
        "parallelism": {
            "activation_checkpointing": mode,
            "reshard_after_forward": choose.random() < 0.5,
        },
    }


def draw_layout(choose: random.Random, values: Values) -> dict[str, Any]:
    """Degrees that may not fit."""
    layout: dict[str, Any] = {
        "pp": choose.choice([1, 2, 2, 4]),
        "dp_replicate": choose.choice([1, 1, 2]),
        "dp_shard": choose.choice([1, 1, 2, 4]),
        "cp": choose.choice([1, 2, 2, 4]),
        "tp": choose.choice([1, 2, 2, 4]),
        "cp_method": choose.choice(["auto", "ulysses", "gather"]),
    }
    if layout["pp"] > 1 and choose.random() < 0.6:
        layout |= {"pp_schedule": "interleaved", "pp_stages_per_rank": choose.choice([2, 3])}
    return layout


def is_valid(values: Values, layout: dict[str, Any]) -> bool:
    """Several processes, a valid config; and, with float8, the same micro-batches as one process, since a scale is that
    of a micro-batch."""
    config = config_of(values, layout, Path("data"))
    degrees = processes(layout)
    if degrees == 1 or find_conflicts(config, degrees):
        return False
    if not values["float8"]["recipe"]:
        return True
    training, data = values["training"], layout["dp_replicate"] * layout["dp_shard"]
    whole = training["global_batch_size"] % (data * training["micro_batch_size"] * 4) == 0
    return layout["tp"] == layout["cp"] == 1 and whole and not training["batch_ramp"]


def config_of(values: Values, layout: dict[str, Any], root: Path) -> Config:
    """The config of a case in a layout."""
    kind = values["data"]["format"]
    sources = [{"path": str(root / f"{name}-{kind}.jsonl"), "name": name} for name in ("a", "b")]
    data = values["data"] | {"sources": sources, "cache_dir": str(root / "cache")}
    parallelism = values["parallelism"] | layout
    return Config.model_validate(values | {"data": data, "parallelism": parallelism})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of short documents, as text and as conversations."""
    root, choose = tmp_path_factory.mktemp("matrix"), random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "def", "return", "import"]

    def text() -> str:
        return " ".join(choose.choice(words) for _ in range(choose.randint(1, 40)))

    for name in ("a", "b"):
        rows = [{"text": text()} for _ in range(400)]
        chats = [
            {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}
            for _ in range(400)
        ]
        for kind, lines in (("text", rows), ("chat", chats)):
            file = root / f"{name}-{kind}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


def run_segment(
    values: Values, layout: dict[str, Any], root: Path, checkpoints: Path, start: int, steps: int
) -> Segment:
    """Steps from the checkpoint `start` (0: the initial weights) on, saved at their end."""
    data_parallel.UNIT_PARAMETERS = 1  # every block a unit of its own
    config = config_of(values, layout, root)
    prepared = open_prepared(config)
    trainer = Trainer(config, torch.device("cpu"), prepared.bytes_per_token)
    checkpointer = Checkpointer(checkpoints, Checkpoint(mode="sync", keep_last=1))
    if start:
        trainer.load(checkpointer, checkpointer.directory / f"step-{start:08}")
    order = Order(plan_stages(config, prepared), prepared.rows)
    loader, history, rows = Loader(prepared, order, trainer.batch_spec, trainer.step), [], []
    for _ in range(steps):
        read: list[int] = []
        trainer.train_step(_watched(loader, read))
        rows.append((trainer.dims.rank("data"), read))
        sums = trainer.sums.read(prepared.names)
        history.append([sums["loss"], sums["grad_norm"], sums.get("loss/a", 0.0), sums.get("loss/b", 0.0)])
    loader.close()
    checkpointer.save(trainer.step, trainer.state(), state_of(trainer.step), expected=trainer.expected)
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }
    return Segment(np.array(history), rows, parameters)


def _watched(loader: Iterator[Batch], read: list[int]) -> Iterator[Batch]:
    for batch in loader:
        read += [sample for sample in batch.samples if sample >= 0]
        yield batch


def compare(ranks: list[Segment], expected: Segment, first: int, tolerance: float) -> None:
    """The ranks' steps with the expected ones, of which they begin at number `first`."""
    for i in range(len(ranks[0].rows)):
        by_rank: dict[int, list[int]] = {}
        for rank in ranks:
            number, samples = rank.rows[i]
            assert by_rank.setdefault(number, samples) == samples, "ranks that share rows read different ones"
        assert sorted(sample for read in by_rank.values() for sample in read) == sorted(expected.rows[first + i][1])
    steps = slice(first, first + len(ranks[0].rows))
    assert expected.noise is not None
    wanted, allowed = expected.history[steps].copy(), tolerance + ROUNDING * expected.noise[steps]
    allowed[:, 1] += tolerance * (wanted[:, 1] - 1).clip(0)  # of the norm, relative where it is above 1
    for rank in ranks:
        assert (np.abs(rank.history - wanted) < allowed).all(), (rank.history - wanted, allowed)


def compare_parameters(ranks: list[Segment], expected: Segment, tolerance: float) -> None:
    names = set[str]()
    for rank in ranks:
        names |= rank.parameters.keys()
        for name, parameter in rank.parameters.items():
            assert float((parameter - expected.parameters[name]).abs().max()) < tolerance, name
    assert names == expected.parameters.keys()


def in_one_process(values: Values, root: Path, checkpoints: Path, steps: int) -> Segment:
    prepare(config_of(values, {}, root))
    alone = {name: dict(section) for name, section in values.items()}
    alone["parallelism"] |= {"activation_checkpointing": "none"}
    alone["training"] |= {"compile": False, "steps": values["training"]["steps"]}
    if not values["float8"]["recipe"]:
        alone["training"]["micro_batch_size"] = values["training"]["global_batch_size"]
    segment = run_segment(alone, {}, root, checkpoints, 0, steps)
    alone["training"]["micro_batch_size"] = 1
    other = run_segment(alone, {}, root, checkpoints.with_name("rows"), 0, steps)
    segment.noise = np.zeros_like(segment.history) if values["float8"]["recipe"] else other.history - segment.history
    segment.noise = np.abs(segment.noise)
    return segment


SEEDS = [*range(12), *FAILED_ONCE]
SEEDS += [pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 200) if seed not in FAILED_ONCE]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_layout(seed: int, root: Path, tmp_path: Path) -> None:
    values, (layout,) = draw(seed, 1)
    expected = in_one_process(values, root, tmp_path / "one", STEPS)
    args = values, layout, root, tmp_path / "several", 0, STEPS
    ranks = run_distributed(run_segment, processes(layout), *args, timeout=300)
    if not values["float8"]["recipe"]:
        compare(ranks, expected, 0, 1e-5)
        compare_parameters(ranks, expected, 5e-5)
        return
    # Where a sum is rounded differently, a value may be quantised to the next one: only the first step is exact.
    for rank in ranks:
        limits = FLOAT8 * np.array([1, 10, 1, 1])
        rank.history[1:] += np.clip(expected.history[1:] - rank.history[1:], -limits, limits)
    compare(ranks, expected, 0, 1e-5)
    compare_parameters(ranks, expected, FLOAT8)


@pytest.mark.parametrize("seed", [1000, *(pytest.param(1000 + i, marks=pytest.mark.long) for i in range(1, 20))])
def test_a_random_chain_of_restarts(seed: int, root: Path, tmp_path: Path) -> None:
    """Six restarts, each in another layout, on another number of processes."""
    values, layouts = draw(seed, 7)
    values["float8"] = {"recipe": ""}
    values["training"] |= {"steps": 14}
    expected = in_one_process(values, root, tmp_path / "one", 14)
    for i, layout in enumerate(layouts):
        args = values, layout, root, tmp_path / "chain", 2 * i, 2
        compare(run_distributed(run_segment, processes(layout), *args, timeout=300), expected, 2 * i, 1e-5)
