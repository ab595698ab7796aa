"""Context parallelism's exchanges against attention over full rows, and one long row."""

import random

import numpy as np
import pytest
import torch

from tests.distributed.launch import run_distributed
from tests.distributed.layouts import NAMES, SHAPES, VOCAB, config
from torchxihe.data.loader import Batch
from torchxihe.kernels.attention import sdpa
from torchxihe.parallelisms.context_parallel import cut_batch, gathered, ulysses
from torchxihe.trainer import Trainer


def _ulysses(heads: int, keys: int, rows: int, documents: bool) -> float:
    """Largest difference of output and gradients from attention over full rows."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator, length = torch.Generator().manual_seed(0), 6
    tensors = [torch.randn(rows, length * size, n, 8, generator=generator) for n in (heads, keys, keys, heads)]
    edges = [row * length * size + at for row in range(rows) for at in ((0, 5, 6) if row == 0 else (0, 7))]
    cu_seqlens = torch.tensor([*edges, rows * length * size], dtype=torch.int32) if documents else None
    whole = [x.clone().requires_grad_() for x in tensors[:3]]
    part = [x[:, rank * length : (rank + 1) * length].clone().requires_grad_() for x in tensors[:3]]
    expected = sdpa(*whole, cu_seqlens)
    expected.backward(tensors[3])
    group = torch.distributed.group.WORLD
    assert group is not None
    out = ulysses(*part, cu_seqlens, attention=sdpa, size=size, rank=rank, group=group.group_name)
    out.backward(tensors[3][:, rank * length : (rank + 1) * length])
    pairs = [(out, expected), *((mine.grad, full.grad) for mine, full in zip(part, whole, strict=True))]
    mine = slice(rank * length, (rank + 1) * length)
    return max(float((a - b[:, mine]).detach().abs().max()) for a, b in pairs if a is not None and b is not None)


@pytest.mark.parametrize(("world", "heads", "keys"), [(2, 4, 4), (2, 4, 2), (4, 8, 2), (3, 6, 1), (4, 6, 6), (2, 6, 3)])
@pytest.mark.parametrize(("rows", "documents"), [(2, False), (2, True), (3, True)])
def test_attention_exchanges_sequence_for_heads(world: int, heads: int, keys: int, rows: int, documents: bool) -> None:
    """Also with fewer key-value heads than ranks, and with a number that they do not divide; by halves of the rows and
    with a number that has none.

    Seen to fail where the second half had the first one's documents, or its output the first one's shares of heads.
    """
    assert max(run_distributed(_ulysses, world, heads, keys, rows, documents)) < 1e-5


def _gathered(rows: int, seq_len: int, edges: list[int] | None) -> float:
    """Largest difference of output and gradients from attention over full rows, in float64."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(rows, seq_len, n, 8, generator=generator).double() for n in (6, 2, 2, 6)]
    cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    whole = [x.clone().requires_grad_() for x in full[:3]]
    expected = sdpa(*whole, cu_seqlens)
    expected.backward(full[3])
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
    batch = cut_batch(Batch(tokens, tokens, cu_seqlens, (), tokens, 0), size=size, rank=rank, method="gather")
    group, mine = torch.distributed.group.WORLD, batch.positions
    assert group is not None
    part = [x[:, mine].clone().requires_grad_() for x in full[:3]]
    out = gathered(*part, batch.cu_seqlens, attention=sdpa, size=size, rank=rank, group=group.group_name)
    out.backward(full[3][:, mine])
    pairs = [(out, expected), *((mine.grad, full.grad) for mine, full in zip(part, whole, strict=True))]
    return max(float((a - b[:, mine]).detach().abs().max()) for a, b in pairs if a is not None and b is not None)


def _gathered_cases(seed: int, count: int) -> float:
    """Rows of random documents: of one token, of entire rows, with borders on and beside those of the chunks."""
    draw, size = random.Random(seed), torch.distributed.get_world_size()
    worst = _gathered(2, 4 * size, None)
    for _ in range(count):
        rows, seq_len = draw.randint(1, 3), 2 * size * draw.randint(1, 8)
        inner = draw.sample(range(1, rows * seq_len), draw.randint(0, min(12, rows * seq_len - 1)))
        borders = {n * seq_len for n in range(rows + 1)} | set(inner)
        padding = [rows * seq_len] * draw.randint(0, 2)
        worst = max(worst, _gathered(rows, seq_len, [*sorted(borders), *padding]))
    return worst


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gathered_keys_see_what_full_rows_see(world: int) -> None:
    """Seen to fail with a chunk too few, with left-aligned queries, and with the gradients of one rank only."""
    assert max(run_distributed(_gathered_cases, world, world, 40, timeout=120)) < 1e-6


def _long_row(degrees: dict[str, int]) -> float:
    """The loss of one row of 65,536 tokens."""
    length = 65_536
    values = {"model": SHAPES["qwen3"], "data": {"seq_len": length}, "parallelism": degrees}
    values["training"] = {"micro_batch_size": 1, "global_batch_size": 1}
    trainer = Trainer(config(**values), torch.device("cpu"), np.ones(VOCAB, np.int32))
    tokens = torch.randint(0, VOCAB, (1, length + 1), generator=torch.Generator().manual_seed(0))
    row = Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), None, (), torch.zeros(1, dtype=torch.int64), length)
    trainer.train_step(iter([trainer.batch_spec.cut(row)]))
    return trainer.sums.read(NAMES)["loss"]


@pytest.mark.long
def test_a_row_of_65536_tokens() -> None:
    expected = _long_row({})
    for found in run_distributed(_long_row, 4, {"cp": 4}, timeout=500):
        assert abs(found - expected) < 1e-5
