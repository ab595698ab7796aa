import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchxihe.data.prepare import row_index as prepare
from torchxihe.data.prepare.packing import Packed, best_fit, concat

Rows = list[list[tuple[int, int]]]


def as_documents(lengths: list[int], gap: int = 0) -> np.ndarray:
    """Documents of these lengths, one behind the other, `gap` tokens apart."""
    starts = np.cumsum([0, *[length + gap for length in lengths]])[:-1]
    return np.stack([starts, np.array(lengths, np.int64)], 1).reshape(-1, 2).astype(np.int64)


def as_rows(packed: tuple[np.ndarray, np.ndarray]) -> Rows:
    starts, pieces = packed
    return [[tuple(p) for p in pieces[a:b].tolist()] for a, b in itertools.pairwise(starts)]


def concat_slowly(documents: np.ndarray, width: int) -> Rows:
    """A token at a time."""
    rows: Rows = []
    used = width
    for start, length in documents.tolist():
        for k in range(length):
            if used == width:
                rows.append([])
                used = 0
            if k == 0 or used == 0:
                rows[-1].append((start + k, 1))
            else:
                rows[-1][-1] = (rows[-1][-1][0], rows[-1][-1][1] + 1)
            used += 1
    return rows


def best_fit_slowly(documents: np.ndarray, width: int) -> Rows:
    """A piece at a time, looking at every open row."""
    pieces = [(s + k, min(width, n - k)) for s, n in documents.tolist() for k in range(0, n, width)]
    rows: Rows = []
    for piece in sorted(pieces, key=lambda piece: -piece[1]):
        room = [width - sum(length for _, length in row) for row in rows]
        fits = [r for r in range(len(rows)) if room[r] >= piece[1]]
        if fits:
            rows[min(fits, key=lambda r: room[r])].append(piece)
        else:
            rows.append([piece])
    return rows


def tokens_of(pieces: list[tuple[int, int]]) -> Counter[int]:
    return Counter(token for start, length in pieces for token in range(start, start + length))


lengths_and_width = st.tuples(st.lists(st.integers(1, 40), max_size=60), st.integers(2, 24))


@settings(max_examples=120, deadline=None)
@given(lengths_and_width)
def test_concat_equals_the_slow_packer(case: tuple[list[int], int]) -> None:
    lengths, width = case
    documents = as_documents(lengths, gap=3)
    assert as_rows(concat(documents, width)) == concat_slowly(documents, width)


@settings(max_examples=120, deadline=None)
@given(lengths_and_width)
def test_best_fit_equals_the_slow_packer(case: tuple[list[int], int]) -> None:
    """As many rows, equally full: only which of several equally full rows takes a piece is left open."""
    lengths, width = case
    documents = as_documents(lengths, gap=3)
    fast, slow = as_rows(best_fit(documents, width)), best_fit_slowly(documents, width)
    assert sorted(sum(n for _, n in row) for row in fast) == sorted(sum(n for _, n in row) for row in slow)


@pytest.mark.parametrize("packer", [best_fit, concat])
@settings(max_examples=60, deadline=None)
@given(case=lengths_and_width)
def test_every_token_of_every_document_is_in_exactly_one_row(
    packer: Callable[[np.ndarray, int], Packed], case: tuple[list[int], int]
) -> None:
    lengths, width = case
    documents = as_documents(lengths, gap=3)
    rows = as_rows(packer(documents, width))
    assert all(0 < sum(length for _, length in row) <= width for row in rows)
    assert tokens_of([p for row in rows for p in row]) == tokens_of([tuple(d) for d in documents.tolist()])


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@settings(max_examples=60, deadline=None)
@given(shards=st.lists(st.lists(st.integers(1, 20), max_size=12), max_size=6), at_once=st.integers(1, 20))
def test_packing_a_part_at_a_time_loses_nothing(packing: str, shards: list[list[int]], at_once: int) -> None:
    """As `prepare` does it: shard by shard, `AT_ONCE` documents at a time; concat's windows run through."""
    documents = as_documents([n for shard in shards for n in shard])
    edges = np.cumsum([0, *map(len, shards)])
    parts = iter([documents[a:b] for a, b in itertools.pairwise(edges)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "AT_ONCE", at_once)
        rows = [row for packed in prepare._pack(parts, packing, 8) for row in as_rows(packed)]
    assert tokens_of([p for row in rows for p in row]) == tokens_of([tuple(d) for d in documents.tolist()])
    if packing == "concat":
        total = int(documents[:, 1].sum())  # the documents touch, so windows are ranges of tokens
        windows = [(row[0][0], sum(length for _, length in row)) for row in rows]
        assert windows == [(start, min(8, total - start)) for start in range(0, total, 8)]


def test_best_fit_wastes_little() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(int) + 1
    starts, pieces = best_fit(as_documents(lengths.tolist()), 1025)
    padding = (len(starts) - 1) * 1025 - pieces[:, 1].sum()
    assert padding / pieces[:, 1].sum() < 0.001
