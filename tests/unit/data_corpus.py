"""Small corpora and configs for the tests of the data path."""

import json
from pathlib import Path
from typing import Any

from torchxihe.config.options import Config

MODEL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 8,
    "vocab_size": 4096,
}


def make_config(cache: Path, *sources: dict[str, Any], seq_len: int = 16, **sections: dict[str, Any]) -> Config:
    """A config with these sources and its own cache."""
    data = {"sources": sources, "seq_len": seq_len, "cache_dir": str(cache), **sections.pop("data", {})}
    defaults = {"validation": {"fraction": 0.0}, "tokenizer": {"vocab_size": 300}, "training": {}}
    values = {name: {**default, **sections.pop(name, {})} for name, default in defaults.items()}
    values["training"] = {"steps": 10, "global_batch_size": 4, **values["training"]}
    return Config.model_validate({"model": MODEL, "data": data, **values, **sections})


def write_lines(path: Path, rows: list[Any]) -> dict[str, Any]:
    """A source of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


def write_texts(path: Path, texts: list[str]) -> dict[str, Any]:
    """A source of JSON lines with one column, `text`."""
    return write_lines(path, [{"text": text} for text in texts])
