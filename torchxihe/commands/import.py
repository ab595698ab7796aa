"""Convert a Hugging Face model, Llama or Qwen3, to a checkpoint to continue training from."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from tqdm import tqdm

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.export import draft_of
from torchxihe.components.checkpoint.state import flat_state
from torchxihe.components.checkpoint.storage import Location, hash_file
from torchxihe.config.options import Checkpoint, Model, Tokenizer
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE, read_meta
from torchxihe.errors import UserError, explained
from torchxihe.model.decoder import Decoder
from torchxihe.model.flops import parameter_counts
from torchxihe.model.hf import hf_name, model_from_hf
from torchxihe.parsers import parse
from torchxihe.utils.records import DamagedError, read_record

INDEX = "model.safetensors.index.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Index(BaseModel):
    """What is read of `INDEX`."""

    weight_map: dict[str, str]


def main(args: list[str]) -> None:
    """Import, and print how to use it. Raises UserError."""
    options = parse("import", args)
    if options.out.exists():
        raise UserError(f"--out: {options.out} exists; give a new folder")
    folder = Path(options.source)
    if not folder.is_dir():
        folder = _download(options.source, options.revision)
    try:
        import_model(folder, options.out, options.source)
    except OSError as error:
        raise explained(error, options.out) from None
    # `extends` is relative to the config, wherever that will be.
    extends = json.dumps(str(options.out.absolute() / "model.toml"), ensure_ascii=False)
    print(f"{options.out}: begin a config with extends = {extends} and add [data] and [training]")


def import_model(folder: Path, out: Path, origin: str) -> None:
    """Make the directory `out` from the Hugging Face `folder`, completely or not at all. Raises UserError, OSError."""
    model, seq_len = _read_config(folder / "config.json")
    draft = draft_of(out)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        with tempfile.TemporaryDirectory() as cache:
            tokenizer = obtain(Tokenizer(path=str(folder)), Path(cache), (), "")
            vocab_size = read_meta(tokenizer).vocab_size
            if vocab_size > model.vocab_size:
                sizes = f"its tokenizer has {vocab_size} tokens, its embedding {model.vocab_size} rows"
                raise UserError(f"{folder}: {sizes}; give it rows (resize_token_embeddings in transformers)")
            shutil.copytree(tokenizer, draft / "tokenizer")
        _write(draft, out, model, seq_len, _read_weights(folder, model), origin)
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(draft: Path, out: Path, model: Model, seq_len: int, state: dict[str, Tensor], origin: str) -> None:
    """Write the checkpoint and `model.toml` to `draft`, which is to become `out`."""
    config = {
        "run": {"dir": str(out.parent), "name": out.name},
        "model": model.model_dump(mode="json"),
        "data": {"seq_len": seq_len},
    }
    train_state = {
        "step": 0,
        "stages": [],
        "config": config,
        "changes": [],
        "tokenizer": hash_file(Location(draft / "tokenizer" / "tokenizer.json"))[1],
        "origin": origin,
    }
    checkpointer = Checkpointer(draft / "checkpoints", Checkpoint(mode="sync"))
    checkpointer.save(0, state, train_state)
    checkpointer.close()
    start = {
        "model": config["model"],
        "tokenizer": {"path": str(out / "tokenizer")},
        "checkpoint": {"load": str(out), "load_only": ["model"]},
    }
    (draft / "model.toml").write_text(tomli_w.dumps(start), encoding="utf-8")


def _download(hub_id: str, revision: str) -> Path:
    """The files of a hub model that matter here, from its cache if they are there."""
    import huggingface_hub  # slow, and only for models on the hub

    try:
        patterns = ["config.json", "*.safetensors", INDEX, "tokenizer*.json", CHAT_TEMPLATE_FILE]
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # not found, gated, no network: many types
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{hub_id}: not a folder here, and not on the hub: {why}") from None


def _read_config(path: Path) -> tuple[Model, int]:
    """The model and its sequence length. Raises UserError."""
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


def _read_weights(folder: Path, model: Model) -> dict[str, Tensor]:
    """The checkpoint's state, in float32. Raises UserError unless the files hold exactly the model's parameters."""
    from safetensors import SafetensorError, safe_open  # only for imports

    files = _weight_files(folder)
    _check_size(folder, files, model)
    with torch.device("meta"):
        decoder = Decoder(model, seq_len=2, dtype=torch.float32)
    wanted = {hf_name(key.removeprefix("model.")): (key, value) for key, value in flat_state(decoder, None).items()}
    state: dict[str, Tensor] = {}
    flaws: list[str] = []
    head: Tensor | None = None
    for file in tqdm(files, desc="import", unit="file", disable=None):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it has no iterator)
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # computed from the config
                    if name == "lm_head.weight" and model.tie_word_embeddings:
                        head = tensors.get_tensor(name).float()
                        continue
                    if name not in wanted:
                        flaws.append(f"{name} has no place in the model")
                        continue
                    key, like = wanted.pop(name)
                    shape = tensors.get_slice(name).get_shape()  # before the tensor is read
                    if shape != list(like.shape):
                        flaws.append(f"{name} is {shape}, config.json says {list(like.shape)}")
                        continue
                    tensor: Any = tensors.get_tensor(name)
                    state[key] = tensor.float()
                    if tensor.dtype not in DTYPES:
                        flaws.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, as of quantised weights")
                    elif not state[key].isfinite().all():
                        flaws.append(f"{name} has values that are not finite as float32")
        except (SafetensorError, RuntimeError, ValueError) as error:  # its header may say anything
            raise UserError(f"{file}: incomplete or damaged: {error}; download it again (git lfs pull)") from None
    table = state.get("model.embed_tokens.weight")
    if head is not None and table is not None and not torch.equal(head, table):
        flaws.append("lm_head.weight is not the embedding, so config.json must say tie_word_embeddings = false")
    flaws += [f"{name} is missing" for name in wanted]
    if flaws:
        more = f" and {len(flaws) - 6} more" if len(flaws) > 6 else ""
        raise UserError(f"{folder}: {'; '.join(flaws[:6])}{more}: not a plain Llama or Qwen3")
    return state


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
