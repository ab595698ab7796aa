"""Convert a Hugging Face model, Llama or Qwen3, to a checkpoint to continue training from."""

import json
import shutil
import tempfile
from pathlib import Path

import tomli_w

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.export import draft_of
from torchxihe.components.checkpoint.hugging_face import INDEX, open_folder, read_config
from torchxihe.components.checkpoint.saved_run import check_vocab_size, train_state_of
from torchxihe.config.options import Checkpoint, Tokenizer
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE
from torchxihe.errors import UserError, explained
from torchxihe.parsers import parse


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
    model, seq_len = read_config(folder)
    draft = draft_of(out)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        with tempfile.TemporaryDirectory() as cache:
            tokenizer = obtain(Tokenizer(path=str(folder)), Path(cache), (), "")
            check_vocab_size(folder, tokenizer, model)
            shutil.copytree(tokenizer, draft / "tokenizer")
        train_state = train_state_of(out, model, seq_len, draft / "tokenizer", origin)
        checkpointer = Checkpointer(draft / "checkpoints", Checkpoint(mode="sync"))
        checkpointer.save_model(0, model, open_folder(folder, model), train_state)
        start = {
            "model": model.model_dump(mode="json"),
            "tokenizer": {"path": str(out / "tokenizer")},
            "checkpoint": {"load": str(out), "load_only": ["model"]},
        }
        (draft / "model.toml").write_text(tomli_w.dumps(start), encoding="utf-8")
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _download(hub_id: str, revision: str) -> Path:
    """The files of a hub model that matter here, from its cache if they are there."""
    import huggingface_hub  # slow, and only for models on the hub

    try:
        patterns = ["config.json", "*.safetensors", INDEX, "tokenizer*.json", CHAT_TEMPLATE_FILE]
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # not found, gated, no network: many types
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{hub_id}: not a folder here, and not on the hub: {why}") from None
