"""A checkpoint as eval, generate and export use it: with its model config and tokenizer."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from torchxihe.components.checkpoint.history import read_train_state
from torchxihe.components.checkpoint.manifest import TRAIN_STATE, step_of
from torchxihe.components.checkpoint.state import corruption_explained, load_model_only, resolve
from torchxihe.components.checkpoint.storage import CorruptError, Location, hash_file
from torchxihe.components.checkpoint.tensor_files import TensorReader
from torchxihe.config.options import Config, Model
from torchxihe.data.tokenizer import read_meta
from torchxihe.errors import UserError
from torchxihe.kernels.select import PORTABLE, Kernels
from torchxihe.model.decoder import Decoder
from torchxihe.model.flops import parameter_counts


@dataclass(frozen=True)
class SavedRun:
    """A committed step, its model config and its tokenizer."""

    step_dir: Location
    train_state: dict[str, Any]
    """What `History.to_json` returned."""
    model: Model
    seq_len: int
    tokenizer_dir: Path

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have been trained for."""
        return step_of(self.step_dir.name)

    @property
    def config(self) -> Config | None:
        """The config that it was saved with; None for an imported model, and for one of an incompatible version."""
        try:
            return Config.model_validate(self.train_state["config"]) if self.train_state["stages"] else None
        except ValidationError:
            return None


def open_saved(path: str | PathLike[str]) -> SavedRun:
    """The checkpoint that `path` (a run, or one of its step directories) means; a run's newest one.

    Raises UserError if there is none. Weights are neither read nor verified.
    """
    step_dir = resolve(path)
    with corruption_explained(step_dir):
        train_state = read_train_state(step_dir)
        config = train_state["config"]
        try:
            model = Model.model_validate(config["model"])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{step_dir}: this torchxihe has no such model: {where}: {first['msg']}; use another version"
            ) from None
        saved = TensorReader(step_dir).metadata.state_dict_metadata
        numbers = [entry.size.numel() for key, entry in saved.items() if key.startswith("model.")]  # pyright: ignore
        if sum(numbers) != parameter_counts(model)[0]:  # before anything of the model's size is made
            raise CorruptError(f"{TRAIN_STATE} describes another model than the tensors")
    of_run = Path(config["run"]["dir"], config["run"]["name"])
    homes = [Path(path), Path(step_dir.parent.parent), of_run]
    found = next((home / "tokenizer" for home in homes if (home / "tokenizer" / "torchxihe.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{step_dir}: the run's tokenizer/ is neither beside checkpoints/ nor in {of_run}; put it there"
        )
    read_meta(found)  # checks every file there
    if hash_file(Location(found / "tokenizer.json"))[1] != train_state["tokenizer"]:
        raise UserError(f"{found}: tokenizer.json is not the one that {step_dir} was trained with")
    return SavedRun(step_dir, train_state, model, config["data"]["seq_len"], found)


def load_decoder(saved: SavedRun, device: torch.device, dtype: torch.dtype, kernels: Kernels = PORTABLE) -> Decoder:
    """The model with its weights, verified, on `device`, computing in `dtype`. Raises UserError."""
    with torch.device("meta"):
        model = Decoder(saved.model, seq_len=saved.seq_len, dtype=dtype, kernels=kernels)
    load_model_only(saved.step_dir, model, device)
    model.init_tables()
    return model
