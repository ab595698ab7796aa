"""Convert a Hugging Face model, Llama or Qwen3, to a checkpoint to continue training from."""

import json
from pathlib import Path

from torchxihe.components.checkpoint.hugging_face import INDEX
from torchxihe.components.checkpoint.saved_run import open_exported, open_weights, save_run
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE
from torchxihe.errors import UserError
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Import, and print how to use it. Raises UserError."""
    options = parse("import", args)
    if options.out.exists():
        raise UserError(f"--out: {options.out} exists; give a new folder")
    folder = Path(options.source)
    if not folder.is_dir():
        folder = _download(options.source, options.revision)
    saved = open_exported(folder)
    where = {"run": {"dir": str(options.out.parent), "name": options.out.name}}
    train_state = saved.train_state | {"config": saved.train_state["config"] | where, "origin": options.source}
    save_run(options.out, saved.model, train_state, saved.tokenizer_dir, open_weights(saved))
    # `extends` is relative to the config, wherever that will be.
    extends = json.dumps(str(options.out.absolute() / "model.toml"), ensure_ascii=False)
    print(f"{options.out}: begin a config with extends = {extends} and add [data] and [training]")


def _download(hub_id: str, revision: str) -> Path:
    """The files of a hub model that matter here, from its cache if they are there."""
    import huggingface_hub  # slow, and only for models on the hub

    try:
        patterns = ["config.json", "*.safetensors", INDEX, "tokenizer*.json", CHAT_TEMPLATE_FILE]
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # not found, gated, no network: many types
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{hub_id}: not a folder here, and not on the hub: {why}") from None
