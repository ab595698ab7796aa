"""A checkpoint as a Hugging Face folder: safetensors in shards, configs, tokenizer, model card."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchxihe.components.checkpoint import corrupt, flat_state, load_tensors, open_fitting
from torchxihe.components.manifest import read_manifest, step_flaws
from torchxihe.components.ranks import explained
from torchxihe.components.saved_run import SavedRun
from torchxihe.config import UserError
from torchxihe.model.attention import sdpa
from torchxihe.model.decoder import Decoder, parameter_counts
from torchxihe.model.hf import hf_config, hf_name

SHARD_BYTES = 4 * 10**9


def export(saved: SavedRun, out: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model of `saved` to the new folder `out`, in one process and on the host.

    Of the weights one shard at a time is in memory, and at least one tensor, whatever wrote the checkpoint. The rows
    of the vocabulary that the tokenizer does not have are left out. `out` is there whole or not at all. Raises
    UserError if it exists, if the checkpoint is corrupt, or if the disk fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is there already and not empty; name a new folder")
    draft = out.with_name(f"{out.name}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        tokenizer = json.loads((saved.tokenizer_dir / "torchxihe.json").read_bytes())
        _write_weights(saved, draft, tokenizer["vocab_size"], dtype, shard_bytes)
        _write_configs(saved, draft, tokenizer, str(dtype).removeprefix("torch."))
        _write_tokenizer(saved.tokenizer_dir, draft, tokenizer)
        (draft / "README.md").write_text(model_card(saved), encoding="utf-8")
        draft.replace(out)
    except OSError as error:
        raise explained(error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_weights(saved: SavedRun, folder: Path, vocab_size: int, dtype: torch.dtype, shard_bytes: int) -> None:
    """The safetensors files, with an index if there are several."""
    from safetensors.torch import save_file  # only for exports

    if flaws := step_flaws(saved.step_dir):
        raise corrupt(saved.step_dir, "; ".join(flaws))
    with torch.device("meta"):
        model = Decoder(saved.model, seq_len=saved.seq_len, dtype=torch.float32, attention=sdpa)
    shapes = flat_state(model, None)
    reader = open_fitting(saved.step_dir, shapes, ("model",))
    shards = _plan(shapes, dtype.itemsize, shard_bytes)
    place: dict[str, str] = {}
    sizes = {"total_size": 0, "total_parameters": 0}
    for i, keys in enumerate(tqdm(shards, desc="export", unit="shard", disable=None)):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for key in keys:
            state = {key: torch.empty_like(shapes[key], device="cpu")}
            load_tensors(state, reader, None)
            parameter = key.removeprefix("model.")
            whole = state[key][:vocab_size] if parameter in ("embed_tokens.weight", "lm_head.weight") else state[key]
            tensors[hf_name(parameter)] = whole.to(dtype).contiguous()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, name)
        sizes["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        sizes["total_parameters"] += sum(tensor.numel() for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": sizes, "weight_map": place})


def _plan(shapes: dict[str, Tensor], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """The keys of each shard: as many in a row as fit, at least one."""
    shards: list[list[str]] = []
    room = 0
    for key, tensor in shapes.items():
        size = tensor.numel() * item_bytes
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    return shards


def _write_configs(saved: SavedRun, folder: Path, tokenizer: dict[str, int], dtype: str) -> None:
    """config.json and generation_config.json."""
    config = hf_config(saved.model, seq_len=saved.seq_len, dtype=dtype, **tokenizer)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    _write_json(folder / "generation_config.json", ids)


def _write_tokenizer(source: Path, folder: Path, tokenizer: dict[str, int]) -> None:
    """The tokenizer's files; its settings name the end of a document, and a class that reads `tokenizer.json`."""
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((source / "tokenizer_config.json").read_bytes())
    content = json.loads((source / "tokenizer.json").read_bytes())
    names = {index: token for token, index in _vocabulary(content)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer["eos_id"]]} | settings
    _write_json(folder / "tokenizer_config.json", settings)


def _vocabulary(tokenizer: dict[str, Any]) -> list[tuple[str, int]]:
    """Tokens and ids of a parsed `tokenizer.json` of any kind."""
    vocab = tokenizer["model"]["vocab"]
    pairs = list(vocab.items()) if isinstance(vocab, dict) else [(token, i) for i, (token, _) in enumerate(vocab)]
    return pairs + [(token["content"], token["id"]) for token in tokenizer.get("added_tokens", [])]


def model_card(saved: SavedRun) -> str:
    """README.md of the folder: what the model is, and the facts of its run as far as the checkpoint knows them."""
    model, config = saved.model, saved.train_state["config"]
    total, _ = parameter_counts(model)
    facts = {
        "Parameters": f"{total:,} (padding of the vocabulary included)",
        "Shape": f"{model.num_hidden_layers} layers of {model.hidden_size}, {model.num_attention_heads} query "
        f"and {model.num_key_value_heads} key-value heads of {model.head_dim}, SwiGLU {model.intermediate_size}",
        "Sequence length": f"{saved.seq_len:,}",
        "Steps": f"{saved.step:,}",
    }
    stages = saved.train_state["stages"]
    if stages:
        last = stages[-1]
        samples = last["g"] + (saved.step - last["step"]) * last["global_batch"]
        weights = sum(source["weight"] for source in config["data"]["sources"])
        facts["Tokens"] = f"{samples * saved.seq_len:,}"
        facts["Data"] = ", ".join(
            f"{source['name'] or source['path']} ({100 * source['weight'] / weights:.3g} %)"
            for source in config["data"]["sources"]
        )
        optimizer, schedule = config["optimizer"], config["lr_scheduler"]
        facts["Optimizer"] = f"{optimizer['name']}, peak learning rate {optimizer['lr']:g}, schedule {schedule['name']}"
        facts["Precision"] = f"{config['training']['dtype']} on float32 weights"
    if saved.train_state.get("origin"):
        facts["Started from"] = saved.train_state["origin"]
    loss = read_manifest(saved.step_dir).validation_loss
    if loss is not None:
        facts["Validation loss"] = f"{loss:.4f} nats a token, on held-out documents of the same sources"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    name = config["run"]["name"]
    kind = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- torchxihe
---

# {name}

A base language model (`{kind}`), pre-trained with torchxihe {version("torchxihe")}. It continues text; it has
not been tuned to follow instructions.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
