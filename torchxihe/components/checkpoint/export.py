"""A checkpoint as a Hugging Face folder: safetensors in shards, configs, tokenizer, model card."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchxihe.components.checkpoint.export_tokenizer import write_tokenizer
from torchxihe.components.checkpoint.manifest import read_manifest
from torchxihe.components.checkpoint.saved_run import SavedRun, draft_of, open_weights
from torchxihe.components.checkpoint.state import corruption_explained, described_state
from torchxihe.data.prepare.chat import Chat
from torchxihe.data.tokenizer import read_meta
from torchxihe.errors import UserError, explained
from torchxihe.model.flops import parameter_counts
from torchxihe.model.hf import hf_config, hf_name
from torchxihe.utils.version import __version__

SHARD_BYTES = 4 * 10**9
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}

Progress = Callable[[int, int], object]
"""Called with the bytes done since the last call, and their total. What it raises ends the export."""

log = logging.getLogger(__name__)


def export(
    saved: SavedRun,
    out: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda more, total: None,
) -> None:
    """Write the model of `saved` to the new folder `out`, in one process and on the host; `dtype`: float32, bfloat16.

    One tensor at a time is in memory, whatever layout wrote the checkpoint. Vocabulary rows above the tokenizer's size
    are left out. `out` appears when it is complete. Raises UserError if it exists, if the checkpoint is corrupt, or if
    the disk fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(".")):
        raise UserError(f"--out: {out} exists, and is not an empty folder or is in use; give a new one")
    draft = draft_of(out)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        tokenizer = read_meta(saved.tokenizer_dir).model_dump(include={"vocab_size", "eos_id", "bos_id"})
        _write_weights(saved, draft, tokenizer["vocab_size"], dtype, shard_bytes, progress)
        _write_configs(saved, draft, tokenizer, str(dtype).removeprefix("torch."))
        write_tokenizer(saved.tokenizer_dir, draft)
        (draft / "README.md").write_text(model_card(saved), encoding="utf-8")
        draft.replace(out)
    except OSError as error:
        raise explained(error, out) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_weights(
    saved: SavedRun, folder: Path, vocab_size: int, dtype: torch.dtype, shard_bytes: int, progress: Progress
) -> None:
    """The safetensors files, with an index if there are several."""
    state = described_state(saved.model)
    shapes = {}
    for key, tensor in state.items():
        rows = [vocab_size] if key in ("model.embed_tokens.weight", "model.lm_head.weight") else tensor.shape[:1]
        shapes[key] = torch.Size([*rows, *tensor.shape[1:]])
    count = sum(shape.numel() for shape in shapes.values())
    with corruption_explained(saved.place):
        total = saved.size + count * dtype.itemsize
    read = open_weights(saved, lambda more: progress(more, total))

    def tensors(keys: list[str]) -> Iterator[Tensor]:
        for key in keys:
            tensor = read(key)[: shapes[key][0]].to(dtype)
            yield tensor
            progress(tensor.nbytes, total)

    shards = _plan(shapes, dtype.itemsize, shard_bytes)
    place: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        names = {hf_name(key.removeprefix("model.")): shapes[key] for key in keys}
        write_safetensors(folder / name, names, dtype, tensors(keys))
        place |= dict.fromkeys(names, name)
    if len(shards) > 1:
        sizes = {"total_size": count * dtype.itemsize, "total_parameters": count}
        _write_json(folder / "model.safetensors.index.json", {"metadata": sizes, "weight_map": place})


def _plan(shapes: dict[str, torch.Size], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """The keys of each shard: consecutive ones, as many as fit, at least one."""
    shards: list[list[str]] = []
    room = 0
    for key, shape in shapes.items():
        size = shape.numel() * item_bytes
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    return shards


def write_safetensors(path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
    """Write a safetensors file of tensors that an iterator yields in the order of `shapes`, on the host.

    The package safetensors needs all of them in memory. The format: the header's length as a little-endian uint64, the
    header as JSON, padded with spaces so that the data begins at a multiple of 8 bytes, and the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_configs(saved: SavedRun, folder: Path, tokenizer: dict[str, int], dtype: str) -> None:
    """config.json and generation_config.json."""
    config = hf_config(saved.model, seq_len=saved.seq_len, dtype=dtype, **tokenizer)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    if is_chat(saved) and (end := Chat(saved.tokenizer_dir).end_of_turn) != tokenizer["eos_id"]:
        ids["eos_token_id"] = [end, tokenizer["eos_id"]]
    _write_json(folder / "generation_config.json", ids)


def is_chat(saved: SavedRun) -> bool:
    """Whether the run was fine-tuned on conversations in a chat format."""
    return saved.train_state["config"]["data"].get("format") == "chat"


def model_card(saved: SavedRun) -> str:
    """README.md of the folder: the model's shape, and data and optimizer of its run where the config is known."""
    model, config = saved.model, saved.config
    total, _ = parameter_counts(model)
    facts = {
        "Parameters": f"{total:,} (padding of the vocabulary included)",
        "Shape": f"{model.num_hidden_layers} layers of {model.hidden_size}, {model.num_attention_heads} query "
        f"and {model.num_key_value_heads} key-value heads of {model.head_dim}, SwiGLU {model.intermediate_size}",
        "Sequence length": f"{saved.seq_len:,}",
        "Steps": f"{saved.step:,}",
    }
    stages = saved.train_state["stages"]
    if stages and config is not None:
        # The stages of a batch ramp are planned at the start.
        last = next(stage for stage in reversed(stages) if stage["step"] <= saved.step)
        samples = last["g"] + (saved.step - last["step"]) * last["global_batch"]
        weights = sum(source.weight for source in config.data.sources)
        facts["Tokens"] = f"{samples * saved.seq_len:,}"
        facts["Data"] = ", ".join(
            f"{source.name or source.path} ({100 * source.weight / weights:.3g} %)" for source in config.data.sources
        )
        optimizer, schedule = config.optimizer, config.lr_scheduler
        facts["Optimizer"] = f"{optimizer.name}, peak learning rate {optimizer.lr:g}, schedule {schedule.name}"
        facts["Precision"] = f"{config.training.dtype} on float32 weights"
    if saved.train_state.get("origin"):
        facts["Started from"] = saved.train_state["origin"]
    loss = read_manifest(saved.place).validation_loss if saved.is_step else None
    if loss is not None:
        best_by = config.checkpoint.best_by if config is not None else "sources"
        what = "held-out documents of the same sources" if best_by == "sources" else f"the validation set {best_by}"
        facts["Validation loss"] = f"{loss:.4f} nats/token, on {what}"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    name = saved.train_state["config"]["run"]["name"]
    kind = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    made = f"with torchxihe {__version__}"
    what = f"A base language model (`{kind}`), pre-trained {made}. It continues text; it has\nnot been tuned to follow"
    what, inputs = f"{what} instructions.", 'tokenizer("Once", return_tensors="pt")'
    if is_chat(saved):
        what = f"A chat model (`{kind}`), fine-tuned on conversations {made}."
        asked = '[{"role": "user", "content": "Hello"}], add_generation_prompt=True'
        inputs = f'tokenizer.apply_chat_template(\n    {asked}, return_dict=True, return_tensors="pt"\n)'
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- torchxihe
---

# {name}

{what}

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
