"""A Hugging Face folder, Llama or Qwen3: its config, and its weights under the decoder's names, one at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from torchxihe.components.checkpoint.state import described_state
from torchxihe.config.options import Model
from torchxihe.errors import UserError
from torchxihe.model.flops import parameter_counts
from torchxihe.model.hf import hf_name, model_from_hf
from torchxihe.utils.records import DamagedError, read_record

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Index(BaseModel):
    """What is read of `INDEX`."""

    weight_map: dict[str, str]


def read_config(folder: Path) -> tuple[Model, int]:
    """The model of a folder and its sequence length. Raises UserError."""
    path = folder / CONFIG
    try:
        return model_from_hf(read_record(path, dict[str, Any]))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a Hugging Face model") from None
    except DamagedError as error:
        raise UserError(f"{path}: {error}; download it again") from None
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {found}") from None
    except ValueError as error:  # a model of another kind
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, TypeError, ArithmeticError) as error:  # a value of another type
        raise UserError(f"{path}: not the config of a model: {error}") from None


def open_folder(folder: Path, model: Model) -> Callable[[str], Tensor]:
    """A function that reads a tensor by its name in `flat_state`: on the host, converted to float32.

    Raises UserError unless the files hold exactly the parameters of `model`, in their shapes; the function, for values
    that are not finite.
    """
    from safetensors import SafetensorError, safe_open  # only for these folders

    files = _weight_files(folder)
    _check_size(folder, files, model)
    state = described_state(model)
    wanted = {hf_name(key.removeprefix("model.")): (key, list(value.shape)) for key, value in state.items()}
    found: dict[str, Any] = {}
    flaws: list[str] = []
    for file in files:
        try:
            tensors: Any = safe_open(file, framework="pt").__enter__()  # open as long as the function is used
            for name in tensors.keys():  # noqa: SIM118 (it has no iterator)
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # computed from the config
                if name == "lm_head.weight" and model.tie_word_embeddings:
                    found["head"] = tensors
                    continue
                if name not in wanted:
                    flaws.append(f"{name} has no place in the model")
                    continue
                key, shape = wanted.pop(name)
                part = tensors.get_slice(name)  # nothing is read yet
                if part.get_shape() != shape:
                    flaws.append(f"{name} is {part.get_shape()}, config.json says {shape}")
                elif (dtype := part[:0].dtype) not in DTYPES:
                    flaws.append(f"{name} is {str(dtype).removeprefix('torch.')}, as of quantised weights")
                found[key] = tensors
        except (SafetensorError, RuntimeError, ValueError) as error:  # its header may say anything
            raise UserError(f"{file}: incomplete or damaged: {error}; download it again (git lfs pull)") from None
    _refuse(folder, [*flaws, *(f"{name} is missing" for name in wanted)])

    def read(key: str) -> Tensor:
        name = hf_name(key.removeprefix("model."))
        tensor = found[key].get_tensor(name).float()
        if not tensor.isfinite().all():
            _refuse(folder, [f"{name} has values that are not finite as float32"])
        if key == "model.embed_tokens.weight" and "head" in found:
            head = found["head"].get_tensor("lm_head.weight").float()
            if not torch.equal(head, tensor):
                why = "lm_head.weight is not the embedding, so config.json must say tie_word_embeddings = false"
                _refuse(folder, [why])
        return tensor

    return read


def _refuse(folder: Path, flaws: list[str]) -> None:
    """Raise UserError if there are any."""
    if flaws:
        more = f" and {len(flaws) - 6} more" if len(flaws) > 6 else ""
        raise UserError(f"{folder}: {'; '.join(flaws[:6])}{more}: not a plain Llama or Qwen3")


def _check_size(folder: Path, files: list[Path], model: Model) -> None:
    """Raise UserError, before anything of the model's size is made, if the weights are far fewer than the model's."""
    count, size = parameter_counts(model)[0], sum(file.stat().st_size for file in files)
    if count > 2 * size + 2**20:  # of a few missing tensors, or of a truncated file, later errors say more
        what = f"{count:,} parameters according to config.json"
        raise UserError(f"{folder}: {what}, but the weights have only {size:,} bytes; correct one of them")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files, as the index lists them if there is one. Raises UserError if there are none."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted({Path(name).name for name in read_record(index, _Index).weight_map.values()})
        except DamagedError as error:
            raise UserError(f"{index}: not an index of safetensors files: {error}; download it again") from None
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    gone = next((file for file in files if not file.is_file()), None)
    if gone is not None:
        other = " (save_pretrained in transformers makes them of others)" if any(folder.glob("*.bin")) else ""
        raise UserError(f"{gone}: no such file; the weights must be safetensors{other}")
    return files
