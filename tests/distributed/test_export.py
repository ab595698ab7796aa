"""What four processes saved is exported by one, imported, and trains on."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_distributed
from tests.unit.saved_runs import (
    LLAMA,
    QWEN3,
    TOKENS,
    make_config,
    make_decoder,
    make_tokenizer,
    shake_norms,
    train_state,
    write_training,
)
from tests.unit.test_export import difference
from tests.unit.test_export_every import same
from tests.unit.test_model import Shape
from torchxihe.__main__ import run
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.state import flat_state
from torchxihe.config.load import dump_config
from torchxihe.kernels.select import PORTABLE
from torchxihe.parallelisms.dims import build_dims
from torchxihe.parallelisms.parallelize import parallelize
from torchxihe.utils.distributed import is_main


def _save_sharded(root: Path, shape: Shape) -> None:
    """A run's checkpoint from an FSDP2 model whose weights are `make_decoder`'s."""
    config = make_config(root, shape)
    model, _ = parallelize(config, torch.device("cpu"), build_dims(config.parallelism), PORTABLE)
    shake_norms(model)
    tokenizer = config.run_dir / "tokenizer"
    if is_main():
        make_tokenizer(config)
        (config.run_dir / "config.toml").write_text(dump_config(config))
    torch.distributed.barrier()
    checkpointer = Checkpointer(config.run_dir / "checkpoints", config.checkpoint)
    checkpointer.save(7, flat_state(model, None), train_state(config, tokenizer))
    checkpointer.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shape", [LLAMA, QWEN3])
def test_export_of_four_processes_checkpoint_and_back(tmp_path: Path, shape: Shape) -> None:
    pytest.importorskip("transformers")
    run_distributed(_save_sharded, 4, tmp_path, shape)
    out, back = tmp_path / "out", tmp_path / "back"
    run(["export", str(tmp_path / "small"), "--out", str(out)])
    model = make_decoder(make_config(tmp_path, shape))
    assert difference(out, model) < 1e-5

    run(["import", str(out), "--out", str(back)])
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 400)
    (tmp_path / "next.toml").write_text(f"""
extends = "{back}/model.toml"
run = {{dir = "{tmp_path}"}}
model = {{vocab_size = {TOKENS}}}
data = {{seq_len = 32, sources = [{{path = "{tmp_path}/text.txt"}}], cache_dir = "{tmp_path}/cache"}}
validation = {{fraction = 0.0}}
training = {{steps = 3, global_batch_size = 2, dtype = "float32", compile = false}}
metrics = {{log_every = 1, sample_tokens = 0}}
""")
    run(["prepare", str(tmp_path / "next.toml")])
    run(["train", str(tmp_path / "next.toml")])
    step = tmp_path / "next" / "checkpoints" / "step-00000003"
    assert json.loads((step / "train_state.json").read_bytes())["origin"].startswith(str(back))


def _train(path: str) -> None:
    run(["train", path, "--checkpoint.every=2", "--checkpoint.keep_last=0", "--checkpoint.export_every=4"])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_exports_while_four_processes_train(tmp_path: Path, mode: str) -> None:
    path = write_training(tmp_path, checkpoint=f'mode = "{mode}"')
    run(["prepare", str(path)])
    run_distributed(_train, 4, str(path), init=False, timeout=150)
    exports = tmp_path / "train" / "exports"
    assert sorted(folder.name for folder in exports.iterdir()) == ["step-00000004", "step-00000006"]
    for step in ("step-00000004", "step-00000006"):
        run(["export", str(tmp_path / "train" / "checkpoints" / step), "--out", str(tmp_path / step)])
        assert same(exports / step, tmp_path / step)
