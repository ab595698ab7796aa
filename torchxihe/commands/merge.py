"""Average the weights of several checkpoints of one architecture, one tensor in memory at a time."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from torchxihe.components.checkpoint.history import kind_of
from torchxihe.components.checkpoint.saved_run import SavedRun, open_saved, open_weights, save_run
from torchxihe.errors import UserError
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Merge, and print what was merged. Raises UserError."""
    options = parse("merge", args)
    models = [open_saved(path) for path in options.models]
    weights = _read_weights(options.weights, len(models))
    for other in models[1:]:
        _check(models[0], other)
    with tqdm(desc="merge", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        bar.total = sum(saved.size for saved in models)
        readers = [open_weights(saved, bar.update) for saved in models]
    shares = [f"{saved.place} ({weight / sum(weights):.3g})" for saved, weight in zip(models, weights, strict=True)]
    last = max(models, key=lambda saved: saved.step)
    config = last.train_state["config"] | {"run": {"dir": str(options.out.parent), "name": options.out.name}}
    train_state = last.train_state | {"config": config, "origin": f"the average of {', '.join(shares)}"}

    def average(key: str) -> Tensor:
        total: Tensor | None = None
        for read, weight in zip(readers, weights, strict=True):
            # Not add_(alpha=weight), which rounds once where product and sum round twice.
            part = read(key).to(torch.float64).mul_(weight)
            total = part if total is None else total.add_(part)
        assert total is not None, "the parser wants a model"
        return total.div_(sum(weights)).to(torch.float32)

    save_run(options.out, last.model, train_state, last.tokenizer_dir, average)
    print(f"{options.out}: {train_state['origin']}")


def _read_weights(text: str, count: int) -> list[float]:
    """The weights of `count` models, as they are given; "": equal ones. Raises UserError."""
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights: must be {count} positive numbers, one per model, such as 1,2.5; got {text}")
    return weights


def _check(first: SavedRun, other: SavedRun) -> None:
    """Raise UserError unless both are of one architecture and tokenizer."""
    one, two = first.model.model_dump(), other.model.model_dump()
    different = [
        f"model.{name} is {two[name]!r}, in {first.place} {one[name]!r}"
        for name in one
        if one[name] != two[name] and kind_of(f"model.{name}") == "refused"
    ]
    if different:
        raise UserError(f"{other.place}: {'; '.join(different)}; only models of one shape can be merged")
    if first.train_state["tokenizer"] != other.train_state["tokenizer"]:
        raise UserError(f"{other.place}: its tokenizer is not that of {first.place}; only models of one can be merged")
