"""Twenty steps are the same under every parallelism, micro-batch, activation checkpointing and compilation."""

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.launch import run_distributed
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch
from torchxihe.errors import UserError
from torchxihe.model.decoder import Decoder
from torchxihe.parallelisms import data_parallel
from torchxihe.parallelisms.dims import ParallelDims
from torchxihe.parallelisms.float8 import apply_float8
from torchxihe.trainer import Trainer
from torchxihe.utils.device import compile_obstacle

STEPS, BATCH, SEQ_LEN, VOCAB = 20, 8, 24, 67
NAMES = ["a", "b", "never in a batch"]


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "vocab_size": VOCAB,
            "qk_norm": True,
            "tie_word_embeddings": True,
        },
        "data": {"sources": [{"path": name} for name in NAMES], "seq_len": SEQ_LEN},
        "training": {
            "steps": STEPS,
            "global_batch_size": BATCH,
            "micro_batch_size": 2,
            "dtype": "float32",
            "compile": False,
        },
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": {"warmup_steps": 5},
    }
    for section, options in sections.items():
        values[section] = values.get(section, {}) | options
    return Config.model_validate(values)


def rows_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets of a global batch, with uneven masks: ranks contribute different numbers of targets."""
    generator = np.random.default_rng(step)
    rows = (generator.integers(0, VOCAB, (BATCH, 1)) * 3 ** np.arange(SEQ_LEN + 1)) % VOCAB  # learnable
    targets = rows[:, 1:].copy()
    for j in range(BATCH):
        targets[j, : generator.integers(0, SEQ_LEN - 1)] = -100
    return rows[:, :-1], targets


def batch_of(step: int, i: int, rank: int, world_size: int, micro_batch: int) -> Batch:
    """Micro-batch `i` of one rank, like the loader's; two documents per row."""
    tokens, targets = rows_of(step)
    chosen = [(i * world_size + rank) * micro_batch + b for b in range(micro_batch)]
    tokens = np.stack([tokens[j] if j < BATCH else np.zeros(SEQ_LEN, np.int64) for j in chosen])
    targets = np.stack([targets[j] if j < BATCH else np.full(SEQ_LEN, -100) for j in chosen])
    starts = [b * SEQ_LEN + at for b in range(micro_batch) for at in (0, 9)]
    cu_seqlens = torch.tensor([*starts, micro_batch * SEQ_LEN, micro_batch * SEQ_LEN], dtype=torch.int32)
    valid = int((targets >= 0).sum())
    sources = torch.tensor([int(j >= 5) if j < BATCH else 0 for j in chosen])
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), cu_seqlens, (), sources, valid)


History = list[tuple[float, ...]]


def losses(options: dict[str, dict[str, Any]], rank: int = 0, world_size: int = 1) -> tuple[History, str]:
    """Loss, gradient norm (Adam hides a wrong scale of the gradients) and each source's loss of every step, and the
    layout's name."""
    trainer = Trainer(config(**options), torch.device("cpu"), np.ones(VOCAB, np.int32))
    loader = (
        batch_of(step, i, rank, world_size, trainer.micro_batch_size)
        for step in range(STEPS)
        for i in range(trainer.accumulation)
    )
    history = []
    for _ in range(STEPS):
        trainer.train_step(loader)
        sums = trainer.sums.read(NAMES)
        assert sums.keys() == {"loss", "bpb", "grad_norm", "skipped", "loss/a", "loss/b"}
        history.append((sums["loss"], sums["grad_norm"], sums["loss/a"], sums["loss/b"]))
    return history, trainer.dims.describe()


def rank_losses(options: dict[str, dict[str, Any]], world_size: int) -> tuple[History, str]:
    data_parallel.UNIT_PARAMETERS = 1  # one FSDP unit per block: small blocks would share one
    return losses(options, torch.distributed.get_rank(), world_size)


@functools.cache
def reference(optimizer: str = "adamw") -> History:
    """One process, no accumulation."""
    history, layout = losses({"training": {"micro_batch_size": BATCH}, "optimizer": {"name": optimizer}})
    assert layout == "one process" and history[-1][0] < history[0][0] - 1
    return history


