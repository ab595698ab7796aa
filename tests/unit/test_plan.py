"""The planner: its closed forms against measurements, the layouts it may choose, its command, the trainer's refusal."""

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torchxihe.__main__ import run
from torchxihe.config.checks import find_conflicts
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.loader import causal_pairs
from torchxihe.errors import UserError
from torchxihe.plan import check
from torchxihe.plan.hardware import DATASHEETS, Gpu, find_gpu
from torchxihe.plan.layout import MOST_STAGES, Layout, layout_of, legal_layouts, with_layout
from torchxihe.plan.memory import Memory, in_flight, moments, sizes_of
from torchxihe.plan.search import distinct, nearest, plan_of, plans, rank, usable_memory
from torchxihe.plan.time import step_seconds, tokens_per_second
from torchxihe.utils.device import PEAK_BF16_TFLOPS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "benchmarks" / "results"
H100, H200 = find_gpu("H100 80GB"), find_gpu("H200")


# Against measurements


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row of the calibration tables."""

    gpu: Gpu
    gpus: int
    config: str
    flags: list[str]
    documents: int
    """In each row of the data."""
    gib: float
    """Peak; 0: not measured."""
    speed: float
    """Tokens/s and GPU; 0: not measured."""


def measured() -> Iterator[Measured]:
    for gpu, name in ((H100, "plan_h100_2026-11-27.md"), (H200, "plan_h200_2026-11-27.md")):
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 10 and cells[0].isdecimal():
                gib, speed = (0.0 if cells[i] == "–" else float(cells[i].replace(",", "")) for i in (4, 7))
                flags = [flag for flag in cells[2].strip("`").split() if flag.startswith("--")]
                yield Measured(gpu, int(cells[0]), cells[1], flags, int(cells[3]), gib, speed)


def predicted(row: Measured) -> tuple[float, float]:
    """GiB, with the second chunk of logits that the loss kept when H100s were measured, and tokens/s and GPU."""
    config = load_config(CONFIGS / f"{row.config}.toml", row.flags)
    layout = layout_of(config.parallelism, row.gpus)
    rows = plan_of(config, layout, row.gpu).rows
    sizes = sizes_of(config, layout, rows)
    chunk = sizes.a * sizes.chunk * sizes.V if row.gpu == H100 and sizes.chunk < sizes.N else 0

    def as_then(memory: Memory) -> float:
        return memory.total + chunk * (memory.moment == "loss")

    peak = max(map(as_then, moments(config, layout, rows, fused=config.model.mlp != "torch")))
    edges = [i * config.data.seq_len // row.documents for i in range(row.documents + 1)]
    pairs = sum(causal_pairs(end - start) for start, end in itertools.pairwise(edges))
    speed = tokens_per_second(config, step_seconds(config, layout, rows, row.gpu, pairs)) / row.gpus
    return peak / 2**30, speed


@pytest.mark.parametrize(
    "row", [*measured()], ids=lambda row: f"{row.gpus} {row.gpu.name} {row.config} {' '.join(row.flags)}"
)
def test_closed_forms_against_gpus(row: Measured) -> None:
    gib, speed = predicted(row)
    assert not row.gib or gib == pytest.approx(row.gib, rel=0.05)
    assert not row.speed or speed == pytest.approx(row.speed, rel=0.05)


def test_the_table_is_read() -> None:
    rows = list(measured())
    assert len(rows) == 42 and sum(row.gib > 0 for row in rows) == 36 and sum(row.speed > 0 for row in rows) == 39


def test_the_predicted_fastest_is_within_3_percent_of_the_measured() -> None:
    groups: dict[tuple[str, int, str, str], list[Measured]] = {}
    for row in measured():
        if row.gpus > 1 and row.speed:
            others = [flag for flag in row.flags if not flag.startswith("--parallelism.")]
            groups.setdefault((row.gpu.name, row.gpus, row.config, " ".join(others)), []).append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    assert len(several) == 6
    for rows in several:
        chosen = max(rows, key=lambda row: predicted(row)[1])
        assert chosen.speed > 0.97 * max(row.speed for row in rows)


# Layouts and their ranking


def config(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", [*overrides])


def test_legal_layouts_are_those_that_the_checks_accept() -> None:
    """Seen to fail without `find_conflicts`: 8 × tp 16 for 8 key-value heads."""
    llama = config("llama_8b")
    found = list(legal_layouts(llama, 64))
    assert len(found) == len(set(found)) > 50
    assert {layout.gpus for layout in found} == {64} and {layout.tp for layout in found} == {1, 2, 4, 8}
    every = [
        Layout(64 // (shard * cp * tp * pp), shard, cp, tp, pp)
        for shard, cp, tp, pp in itertools.product([2**i for i in range(7)], repeat=4)
        if 64 % (shard * cp * tp * pp) == 0 and pp <= MOST_STAGES
    ]
    assert set(found) == {layout for layout in every if not find_conflicts(with_layout(llama, layout), 64)}
    assert {layout.tp for layout in legal_layouts(config("llama_8b", "--float8.recipe=rowwise"), 64)} == {1}


@pytest.mark.parametrize(("name", "gpus"), [("llama_8b", 64), ("llama_8b", 6), ("llama_1b", 8), ("xihe_120m", 1)])
def test_flags_give_what_was_planned(name: str, gpus: int) -> None:
    """Pasted behind the config, also behind one that asks for another layout."""
    for overrides in ([], ["--parallelism.tp=2", "--parallelism.dp_shard=3", "--training.micro_batch_size=2"]):
        given = config(name, *overrides)
        ranked = rank(list(plans(given, gpus, H100)), usable_memory(H100, gpus))
        assert ranked
        for entry in ranked:
            flags = [*overrides, *entry.plan.flags(given)]
            again = load_config(CONFIGS / f"{name}.toml", flags, gpus)
            asked = plan_of(again, layout_of(again.parallelism, gpus), H100)
            assert (asked.layout, asked.rows) == (entry.plan.layout, entry.plan.rows)
            assert (asked.memory, asked.seconds) == (entry.plan.memory, entry.plan.seconds)


def test_what_is_ranked_fits_and_is_in_order() -> None:
    limit = usable_memory(H100, 8)
    ranked = rank(list(plans(config("llama_8b"), 8, H100)), limit)
    seconds = [entry.plan.seconds.total for entry in ranked]
    assert seconds == sorted(seconds) and max(entry.plan.memory.total for entry in ranked) <= limit
    assert len({entry.plan.layout for entry in ranked}) == len(ranked)
    assert distinct(ranked)[0] is ranked[0] and len(distinct(ranked)) < len(ranked)
    assert "memory" in ranked[0].limits  # with more of it, larger micro-batches would be faster
    ample = rank(list(plans(config("llama_8b"), 8, H100)), 1e15)
    assert all("memory" not in entry.limits for entry in ample)


def test_nearest_changes_as_little_as_possible() -> None:
    given = config("xihe_120m")
    asked = plan_of(given, Layout(), H100)
    fitting = nearest(given, asked, H100, 0.9 * asked.memory.total)
    assert fitting is not None and fitting.flags(given) == ["--training.micro_batch_size=32"]
    assert nearest(given, asked, H100, 1e6) is None


def test_memory_and_time_follow_the_settings() -> None:
    def both(*overrides: str, gpus: int = 8) -> tuple[float, float]:
        given = config("llama_8b", *overrides)
        plan = plan_of(given, layout_of(given.parallelism, gpus), H100)
        return plan.memory.total, plan.seconds.total

    memory, seconds = both()
    for less, slower in (
        ("--parallelism.activation_checkpointing=full", True),
        ("--parallelism.tp=8", True),
        ("--parallelism.cp=8", True),
        ("--optimizer.state_dtype=bfloat16", True),
    ):
        other = both(less)
        assert other[0] < memory and (other[1] > seconds) == slower, less
    assert both("--parallelism.activation_checkpointing=none")[0] > memory
    assert both("--parallelism.reshard_after_forward=false")[0] > memory
    assert both("--model.mlp=torch", "--parallelism.activation_checkpointing=none")[0] > memory
    assert both(gpus=16)[1] < 0.6 * seconds
    assert both("--training.dtype=float32")[0] > memory and both("--training.dtype=float32")[1] > 5 * seconds
    # Beyond a host, tensor parallelism waits for the network, too.
    wide = config("llama_8b", "--model.num_key_value_heads=32", "--parallelism.tp=16")
    narrow = config("llama_8b", "--model.num_key_value_heads=32", "--parallelism.tp=8")
    a, b = (plan_of(c, layout_of(c.parallelism, 16), H100).seconds.communication for c in (wide, narrow))
    assert a > 1.5 * b


def test_time_by_part_adds_up() -> None:
    plan = plan_of(config("llama_8b"), Layout(dp_shard=8), H100)
    assert sum(plan.seconds.parts().values()) == plan.seconds.total
    assert sum(plan.memory.parts().values()) == plan.memory.total
    tokens, mfu = plan.speed(H100)
    assert tokens == plan.config.tokens_per_step / plan.seconds.total and 0.2 < mfu < 0.7


# GPUs


def test_gpus_by_name() -> None:
    assert set(DATASHEETS) == set(PEAK_BF16_TFLOPS)
    assert find_gpu("H100 80GB") is not None and find_gpu("h100 80gb").name == "H100 80GB HBM3"
    assert find_gpu("4090").name == "GeForce RTX 4090" and find_gpu("H200").name == "H200"
    for name in DATASHEETS:
        gpu = find_gpu(name)
        assert gpu.name == name.removeprefix("NVIDIA ") and 20 < gpu.memory / 2**30 < 200
    with pytest.raises(UserError, match=r"^--gpu: A100: fits several GPUs; choose one of: A100-SXM4-40GB, .*PCIe$"):
        find_gpu("A100")
    for unknown in ("Z1", "", "GPU"):
        with pytest.raises(UserError, match=r"^--gpu: .*: unknown GPU; choose one of: A100-SXM4-40GB, "):
            find_gpu(unknown)


# The command


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", str(CONFIGS / "llama_8b.toml"), "--gpus", "64", "--gpu", "H100 80GB", "--price", "2.5"]
    run(args)
    text = capsys.readouterr().out
    assert re.search(r"as configured \(1 × 64 × 1 × 1, selective, 1 row per micro-batch\):\n +[\d.]+ GiB", text)
    assert re.search(r"\n1\. .* \$[\d,]+ .*products \d+ %", text) and "   --parallelism." in text
    run([*args, "--json"])
    report = json.loads(capsys.readouterr().out)
    best = report["plans"][0]
    assert sum(best["memory_gib_by_part"].values()) == pytest.approx(best["memory_gib"]) and best["limits"]
    assert best["cost"] == pytest.approx(64 * 2.5 * best["hours"])
    assert report["configured"]["micro_batch_size"] == 1 and report["gpus"] == 64
    assert best["tokens_per_second"] * best["step_seconds"] == pytest.approx(512 * 8192)


def test_a_card_on_the_desk(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", str(CONFIGS / "xihe_120m.toml"), "--memory", "24"])
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "the nearest that fits, in 12.9 GiB: --training.micro_batch_size=32\n" in text
    assert [line.split()[8] for line in text.splitlines() if re.match(r"\d\. ", line)] == ["none", "selective", "full"]


def test_70b_on_512_gpus_takes_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    run(["plan", str(CONFIGS / "llama_70b.toml"), "--gpus", "512", "--gpu", "H100 80GB"])
    assert "70.6 B parameters" in capsys.readouterr().out and time.process_time() - start < 30


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--gpus", "-1"], r"^--gpus: must be 1 to 131,072, got -1$"),
        (["--gpus", "999999999999"], r"^--gpus: must be 1 to"),
        (["--memory", "-3"], r"^--memory and --price must be positive"),
        (["--gpu", "abacus"], r"^--gpu: abacus: unknown GPU"),
        (["--gpus", "1"], r"^plan: nothing fits on 1 GPU of 72\.3 GiB; the least is .* with .*=full; it fits on 2$"),
        (["--gpus", "two"], r"^plan: argument --gpus: invalid int value"),
        (["--parallelism.tp=3"], r"parallelism\.tp: 3 does not divide"),
    ],
)
def test_mistakes(args: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        run(["plan", str(CONFIGS / "llama_8b.toml"), *args])


def test_a_layout_that_does_not_fit_the_gpus_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", str(CONFIGS / "llama_1b.toml"), "--gpus", "3", "--parallelism.dp_shard=2"])
    text = capsys.readouterr().out
    assert re.search(r"as configured: parallelism\.dp_replicate × .* does not match 3 processes; valid", text)
    assert re.search(r"\n1\. 1 × 3 × 1 × 1 ", text)


# The trainer's refusal


def gpu_of(gib: float) -> Gpu:
    return dataclasses.replace(H100, memory=gib * 2**30)


def test_a_run_that_cannot_fit_is_refused_with_the_nearest_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpu_of", lambda device: gpu_of(16))
    given = config("xihe_120m")
    with pytest.raises(UserError) as refused:
        check.check_memory(given, torch.device("cpu"), 1)
    message = str(refused.value)
    what = r"20\.3 GiB \(1\.1 GiB for weights and optimizer, 17\.5 GiB for activations\), more than the 16\.0 GiB"
    assert re.match(f"model: a process needs at least {what} that a process has here; ", message)
    assert "\n" not in message and message.endswith("what fits, in 11.4 GiB: --training.micro_batch_size=32")
    check.check_memory(config("xihe_120m", "--training.micro_batch_size=32"), torch.device("cpu"), 1)
    with pytest.raises(UserError, match="no other layout fits either: make it smaller, or use more GPUs"):
        check.check_memory(config("llama_70b"), torch.device("cpu"), 2)
    monkeypatch.setattr(check, "gpu_of", lambda device: H100)
    with pytest.raises(UserError, match=r"no other layout fits either: use 16 GPUs \(torchxihe plan\)$"):
        check.check_memory(config("llama_70b"), torch.device("cuda"), 8)


def test_what_was_measured_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of exactly the memory that was allocated. Seen to fail with CERTAIN = 1."""
    for row in measured():
        if not row.gib:
            continue
        memory = gpu_of(row.gib)
        monkeypatch.setattr(check, "gpu_of", lambda device, memory=memory: memory)
        check.check_memory(config(row.config, *row.flags), torch.device("cpu"), row.gpus)


