"""Write a run's model as a Hugging Face folder: AutoModelForCausalLM and AutoTokenizer load it as it is.

usage: torchxihe export RUN_OR_STEP --out DIR [--dtype float32|bfloat16] [--shard-gb GB]

Takes the newest checkpoint of a run, or the step directory that is named, whatever number of processes wrote it. Needs
no GPU, and memory for one tensor. DIR must not exist; it gets

  model.safetensors                       several of them, with an index, above --shard-gb (default 4)
  config.json  generation_config.json     Llama, or Qwen3 where the run has model.qk_norm
  tokenizer.json  tokenizer_config.json   and chat_template.jinja, if the tokenizer has one
  README.md                               a model card with the facts of the run

example: torchxihe export runs/xihe_debug --out exported/xihe_debug
"""

from pathlib import Path

import torch
from tqdm import tqdm

from torchxihe.components.checkpoint.export import SHARD_BYTES, export
from torchxihe.components.checkpoint.saved_run import open_saved
from torchxihe.errors import UserError
from torchxihe.utils.arguments import Arguments


def main(args: list[str]) -> None:
    """Export, and say what was exported. Raises UserError."""
    parser = Arguments("export")
    parser.add_argument("run", metavar="RUN_OR_STEP")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, metavar="GB")
    options = parser.parse_args(args)
    if not 0 < options.shard_gb < 1e9:
        raise UserError(f"--shard-gb: must be greater than 0 and less than 1e9, got {options.shard_gb:g}")
    saved = open_saved(options.run)
    with tqdm(desc="export", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def progress(more: int, total: int) -> None:
            bar.total = total
            bar.update(more)

        export(saved, options.out, getattr(torch, options.dtype), int(options.shard_gb * 1e9), progress)
    print(f"{options.out}: step {saved.step:,} of {saved.train_state['config']['run']['name']}, {options.dtype}")
