"""Tests of the helper that all multi-process tests use: it must report failures."""

import os
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_distributed
from torchxihe.components.runtime.stop import Stop
from torchxihe.components.runtime.watchdog import Watchdog
from torchxihe.config.options import Parallelism
from torchxihe.parallelisms.dims import build_dims
from torchxihe.utils.distributed import all_gather_object, barrier, rank


def _sum_of_ranks() -> float:
    return sum(all_gather_object(float(rank())))


def _rank_one_raises() -> None:
    if rank() == 1:
        raise KeyError("deliberate")
    barrier()


def _rank_one_dies() -> None:
    if rank() == 1:
        os._exit(3)
    barrier()


def _rank_one_sleeps() -> None:
    if rank() == 1:
        time.sleep(60)


def test_results_come_back_by_rank() -> None:
    assert run_distributed(_sum_of_ranks, 2) == [1.0, 1.0]
    assert run_distributed(_sum_of_ranks, 1) == [0.0]


def test_the_failing_rank_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*deliberate"):
        run_distributed(_rank_one_raises, 2)


def test_a_rank_that_exits_is_reported() -> None:
    with pytest.raises(AssertionError, match="rank . "):
        run_distributed(_rank_one_dies, 2)


def test_a_hang_ends_with_stacks() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 ---.*_rank_one_sleeps"):
        run_distributed(_rank_one_sleeps, 2, timeout=2)


def _timeouts(degrees: tuple[int, int]) -> set[float]:
    mesh = build_dims(Parallelism(dp_replicate=degrees[0], dp_shard=degrees[1])).mesh("dp_replicate", "dp_shard")
    with Stop(Watchdog(Path(), 0, 0)) as stop:
        groups = [*mesh.get_all_groups(), stop._group]
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)])
def test_every_group_waits_as_long_as_all(degrees: tuple[int, int]) -> None:
    """Seen to fail without a timeout for each group: those of HSDP and of stopping had the backend's 30 minutes."""
    for timeouts in run_distributed(_timeouts, degrees[0] * degrees[1], degrees, timeout=45):
        assert timeouts == {90.0}