def test_a_budget_is_refused_only_where_full_checkpointing_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpu_of", lambda device: gpu_of(20))
    budget = "--parallelism.activation_checkpointing=budget"
    batch = "--training.global_batch_size=8"
    check.check_memory(config("llama_1b", budget, batch), torch.device("cpu"), 1)
    with pytest.raises(UserError):
        check.check_memory(config("llama_1b", batch), torch.device("cpu"), 1)


# Pipelines


def test_a_stage_has_its_part_of_the_model() -> None:
    """All stages together have the model's parameters, a tied table twice; the head counts as layers."""
    for name, tied in (("llama_8b", 0), ("xihe_120m", 1)):
        given = config(name)
        whole = sizes_of(given, Layout(), 1)
        stages = [sizes_of(given, Layout(pp=4), 1, stage) for stage in range(4)]
        assert sum(s.layers for s in stages) == whole.layers and stages[3].layers < stages[0].layers
        assert sum(s.parameters for s in stages) == whole.parameters + tied * whole.V * whole.C


def test_what_a_stage_holds_is_what_is_in_flight() -> None:
    """The first stage of 1F1B holds as many micro-batches as there are stages, the last one."""
    given = config("llama_8b", "--parallelism.pp=4")
    assert [in_flight(given, Layout(pp=4), stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(given, Layout(pp=4), 0, 2) == 2
    several = config("llama_8b", "--parallelism.pp=4", "--parallelism.pp_schedule=interleaved",
                     "--parallelism.pp_stages_per_rank=2")  # fmt: skip
    assert in_flight(several, Layout(pp=4), 0, 16) == (2 * 3 + 4 + 1) / 2


def test_the_bubble_is_that_of_the_schedule() -> None:
    """(p - 1) / m of the time of a stage's passes, divided by the stages of a rank."""
    given = config("llama_8b", "--training.global_batch_size=16", "--training.micro_batch_size=1")
    seconds = step_seconds(given, Layout(pp=4), 1, H100)
    busy = seconds.products + seconds.attention + seconds.recomputation + seconds.traffic
    assert seconds.bubble == pytest.approx(busy * 3 / 16, rel=0.02)  # gathers come once a step
