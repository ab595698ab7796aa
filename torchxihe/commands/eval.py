"""Measure a checkpoint: loss, perplexity and bits per byte of held-out documents, or lm-eval's tasks."""

import contextlib
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchxihe.components.checkpoint.export import export
from torchxihe.components.checkpoint.saved_run import SavedRun, load_decoder, open_saved
from torchxihe.components.checkpoint.storage import Location, hash_file
from torchxihe.components.validation import validation_metrics, validation_sums
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.loader import BatchSpec, validation_batches
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.data.verify import Verification
from torchxihe.errors import UserError
from torchxihe.kernels.select import PORTABLE, select_attention
from torchxihe.parsers import parse
from torchxihe.utils.device import default_device


def main(args: list[str]) -> None:
    """Print a line for all sources together, one per source and per set, or lm-eval's table. Raises UserError."""
    options = parse("eval", args)
    overrides = options.overrides
    saved = open_saved(options.model)
    if options.tasks:
        if overrides or options.on or options.max_tokens:
            raise UserError("eval: --on, its overrides and --max-tokens are for held-out documents, not for --tasks")
        results, table = run_tasks(saved, options.tasks.split(","), options.include, max(options.limit, 0))
        print(json.dumps(results) if options.json else table)
        return
    if options.include or options.limit:
        raise UserError("eval: --include and --limit belong to --tasks")
    if overrides and not options.on:
        raise UserError(f"{overrides[0]}: not understood; overrides belong to --on CONFIG")
    config = load_config(options.on, overrides) if options.on else _own_config(saved)
    prepared = open_prepared(config)
    _check(saved, config, prepared)
    verification = Verification(prepared, held_out=True)
    verification.wait()
    verification.check()
    result = evaluate(saved, config, prepared, max(options.max_tokens, 0))
    print(json.dumps(result) if options.json else _table(result, prepared))


def evaluate(saved: SavedRun, config: Config, prepared: Prepared, max_tokens: int) -> dict[str, float]:
    """What `validate` measures, on `prepared`'s held-out documents; 0: all of them."""
    device = default_device()
    dtype = getattr(torch, config.training.dtype) if device.type == "cuda" else torch.float32
    model = saved.model.model_copy(update={"attention": "auto"})  # what it was trained with may not be here
    attention = select_attention(model, device, dtype, config.data.document_mask)
    spec = BatchSpec(config.data.seq_len, config.training.micro_batch_size or 1, device, config.data.document_mask)
    batches = validation_batches(prepared, spec, max_tokens)
    bytes_per_token = torch.from_numpy(prepared.bytes_per_token).to(device)
    decoder = load_decoder(saved, device, dtype, replace(PORTABLE, attention=attention))
    return validation_metrics(validation_sums(decoder, batches, bytes_per_token, len(prepared.held_out)), prepared)


def _own_config(saved: SavedRun) -> Config:
    """The config that the checkpoint was saved with. Raises UserError if it has none that this version reads."""
    if not saved.train_state["stages"]:
        raise UserError(f"{saved.place}: this model has no data of its own; name some with --on CONFIG")
    if saved.config is None:
        raise UserError(f"{saved.place}: its config is another version's; name one with --on CONFIG")
    return saved.config


def _check(saved: SavedRun, config: Config, prepared: Prepared) -> None:
    """Raise UserError unless this data fits this model."""
    if hash_file(Location(prepared.tokenizer_dir / "tokenizer.json"))[1] != saved.train_state["tokenizer"]:
        flag = shlex.quote(f"--tokenizer.path={saved.tokenizer_dir}")
        remedy = f"prepare it with {flag} and give that here too"
        raise UserError(f"{config.run.name}: its data is of another tokenizer; {remedy}")
    if config.data.seq_len > saved.seq_len:
        raise UserError(f"data.seq_len: {config.data.seq_len} is more than the model's {saved.seq_len}; lower it")
    if not sum(source.valid_rows for source in prepared.held_out):
        raise UserError("validation.fraction: no document is held out; raise it, or name other data with --on CONFIG")


def _table(result: dict[str, float], prepared: Prepared) -> str:
    """A line per set of documents; first the sources together, or the sets together where no source holds out any."""
    together = "sources" if any(source.valid_rows for source in prepared.sources) else "all sets"
    names = [key.removesuffix("/loss") for key in result if key.endswith("/loss")]
    width = max(len("validation"), *(len(name.removeprefix("validation/")) for name in names))
    lines = [f"{'validation':{width}}  {'loss':>8}  {'perplexity':>11}  {'bits/byte':>9}"]
    for name in names:
        loss, perplexity, bpb = (result[f"{name}/{measure}"] for measure in ("loss", "perplexity", "bpb"))
        shown = together if name == "validation" else name.removeprefix("validation/")
        lines.append(f"{shown:{width}}  {loss:8.4f}  {perplexity:11,.2f}  {bpb:9.4f}")
    return "\n".join(lines)


def run_tasks(saved: SavedRun, names: list[str], include: str, limit: int) -> tuple[dict[str, Any], str]:
    """lm-eval's results by task, and as a table; `include`: a folder of more tasks, `limit`: documents of each, 0: all.

    Raises UserError.
    """
    try:
        # optional and slow
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise UserError(f"--tasks: {error.name} is not installed; pip install 'lm-eval[hf]'") from None
    if include and not Path(include).is_dir():
        raise UserError(f"--include: {include}: no such directory; name the one that holds the tasks' YAML files")
    tasks = TaskManager(include_path=include or None)
    if unknown := [name for name in names if not tasks.match_tasks([name])]:
        raise UserError(f"--tasks: {', '.join(unknown)}: no such task; `lm_eval ls tasks` lists them")
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # lm-eval prints its progress; standard output is for the result.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        export(saved, Path(scratch) / "model", dtype)
        model = HFLM(str(Path(scratch) / "model"), device=str(device), dtype=dtype, batch_size="auto")
        found = simple_evaluate(model, tasks=names, task_manager=tasks, limit=limit or None, log_samples=False)
    assert found is not None, "only ranks other than the first get none"
    return found["results"], make_table(found)
