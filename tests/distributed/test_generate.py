"""A sample during training has the same tokens under every parallelism."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_distributed
from tests.unit.saved_runs import QWEN3, make_config, make_decoder, shake_norms
from torchxihe.kernels.select import PORTABLE
from torchxihe.model.generate import generate
from torchxihe.parallelisms.dims import build_dims
from torchxihe.parallelisms.parallelize import parallelize

OPTIONS = {"max_tokens": 30, "context": 64, "vocab_size": 290, "stop_id": -1}


def _sample(root: Path, dp_shard: int) -> list[int]:
    config = make_config(root, QWEN3, parallelism={"dp_shard": dp_shard, "dp_replicate": 1 if dp_shard == -1 else 2})
    model, module = parallelize(config, torch.device("cpu"), build_dims(config.parallelism), PORTABLE)
    shake_norms(model)
    sampled = list(generate(module, [5, 6, 7], **OPTIONS))  # type: ignore[arg-type]
    tokens = torch.arange(20)[None]
    loss, _ = module(tokens, tokens)  # training continues
    loss.backward()
    return sampled


@pytest.mark.parametrize("dp_shard", [-1, 1])
def test_all_ranks_draw_what_one_process_draws(tmp_path: Path, dp_shard: int) -> None:
    model = make_decoder(make_config(tmp_path, QWEN3))
    alone = list(generate(model, [5, 6, 7], **OPTIONS))  # type: ignore[arg-type]
    assert run_distributed(_sample, 2, tmp_path, dp_shard) == [alone, alone]