def test_each_source_has_the_loss_of_its_rows() -> None:
    """Against the untrained model's logits, row by row."""
    trainer = Trainer(config(training={"micro_batch_size": BATCH}), torch.device("cpu"), np.ones(VOCAB, np.int32))
    batch = batch_of(0, 0, 0, 1, BATCH)
    with torch.no_grad():
        logits = trainer.model(batch.tokens, cu_seqlens=batch.cu_seqlens)
    losses_BT = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    a, b = (float(losses_BT[rows].sum() / (batch.targets[rows] >= 0).sum()) for rows in (slice(0, 5), slice(5, BATCH)))
    assert reference()[0][2:] == pytest.approx((a, b), rel=1e-6) and abs(a - b) > 1e-3


LAYOUTS = [
    (2, {"dp_shard": 1, "dp_replicate": 2}, "DDP over 2"),
    (2, {"dp_shard": 2}, "FSDP2 over 2"),
    (4, {"dp_shard": 1, "dp_replicate": 4}, "DDP over 4"),
    (4, {"dp_shard": 4, "reshard_after_forward": False}, "FSDP2 over 4"),
    (4, {"dp_shard": 2, "dp_replicate": 2}, "HSDP 2 × 2"),
    (3, {"dp_shard": 3}, "FSDP2 over 3"),  # 8 rows on 3 ranks: one row is padding
]


@pytest.mark.parametrize(("world_size", "parallelism", "layout"), LAYOUTS)
@pytest.mark.parametrize(("micro_batch", "optimizer"), [(1, "adamw"), (4, "adamw"), (2, "muon")])
def test_losses_agree_under_every_parallelism(
    world_size: int, parallelism: dict[str, Any], layout: str, micro_batch: int, optimizer: str
) -> None:
    """Seen to fail: FSDP2 and HSDP without force-sum (gloo has no PREMUL_SUM), and without the divide factor (they
    average); DDP without the hook that sums, and, where there is accumulation, without `no_sync`; FSDP2 and HSDP when
    the last micro-batch does not synchronise; all of them with the tokens of this rank, or of the micro-batch, instead
    of the global number, and without the reduction of the sums.
    """
    training = {"micro_batch_size": micro_batch}
    options = {"parallelism": parallelism, "training": training, "optimizer": {"name": optimizer}}
    for history, name in run_distributed(rank_losses, world_size, options, world_size):
        assert name == layout
        assert np.abs(np.array(history) - reference(optimizer)).max() < 1e-5


