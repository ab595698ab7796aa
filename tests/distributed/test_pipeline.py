"""Pipelines: the division of the layers, errors in a stage, and checkpoints that lack something."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.launch import run_distributed
from tests.distributed.layouts import BATCH, SEQ_LEN, SHAPES, VOCAB, batch_of, config
from tests.unit.saved_runs import state_of
from tests.unit.test_model import Shape, model_config
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.config.options import Checkpoint
from torchxihe.errors import UserError
from torchxihe.parallelisms.pipeline_parallel import stage_layers
from torchxihe.trainer import Trainer


@pytest.mark.parametrize(
    ("layers", "stages", "vocab_size", "sizes"),
    [(12, 4, 8, [3, 3, 3, 3]), (4, 4, 100_000, [1, 1, 1, 1]), (12, 2, 4 * 356, [8, 4]), (5, 2, 8, [3, 2])],
)
def test_the_slowest_stage_has_the_least_work(layers: int, stages: int, vocab_size: int, sizes: list[int]) -> None:
    """With the head counted: a layer here has 5,632 parameters and attends to 4 positions."""
    model = model_config(Shape(16, 2, 2, 8, False, False)).model_copy(
        update={"num_hidden_layers": layers, "vocab_size": vocab_size}
    )
    parts = stage_layers(model, 4, stages)
    assert [len(part) for part in parts] == sizes
    assert [i for part in parts for i in part] == [*range(layers)]


def _failing_stage() -> None:
    """A user's mistake that shows in the second stage's forward pass."""
    values: dict[str, Any] = {"model": SHAPES["qwen3"], "data": {"seq_len": SEQ_LEN}, "parallelism": {"pp": 2}}
    trainer = Trainer(config(**values), torch.device("cpu"), np.ones(VOCAB, np.int32))
    if trainer.dims.rank("pp") == 1:
        next(iter(trainer.model.children())).register_forward_pre_hook(_raise)
    trainer.train_step(iter([batch_of(0, [first, first + 1]) for first in range(0, BATCH, 2)]))


def _raise(*_: Any) -> None:
    raise UserError("a user's mistake")


def test_an_error_in_a_stage_keeps_its_type() -> None:
    """The schedule wraps it in a RuntimeError, which would be a traceback. Seen to fail without the unwrapping."""
    with pytest.raises(AssertionError) as failure:
        run_distributed(_failing_stage, 2)
    assert str(failure.value).rstrip().endswith("UserError: a user's mistake")


def _without_a_layer(root: Path) -> str:
    values: dict[str, Any] = {"model": SHAPES["qwen3"], "data": {"seq_len": SEQ_LEN}, "parallelism": {"pp": 2}}
    trainer = Trainer(config(**values), torch.device("cpu"), np.ones(VOCAB, np.int32))
    state = {key: value for key, value in trainer.state().items() if "layers.3.mlp" not in key}
    try:
        Checkpointer(root, Checkpoint(mode="sync")).save(1, state, state_of(1), expected=trainer.expected)
    except AssertionError as error:
        return str(error)
    return ""


def test_what_no_stage_has_is_not_left_out_of_a_checkpoint(tmp_path: Path) -> None:
    for message in run_distributed(_without_a_layer, 2, tmp_path):
        assert "not every tensor would be saved" in message and "model.layers.3.mlp.down_proj.weight" in message
    assert not [*tmp_path.glob("step-*[0-9]")]
