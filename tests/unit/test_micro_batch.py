"""`training.micro_batch_size = 0`: the largest micro-batch that fits, from three trials."""

import math
from functools import partial

import pytest
import torch

from torchxihe.components.runtime import micro_batch
from torchxihe.components.runtime.micro_batch import fit_micro_batch, rows_that_fit
from torchxihe.config.options import Config
from torchxihe.errors import UserError

GIB = 2**30


def config(micro_batch_size: int, global_batch_size: int = 512) -> Config:
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return Config.model_validate(
        {
            "model": model | {"head_dim": 8, "intermediate_size": 8, "vocab_size": 8},
            "data": {"sources": [{"path": "unused"}], "seq_len": 8},
            "training": {
                "steps": 1,
                "global_batch_size": global_batch_size,
                "micro_batch_size": micro_batch_size,
            },
        }
    )


@pytest.mark.parametrize(
    ("peaks", "limit", "most", "rows"),
    [
        ({1: 100, 2: 110}, 200, 512, 11),
        ({1: 100, 2: 110}, 199, 512, 10),
        ({1: 100, 2: 130, 5: 200}, 300, 512, 9),  # the line through the larger two, which is flatter
        ({1: 100, 2: 110}, 10_000, 64, 64),
        ({1: 100, 2: 110}, 90, 64, 1),
        ({1: 100}, 10_000, 1, 1),
        ({1: 100, 2: math.inf}, 10_000, 64, 1),
        ({1: 100, 2: 110, 9: math.inf}, 190, 64, 8),  # what did not fit, does not
        ({1: 100, 2: 100}, 150, 64, 52),  # no growth to be seen: a byte a row is assumed, never a division by zero
    ],
)
def test_rows_on_the_line(peaks: dict[int, float], limit: float, most: int, rows: int) -> None:
    assert rows_that_fit(peaks, limit, most) == rows


def fitted(monkeypatch: pytest.MonkeyPatch, free: int, config: Config) -> tuple[int, list[int]]:
    """The choice on a GPU whose memory is a line in the rows once the loss's chunks are full, and the trials made."""
    tried: list[int] = []

    def trial(config: Config, device: torch.device) -> None:
        rows = config.training.micro_batch_size
        assert config.training.global_batch_size == 2 * rows  # the second micro-batch adds to gradients
        tried.append(rows)
        if peak(rows) > free:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def peak(rows: int) -> int:
        return int((2 + 0.3 * rows + 0.1 * min(rows, 10)) * GIB)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak(tried[-1]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    return fit_micro_batch(config, torch.device("cuda", 0), trial, data_ranks=1).training.micro_batch_size, tried


def test_the_largest_that_fits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 40 * GIB
    rows, tried = fitted(monkeypatch, free, config(0))
    limit = micro_batch.MEMORY_SHARE * free / GIB
    assert tried[:2] == [1, 2] and len(tried) == 3 and 2 + 0.4 * tried[2] <= limit  # no trial runs out of memory
    assert 3 + 0.3 * rows <= limit < 3 + 0.3 * (rows + 2)


def test_the_share_of_a_process_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(monkeypatch, 400 * GIB, config(0, global_batch_size=16)) == (16, [1, 2, 16])
    assert fitted(monkeypatch, 400 * GIB, config(0, global_batch_size=1)) == (1, [1])


@pytest.mark.parametrize("free", [2.0, 2.5])  # 2.4 GiB are more than there are, or more than are to be used
def test_one_row_too_many_is_a_mistake(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    limit = f"{micro_batch.MEMORY_SHARE * free:.1f}"
    with pytest.raises(UserError, match=rf"training\.micro_batch_size: a step of one row does not fit in the {limit}"):
        fitted(monkeypatch, int(free * GIB), config(0))


def test_one_row_fits_where_two_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(monkeypatch, int(2.7 * GIB), config(0)) == (1, [1, 2])


def test_a_number_is_left_alone_and_a_cpu_needs_one() -> None:
    given = config(3)
    fit = partial(fit_micro_batch, data_ranks=1, trial=lambda config, device: pytest.fail("no trial is needed"))
    assert fit(given, torch.device("cuda", 0)) is given
    with pytest.raises(UserError, match=r"training\.micro_batch_size: 0 .* on a CPU give a number"):
        fit(config(0), torch.device("cpu"))
