"""A checkpoint seen from outside training: of which run, of what model, with which tokenizer."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from torchxihe.components.checkpoint.manifest import TRAIN_STATE, CorruptError, read_manifest, step_of
from torchxihe.components.checkpoint.state import corrupt, load_model_only, resolve
from torchxihe.components.checkpoint.storage import Location, hash_file, with_retries
from torchxihe.config.options import Model
from torchxihe.errors import UserError, explained
from torchxihe.kernels.select import PORTABLE, Kernels
from torchxihe.model.decoder import Decoder


@dataclass(frozen=True)
class SavedRun:
    """A committed step and what belongs to it."""

    step_dir: Location
    train_state: dict[str, Any]
    """What `History.to_json` wrote."""
    model: Model
    seq_len: int
    tokenizer_dir: Path

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have behind them."""
        return step_of(self.step_dir.name)


def open_saved(path: str | PathLike[str]) -> SavedRun:
    """The checkpoint that `path` (a run, or one of its step directories) means; a run's newest one.

    Raises UserError if there is none. Weights are not read, nor is anything verified.
    """
    step_dir = resolve(path)
    try:
        if hash_file(step_dir / TRAIN_STATE) != read_manifest(step_dir).files.get(TRAIN_STATE):
            raise corrupt(step_dir, f"{TRAIN_STATE} is not what was written")
        train_state = json.loads(with_retries((step_dir / TRAIN_STATE).read))
    except OSError as error:
        raise explained(error) from None
    except CorruptError as error:
        raise corrupt(step_dir, str(error)) from None
    config = train_state["config"]
    of_run = Path(config["run"]["dir"], config["run"]["name"])
    homes = [Path(path), Path(step_dir.parent.parent), of_run]
    found = next((home / "tokenizer" for home in homes if (home / "tokenizer" / "torchxihe.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{step_dir}: the run's tokenizer/ is neither beside checkpoints/ nor in {of_run}; put it there"
        )
    if hash_file(Location(found / "tokenizer.json"))[1] != train_state["tokenizer"]:
        raise UserError(f"{found}: tokenizer.json is damaged, or another than the one that {step_dir} was trained with")
    return SavedRun(step_dir, train_state, Model.model_validate(config["model"]), config["data"]["seq_len"], found)


def load_decoder(saved: SavedRun, device: torch.device, dtype: torch.dtype, kernels: Kernels = PORTABLE) -> Decoder:
    """The model with its weights, verified, on `device`, computing in `dtype`. Raises UserError."""
    with torch.device("meta"):
        model = Decoder(saved.model, seq_len=saved.seq_len, dtype=dtype, kernels=kernels)
    model.to_empty(device=device)
    model.init_tables()
    load_model_only(saved.step_dir, model)
    return model
