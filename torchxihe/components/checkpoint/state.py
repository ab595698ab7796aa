"""The tensors of a run by name, their comparison with a checkpoint's, and loading them."""

import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from torchxihe.components.checkpoint.history import read_train_state
from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    MANIFEST,
    homes_of,
    is_committed,
    step_flaws,
    step_of,
    steps_in,
)
from torchxihe.components.checkpoint.staging import Entry, describe_state
from torchxihe.components.checkpoint.storage import CorruptError, Location
from torchxihe.components.checkpoint.tensor_files import TensorReader
from torchxihe.config.options import Model
from torchxihe.errors import UserError, explained
from torchxihe.model.decoder import Decoder
from torchxihe.utils.files import with_retries

T = TypeVar("T")

# DCP warns whenever there is no process group, which is how one process runs here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The tensors of a model and its optimizer, by names that do not depend on parallelism; memory is shared.

    "model.<parameter>" and "optim.<parameter>.<moment>", of a plain, DDP or FSDP2 model alike, so that a state saved
    under one is loaded under any other. The optimizer's state must exist: DCP loads in place.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a validation the root is still gathered; the optimizer has the shards
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        assert "_orig_mod" not in name and "_checkpoint_wrapped_module" not in name, f"a wrapper renamed {name}"
        state[f"model.{name}"] = parameter.detach()
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            assert optimizer.state[parameter], f"the optimizer has no state of {name}"
            for key, value in optimizer.state[parameter].items():
                state[f"optim.{name}.{key}"] = value
    return state


def described_state(model: Model) -> dict[str, Tensor]:
    """`flat_state` of a whole model without memory: names, shapes and dtypes (float32)."""
    with torch.device("meta"):
        return flat_state(Decoder(model, seq_len=2, dtype=torch.float32), None)


def resolve(path: str | PathLike[str]) -> Location:
    """The step directory that `path` means: itself, or the newest committed one of a run or checkpoints directory.

    Raises UserError, naming what there is instead, if there is none. Only names are read: loading verifies.
    """
    place = Location(path)
    if place.is_link():
        place = Location(os.path.realpath(place))
    if place.local and (place / "config.json").exists():
        remedy = f"make a checkpoint of it: torchxihe import {shlex.quote(str(place))} --out DIR"
        raise UserError(f"{place}: is a Hugging Face folder, such as an export, and no checkpoint; {remedy}")
    if step_of(place.name) >= 0 and place.is_dir():
        if not is_committed(place):
            reason = f"is marked {CORRUPT}" if CORRUPT in place.names() else f"has no {MANIFEST}"
            raise UserError(f"{place}: {reason}, so it is not a valid checkpoint; {_steps_beside(place)}")
        return place
    if step := _newest_step(place):
        return step
    if step_of(place.name) >= 0:
        raise UserError(f"{place}: no such directory; {_steps_beside(place)}")
    what = "holds no committed checkpoint" if place.is_dir() else "no such directory"
    return _raise_with_runs(place, what)


def _newest_step(place: Location) -> Location | None:
    """The newest committed step of a run or checkpoints directory."""
    committed = (step for home in homes_of(place) for step in steps_in(home) if is_committed(step))
    return next(committed, None)


def _steps_beside(step: Location) -> str:
    """What to name instead of a step directory that cannot be loaded."""
    there = [str(step_of(other.name)) for other in steps_in(step.parent) if is_committed(other) and other != step]
    if not there:
        return "give the directory of a run that has saved a checkpoint"
    return f"the steps in {step.parent} are {_some(there[::-1], most=20)}"


def _raise_with_runs(place: Location, what: str) -> NoReturn:
    """Name the runs below the directory, or, if it does not exist, below the one that would contain it."""
    base = place if place.is_dir() else place.parent
    runs = [f"{base / name}" for name in base.names()[:1000] if base.local and _newest_step(base / name)]
    remedy = f"the runs in {base} with checkpoints are {_some(runs)}" if runs else "give that of a run or of a step"
    raise UserError(f"{place}: {what}; {remedy}")


def load_model_only(path: str | PathLike[str], model: nn.Module, device: torch.device | None = None) -> dict[str, Any]:
    """Fill the parameters of `model`, in this process alone, from a step directory that any number of ranks wrote.

    With `device`, `model` is on the meta device, and gets memory there after the checkpoint has been found to fit.
    Returns the train_state. Raises UserError if the checkpoint is corrupt or not of this model.
    """
    directory = resolve(path)
    with corruption_explained(directory):
        if found := step_flaws(directory):
            raise CorruptError("; ".join(found))
        reader = open_fitting(directory, describe_state(flat_state(model, None)), ("model",))
        if device is not None:
            model.to_empty(device=device)
        load_tensors(flat_state(model, None), reader, None)
        return read_train_state(directory)


@contextmanager
def corruption_explained(directory: Location) -> Iterator[None]:
    """Raise UserError for what is corrupt or unreadable in a step directory."""
    try:
        yield
    except CorruptError as error:
        raise UserError(f"{directory}: corrupt: {error}; use an earlier step") from None
    except OSError as error:
        raise explained(error, directory) from None


def open_fitting(directory: Location, state: dict[str, Entry], only: tuple[str, ...]) -> TensorReader:
    """The tensors of a step directory, which are exactly those that `state` describes, in the parts `only`.

    Raises UserError.
    """
    with corruption_explained(directory):
        reader = TensorReader(directory)
    _compare(directory, state, reader.metadata, only)
    return reader


def load_tensors(state: dict[str, Tensor], reader: TensorReader, group: dist.ProcessGroup | None) -> None:
    """Fill `state` in place, together with the group's ranks or alone. Raises UserError."""
    alone = group is None
    with corruption_explained(reader.path):
        with_retries(
            lambda: dcp_errors(lambda: dcp_load(state, storage_reader=reader, process_group=group, no_dist=alone))
        )


def _compare(directory: Location, state: dict[str, Entry], metadata: Metadata, only: tuple[str, ...]) -> None:
    """Raise UserError unless the checkpoint has exactly `state`'s keys, shapes and dtypes (in the parts `only`)."""
    saved = metadata.state_dict_metadata
    saved = {key: entry for key, entry in saved.items() if not only or key.partition(".")[0] in only}
    different = []
    for key in state.keys() & saved.keys():
        entry = saved[key]
        assert isinstance(entry, TensorStorageMetadata), "TensorReader"
        there, here = (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch.")), state[key][:2]
        if there != here:
            different.append(f"{key}: {there[1]}{list(there[0])}, here {here[1]}{list(here[0])}")
    found = [
        ("missing in the checkpoint", sorted(state.keys() - saved.keys())),
        ("not in this run", sorted(saved.keys() - state.keys())),
        ("of another shape or dtype", sorted(different)),
    ]
    lines = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in found if keys]
    if lines:
        remedy = "use the model and optimizer it was saved with, or load another checkpoint"
        raise UserError(f"{directory}: does not fit: {'; '.join(lines)}; {remedy}")


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def dcp_errors(action: Callable[[], T]) -> T:
    """Call DCP, whose CheckpointException is not an Exception: raises OSError, CorruptError or RuntimeError instead.

    The same on all ranks: DCP gathers the errors. A UserError is raised as it is.
    """
    try:
        return action()
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, (OSError, CorruptError, UserError)):
                raise cause from None
        raise RuntimeError(str(error)) from None
