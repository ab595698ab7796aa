"""Write a run's model as a Hugging Face folder."""

import torch
from tqdm import tqdm

from torchxihe.components.checkpoint.export import export
from torchxihe.components.checkpoint.saved_run import open_saved
from torchxihe.errors import UserError
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Export, and print what was exported. Raises UserError."""
    options = parse("export", args)
    if not 0 < options.shard_gb < 1e9:
        raise UserError(f"--shard-gb: must be greater than 0 and less than 1e9, got {options.shard_gb:g}")
    saved = open_saved(options.model)
    with tqdm(desc="export", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def progress(more: int, total: int) -> None:
            bar.total = total
            bar.update(more)

        export(saved, options.out, getattr(torch, options.dtype), int(options.shard_gb * 1e9), progress)
    print(f"{options.out}: step {saved.step:,} of {saved.train_state['config']['run']['name']}, {options.dtype}")