def reductions(parallelism: dict[str, Any], micro_batch: int) -> tuple[int, Counter[str], int]:
    """Micro-batches of a step on each rank, how often the step sums something over the ranks, and of how many elements
    gradients are kept between two micro-batches (0 where there is only one)."""
    data_parallel.UNIT_PARAMETERS = 1
    options = {"parallelism": parallelism, "training": {"micro_batch_size": micro_batch}}
    trainer = Trainer(config(**options), torch.device("cpu"), np.ones(VOCAB, np.int32))
    rank, world_size, calls, kept = dist.get_rank(), dist.get_world_size(), Counter[str](), 0
    batches = [batch_of(0, i, rank, world_size, micro_batch) for i in range(trainer.accumulation)]
    trainer.train_step(iter(batches))

    def between(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Called before each micro-batch. FSDP2 keeps unsharded gradients in its own attributes."""
        nonlocal kept
        kept = sum(unsharded_gradients(m) for m in module.modules() if isinstance(m, FSDPModule))

    trainer.module.register_forward_pre_hook(between)

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and "reduce" in func.name():
                calls["scattered" if "scatter" in func.name() else "summed"] += 1
            return func(*args, **(kwargs or {}))

    with Counted():
        trainer.train_step(iter(batches))
    return trainer.accumulation, calls, kept


def unsharded_gradients(module: FSDPModule) -> int:
    """Elements of the unsharded gradients that one FSDP2 unit keeps."""
    group = module._get_fsdp_state()._fsdp_param_group
    return sum(
        gradient.numel()
        for p in (group.fsdp_params if group else [])
        for gradient in (p.unsharded_accumulated_grad, getattr(p, "_unsharded_param", p.sharded_param).grad)
        if gradient is not None and not isinstance(gradient, DTensor)
    )


@pytest.mark.parametrize(
    ("world_size", "parallelism", "scattered", "shards"),
    [
        (2, {"dp_shard": 1, "dp_replicate": 2}, 0, False),
        (2, {"dp_shard": 2, "reshard_after_forward": False}, 3, False),
        (2, {"dp_shard": 2}, 3, True),
        (4, {"dp_shard": 2, "dp_replicate": 2}, 3, True),
    ],
    ids=["DDP", "FSDP2", "FSDP2 with shards", "HSDP with shards"],
)
def test_gradients_are_reduced_once_per_step(
    world_size: int, parallelism: dict[str, Any], scattered: int, shards: bool
) -> None:
    """For any accumulation; with FSDP2 one reduction for each block and one for the root. Where only shards are kept
    they are scattered after each micro-batch, but HSDP's replicas still sum once.

    Seen to fail with `set_requires_gradient_sync(True)` and without `set_requires_all_reduce`, whose losses are the
    same, and without `no_sync`.
    """
    [(many, calls, kept), *_] = run_distributed(reductions, world_size, parallelism, 1)
    [(one, expected, _), *_] = run_distributed(reductions, world_size, parallelism, BATCH // world_size)
    assert (many, one) == (BATCH // world_size, 1)
    assert calls["scattered"] == scattered * (many if shards else 1) and expected["scattered"] == scattered
    assert calls["summed"] == expected["summed"] >= 2
    assert (kept > 0) == (scattered > 0 and not shards)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_agree_with_moments_in_bfloat16(optimizer: str) -> None:
    """With a larger tolerance: a difference in the last bit may be rounded to either neighbour, 0.4 % apart."""
    options = {"optimizer": {"name": optimizer, "state_dtype": "bfloat16"}, "training": {"micro_batch_size": 4}}
    expected, _ = losses(options)
    assert 1e-4 < np.abs(np.array(expected) - reference(optimizer)).max() < 2e-3
    for history, _ in run_distributed(rank_losses, 2, options | {"parallelism": {"dp_shard": 2}}, 2):
        assert np.abs(np.array(history) - expected).max() < 4e-4


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 3])
def test_losses_agree_for_every_micro_batch(micro_batch: int) -> None:
    history, _ = losses({"training": {"micro_batch_size": micro_batch}})
    assert np.abs(np.array(history) - reference()).max() < 1e-5


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_agree_under_activation_checkpointing(mode: str, world_size: int) -> None:
    options = {"parallelism": {"activation_checkpointing": mode}}
    ranks = run_distributed(rank_losses, 2, options, 2) if world_size == 2 else [losses(options)]
    for history, _ in ranks:
        assert np.abs(np.array(history) - reference()).max() < 1e-5


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize(
    ("world_size", "parallelism"), [(1, {}), (2, {"dp_shard": 2}), (2, {"dp_shard": 1, "dp_replicate": 2})]
)
def test_float8_learns_nearly_the_same(recipe: str, world_size: int, parallelism: dict[str, Any]) -> None:
    """With a larger tolerance: a scale is shared by one micro-batch of one process."""
    pytest.importorskip("torchao")
    options = {"float8": {"recipe": recipe, "scope": "all"}, "parallelism": parallelism}
    ranks = run_distributed(rank_losses, 2, options, 2) if world_size == 2 else [losses(options)]
    for history, _ in ranks:
        difference = np.abs(np.array(history) - reference())[:, 0]
        assert 1e-4 < difference.max() < 0.2


def test_float8_needs_rows_that_its_units_can_sum_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr("torchxihe.parallelisms.float8.compute_capability", lambda device: (9, 0))
    with torch.device("meta"):
        model = Decoder(config().model, seq_len=40, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"data.seq_len: 40 must be a multiple of 16 with float8.recipe"):
        apply_float8(model, "tensorwise", torch.device("cuda"), ParallelDims())


def test_float8_keeps_its_numbers_under_activation_checkpointing() -> None:
    pytest.importorskip("torchao")
    float8 = {"recipe": "tensorwise", "scope": "all"}
    kept, again = (
        losses({"float8": float8, "parallelism": {"activation_checkpointing": mode}}) for mode in ("none", "selective")
    )
    assert kept == again


@pytest.mark.skipif(bool(compile_obstacle()), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("world_size", "parallelism"),
    [
        (1, {}),
        (1, {"activation_checkpointing": "selective"}),
        (1, {"activation_checkpointing": "budget", "activation_budget": 0.3}),
        (2, {"dp_shard": 2, "activation_checkpointing": "selective"}),
        (2, {"dp_shard": 2, "activation_checkpointing": "budget"}),
        (2, {"dp_shard": 1, "dp_replicate": 2}),
        (2, {"dp_shard": 2, "activation_checkpointing": "full"}),
    ],
)
def test_losses_agree_when_compiled(world_size: int, parallelism: dict[str, Any]) -> None:
    options = {"parallelism": parallelism, "training": {"compile": True}}
    ranks = run_distributed(rank_losses, 2, options, 2, timeout=240) if world_size == 2 else [losses(options)]
    for history, _ in ranks:
        assert np.abs(np.array(history) - reference()).max() < 2e-5


def graphs_of_some_steps(parallelism: dict[str, Any]) -> list[int]:
    """Number of compiled graphs after each of ten steps, whose micro-batches have two to nine documents."""
    data_parallel.UNIT_PARAMETERS = 1
    torch._dynamo.reset()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options = {"parallelism": parallelism, "training": {"compile": True}}
    trainer = Trainer(config(**options), torch.device("cpu"), np.ones(VOCAB, np.int32))
    generator = np.random.default_rng(rank)
    before, graphs = counters["stats"]["unique_graphs"], []
    for step in range(10):
        batches = []
        for i in range(trainer.accumulation):
            cuts = generator.integers(1, 2 * SEQ_LEN, generator.integers(0, 8)).tolist()
            cu_seqlens = torch.tensor(sorted({0, SEQ_LEN, 2 * SEQ_LEN, *cuts}), dtype=torch.int32)
            batches.append(replace(batch_of(step, i, rank, world_size, 2), cu_seqlens=cu_seqlens))
        trainer.train_step(iter(batches))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    return graphs


@pytest.mark.skipif(bool(compile_obstacle()), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("world_size", "graphs"), [(1, 3), (2, 2)])
def test_another_number_of_documents_compiles_nothing(world_size: int, graphs: int) -> None:
    """One graph for all blocks, the first one, too, and one for the head; in one process one for the table.

    Seen to fail without `dynamic_sources`.
    """
    run = functools.partial(run_distributed, graphs_of_some_steps, 2, {"dp_shard": 2}, timeout=240)
    for counts in run() if world_size == 2 else [graphs_of_some_steps({})]:
        assert counts == [graphs] * 10


def kept_bytes(**parallelism: Any) -> int:
    """Bytes that a compiled forward pass keeps for the backward pass, parameters apart."""
    torch._dynamo.reset()
    options = {"parallelism": parallelism, "training": {"compile": True, "micro_batch_size": BATCH}}
    trainer = Trainer(config(**options), torch.device("cpu"), np.ones(VOCAB, np.int32))
    batch, kept = batch_of(0, 0, 0, 1, BATCH), {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.module(batch.tokens, batch.targets, batch.cu_seqlens)
    return sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in trainer.model.parameters())


@pytest.mark.skipif(bool(compile_obstacle()), reason="torch.compile needs a C++ compiler")
def test_checkpointing_keeps_less() -> None:
    everything = kept_bytes()
    selective = kept_bytes(activation_checkpointing="selective")
    full = kept_bytes(activation_checkpointing="full")
    half, tenth = (kept_bytes(activation_checkpointing="budget", activation_budget=share) for share in (0.5, 0.1))
    assert full < selective < everything and tenth < half < everything
    assert kept_bytes() == everything  # the memory budget is reset
