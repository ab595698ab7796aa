"""A checkpoint or a Hugging Face folder as eval, generate, export and merge use it: with its model and tokenizer."""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pydantic import ValidationError
from torch import Tensor

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.history import read_train_state
from torchxihe.components.checkpoint.hugging_face import CONFIG, open_folder, read_config
from torchxihe.components.checkpoint.manifest import TRAIN_STATE, read_manifest, step_flaws
from torchxihe.components.checkpoint.staging import describe_state
from torchxihe.components.checkpoint.state import (
    corruption_explained,
    described_state,
    flat_state,
    load_model_only,
    load_tensors,
    open_fitting,
    resolve,
)
from torchxihe.components.checkpoint.storage import CorruptError, Location, hash_file
from torchxihe.components.checkpoint.tensor_files import TensorReader
from torchxihe.config.options import Checkpoint, Config, Model, Tokenizer
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.tokenizer import read_meta
from torchxihe.errors import UserError, explained
from torchxihe.kernels.select import PORTABLE, Kernels
from torchxihe.model.decoder import Decoder
from torchxihe.model.flops import parameter_counts


@dataclass(frozen=True)
class SavedRun:
    """A committed step or a Hugging Face folder, its model config and its tokenizer."""

    place: Location
    """The step directory, or the folder."""
    is_step: bool
    train_state: dict[str, Any]
    """What `History.to_json` returned; of a folder: the same, of step 0."""
    model: Model
    seq_len: int
    tokenizer_dir: Path

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have been trained for; 0 for a folder."""
        return self.train_state["step"]

    @property
    def size(self) -> int:
        """Bytes that `open_weights` reads to verify them."""
        return sum(size for size, _ in read_manifest(self.place).files.values()) if self.is_step else 0

    @property
    def config(self) -> Config | None:
        """The config that it was saved with; None for a folder, an import and an incompatible version."""
        try:
            return Config.model_validate(self.train_state["config"]) if self.train_state["stages"] else None
        except ValidationError:
            return None


def open_saved(path: str | PathLike[str]) -> SavedRun:
    """What `path` means: a run's newest checkpoint, one of its step directories, or an export (a Hugging Face folder).

    Raises UserError if there is none. Weights are neither read nor verified.
    """
    if (Path(path) / CONFIG).is_file():
        return open_exported(Path(path))
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
    return SavedRun(step_dir, True, train_state, model, config["data"]["seq_len"], found)


def open_exported(folder: Path) -> SavedRun:
    """A Hugging Face folder, at step 0. Raises UserError.

    Its tokenizer is prepared in a temporary folder, which is deleted with what is returned.
    """
    model, seq_len = read_config(folder)
    scratch = Path(tempfile.mkdtemp(prefix="torchxihe-"))
    try:
        tokenizer_dir = obtain(Tokenizer(path=str(folder)), scratch, (), "")
        vocab_size = read_meta(tokenizer_dir).vocab_size
        if vocab_size > model.vocab_size:
            sizes = f"its tokenizer has {vocab_size} tokens, its embedding {model.vocab_size} rows"
            raise UserError(f"{folder}: {sizes}; give it rows (resize_token_embeddings in transformers)")
        run = {"dir": str(folder.parent), "name": folder.name}
        train_state = {
            "step": 0,
            "stages": [],
            "config": {"run": run, "model": model.model_dump(mode="json"), "data": {"seq_len": seq_len}},
            "changes": [],
            "tokenizer": hash_file(Location(tokenizer_dir / "tokenizer.json"))[1],
            "origin": str(folder),
        }
        saved = SavedRun(Location(folder), False, train_state, model, seq_len, tokenizer_dir)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    weakref.finalize(saved, shutil.rmtree, scratch, ignore_errors=True)
    return saved


def draft_of(out: Path) -> Path:
    """Where the folder `out` is written before it is renamed, complete, to its name."""
    final = out.absolute()
    return final.with_name(f".{final.name}.torchxihe")


def save_run(
    out: Path, model: Model, train_state: dict[str, Any], tokenizer_dir: Path, read: Callable[[str], Tensor]
) -> None:
    """Make the directory `out` of a model alone, completely or not at all, one tensor in memory at a time.

    It gets checkpoints/ with the one step of `train_state`, tokenizer/, and model.toml, which a config extends to start
    from the weights. `read` gives a tensor by its name in `flat_state`. Raises UserError.
    """
    if out.exists():
        raise UserError(f"--out: {out} exists; give a new folder")
    draft = draft_of(out)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(tokenizer_dir, draft / "tokenizer")
        checkpointer = Checkpointer(draft / "checkpoints", Checkpoint(mode="sync"))
        checkpointer.save_model(train_state["step"], model, read, train_state)
        start = {
            "model": model.model_dump(mode="json"),
            "tokenizer": {"path": str(out / "tokenizer")},
            "checkpoint": {"load": str(out), "load_only": ["model"]},
        }
        (draft / "model.toml").write_text(tomli_w.dumps(start), encoding="utf-8")
        draft.replace(out)
    except OSError as error:
        raise explained(error, out) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_decoder(saved: SavedRun, device: torch.device, dtype: torch.dtype, kernels: Kernels = PORTABLE) -> Decoder:
    """The model with its weights, verified, on `device`, computing in `dtype`. Raises UserError."""
    with torch.device("meta"):
        model = Decoder(saved.model, seq_len=saved.seq_len, dtype=dtype, kernels=kernels)
    if saved.is_step:
        load_model_only(saved.place, model, device)
    else:
        read = open_weights(saved)
        model.to_empty(device=device)
        for key, parameter in flat_state(model, None).items():
            parameter.copy_(read(key))
    model.init_tables()
    return model


def open_weights(saved: SavedRun, progress: Callable[[int], object] = lambda size: None) -> Callable[[str], Tensor]:
    """Verify the weights; a function that reads a tensor by its name in `flat_state`: float32, on the host.

    `progress` gets the bytes verified since the last call. Raises UserError; so does the function.
    """
    if not saved.is_step:
        return open_folder(Path(saved.place), saved.model)
    state = described_state(saved.model)
    with corruption_explained(saved.place):
        if flaws := step_flaws(saved.place, progress=progress):
            raise CorruptError("; ".join(flaws))
    reader = open_fitting(saved.place, describe_state(state), ("model",))

    def read(key: str) -> Tensor:
        full = torch.empty_like(state[key], device="cpu")
        load_tensors({key: full}, reader, None)
        return full

    return read
