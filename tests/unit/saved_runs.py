"""Run directories like those of training, made in a second without training, for tests of the other commands."""

from pathlib import Path
from typing import Any

import torch

from tests.unit.test_model import Shape, model_config
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.history import History
from torchxihe.components.checkpoint.state import flat_state
from torchxihe.config.load import dump_config
from torchxihe.config.options import Config
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.model.decoder import Decoder

LLAMA = Shape(64, 4, 2, 16, False, False)
QWEN3 = Shape(48, 4, 2, 32, True, True)
TEXT = ["def f(x):\n    return x + 1\n", "import os\nimport sys\n", "the quick brown fox jumps over the lazy dog. " * 9]
TOKENS = 290


def make_config(root: Path, shape: Shape, vocab_size: int = 320, **sections: dict[str, Any]) -> Config:
    """A config of a small run in `root`."""
    model = model_config(shape).model_copy(update={"vocab_size": vocab_size})
    values: dict[str, Any] = {
        "run": {"dir": str(root), "name": "small"},
        "model": model.model_dump(),
        "tokenizer": {"vocab_size": TOKENS},
        "data": {"sources": [{"path": "text.txt"}], "seq_len": 128},
        "training": {"steps": 7, "global_batch_size": 2, "dtype": "float32", "compile": False},
    }
    return Config.model_validate(values | sections)


def make_tokenizer(config: Config) -> Path:
    """The run's tokenizer/, of 290 tokens."""
    folder = config.run_dir / "tokenizer"
    obtain(config.tokenizer, config.run_dir / "cache", TEXT, "").rename(folder)
    return folder


def make_decoder(config: Config) -> Decoder:
    """Random weights; norm weights differ from one, so that a missing norm is detected."""
    with torch.device("meta"):
        model = Decoder(config.model, seq_len=config.data.seq_len, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.init_weights(config.training.seed)
    shake_norms(model)
    return model


@torch.no_grad()
def shake_norms(model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.mul_(1 + 0.01 * (len(name) % 20))


def make_run(root: Path, shape: Shape, vocab_size: int = 320, **sections: dict[str, Any]) -> tuple[Config, Decoder]:
    """A run with a checkpoint of step 7; its model."""
    config = make_config(root, shape, vocab_size, **sections)
    tokenizer = config.run_dir / "tokenizer"
    if not tokenizer.exists():
        make_tokenizer(config)
    model = make_decoder(config)
    (config.run_dir / "config.toml").write_text(dump_config(config))
    checkpointer = Checkpointer(config.run_dir / "checkpoints", config.checkpoint)
    checkpointer.save(7, flat_state(model, None), train_state(config, tokenizer))
    checkpointer.close()
    return config, model


def state_of(step: int, origin: str = "") -> dict[str, Any]:
    """The minimal train_state of a checkpoint of `step`."""
    config = {"run": {"dir": "runs", "name": "toy"}, "model": {}, "data": {"seq_len": 8, "format": "text"}}
    return {"step": step, "stages": [], "config": config, "changes": [], "tokenizer": "", "origin": origin}


def train_state(config: Config, tokenizer: Path) -> dict[str, Any]:
    """The train_state of a checkpoint of step 7."""
    history = History(config, tokenizer)
    same = {"seed": 0, "sources": ["key"], "quotas": [2048]}
    first, second = {"g": 0, "step": 0, "global_batch": 2}, {"g": 18, "step": 9, "global_batch": 4}
    history.stages = [first | same | {"first": [0]}, second | same | {"first": [18]}]
    return history.to_json(7)


def write_training(root: Path, steps: int = 6, **more: str) -> Path:
    """A config file of a run that trains in a second, on two sources; `more`: lines of TOML by section."""
    for name in ("a", "b"):
        lines = [f"{name} the quick brown fox jumps over lazy dog number {i}.\n" for i in range(300)]
        (root / f"{name}.txt").write_text("".join(lines))
    sections = {
        "run": f'dir = "{root}"',
        "model": "hidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 2\nnum_key_value_heads = 1\n"
        "head_dim = 16\nintermediate_size = 64\nvocab_size = 320",
        "tokenizer": "vocab_size = 300",
        "data": f'seq_len = 32\ncache_dir = "{root}/cache"\nsources = ['
        + ", ".join(f'{{path = "{root}/{name}.txt", name = "{name}", format = "lines"}}' for name in ("a", "b"))
        + "]",
        "validation": "fraction = 0.1\nevery = 3",
        "training": f'steps = {steps}\nglobal_batch_size = 4\nmicro_batch_size = 2\ndtype = "float32"\ncompile = false',
        "metrics": "log_every = 1\nsample_tokens = 3",
    }
    text = {name: f"{lines}\n{more.pop(name, '')}" for name, lines in sections.items()} | more
    path = root / "train.toml"
    path.write_text("\n".join(f"[{name}]\n{lines}\n" for name, lines in text.items()))
    return path
