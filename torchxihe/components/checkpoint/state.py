"""The tensors of a run by name, their comparison with a checkpoint's, and loading them."""

import json
import os
import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    MANIFEST,
    TRAIN_STATE,
    CorruptError,
    homes_of,
    is_committed,
    step_flaws,
    step_of,
    steps_in,
)
from torchxihe.components.checkpoint.storage import Location, with_retries
from torchxihe.components.checkpoint.tensor_files import TensorReader
from torchxihe.errors import UserError, explained

T = TypeVar("T")

# DCP warns whenever there is no process group, which is how one process runs here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Every tensor that a run consists of, by a name that no parallelism changes; they share the originals' memory.

    "model.<parameter>" and "optim.<parameter>.<moment>". Works on a plain, DDP or FSDP2 model alike, so that a state
    saved under one is loaded under any other. The optimizer must have its state: DCP loads in place.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a validation the root is still gathered: not what the optimizer knows
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        assert "_orig_mod" not in name and "_checkpoint_wrapped_module" not in name, f"a wrapper renamed {name}"
        state[f"model.{name}"] = parameter.detach()
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            assert optimizer.state[parameter], f"the optimizer does not know {name}"
            for key, value in optimizer.state[parameter].items():
                state[f"optim.{name}.{key}"] = value
    return state


def resolve(path: str | PathLike[str]) -> Location:
    """The step directory that `path` means: itself, or the newest committed one of a run or checkpoints directory.

    Raises UserError if there is none. Nothing is read but names: loading verifies.
    """
    place = Location(path)
    if place.is_link():
        place = Location(os.path.realpath(place))
    if step_of(place.name) >= 0 and place.is_dir():
        if not is_committed(place):
            reason = f"is marked {CORRUPT}" if CORRUPT in place.names() else f"has no {MANIFEST}"
            raise UserError(f"{place}: {reason}, so it is not a valid checkpoint; name another step")
        return place
    for home in homes_of(place):
        for step in steps_in(home):
            if is_committed(step):
                return step
    what = "holds no committed checkpoint" if place.is_dir() else "no such directory"
    raise UserError(f"{place}: {what}; give a step directory, or the directory of a run that has saved one")


def load_model_only(path: str | PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Fill the parameters of `model`, in this process alone, from a step directory that any number of ranks wrote.

    Returns the train_state. Raises UserError if the checkpoint is corrupt or not of this model.
    """
    directory = resolve(path)
    state = flat_state(model, None)
    try:
        if found := step_flaws(directory):
            raise corrupt(directory, "; ".join(found))
        load_tensors(state, open_fitting(directory, state, ("model",)), None)
        return json.loads(with_retries((directory / TRAIN_STATE).read))
    except OSError as error:
        raise explained(error) from None


def corrupt(directory: Location, why: str) -> UserError:
    """The error that a damaged checkpoint is."""
    return UserError(f"{directory}: corrupt: {why}; use an earlier step")


def open_fitting(directory: Location, state: dict[str, Tensor], only: tuple[str, ...]) -> TensorReader:
    """The tensors of a step directory, which are exactly `state`'s. Raises UserError."""
    try:
        reader = TensorReader(directory)
    except CorruptError as error:
        raise corrupt(directory, str(error)) from None
    _compare(directory, state, reader.metadata, only)
    return reader


def load_tensors(state: dict[str, Tensor], reader: TensorReader, group: dist.ProcessGroup | None) -> None:
    """Fill `state` in place, together with the group's ranks or alone. Raises UserError."""
    alone = group is None
    try:
        with_retries(
            lambda: dcp_errors(lambda: dcp_load(state, storage_reader=reader, process_group=group, no_dist=alone))
        )
    except OSError as error:
        raise explained(error) from None


def _compare(directory: Location, state: dict[str, Tensor], metadata: Metadata, only: tuple[str, ...]) -> None:
    """Raise UserError unless the checkpoint has exactly `state`'s keys, shapes and dtypes (in the parts `only`)."""
    saved = metadata.state_dict_metadata
    saved = {key: entry for key, entry in saved.items() if not only or key.partition(".")[0] in only}
    different = []
    for key in state.keys() & saved.keys():
        entry, tensor = saved[key], state[key]
        assert isinstance(entry, TensorStorageMetadata)
        there, here = (entry.properties.dtype, tuple(entry.size)), (tensor.dtype, tuple(tensor.shape))
        if there != here:
            different.append(f"{key}: {_dtype(there[0])}{list(there[1])}, here {_dtype(here[0])}{list(here[1])}")
    found = [
        ("missing in the checkpoint", sorted(state.keys() - saved.keys())),
        ("not in this run", sorted(saved.keys() - state.keys())),
        ("of another shape or dtype", sorted(different)),
    ]
    lines = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in found if keys]
    if lines:
        remedy = "use the model and optimizer it was saved with, or load another checkpoint"
        raise UserError(f"{directory}: does not fit: {'; '.join(lines)}; {remedy}")


def _some(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dcp_errors(action: Callable[[], T]) -> T:
    """`action` through DCP, whose CheckpointException is no Exception: raises OSError (the disk) or RuntimeError.

    The same on all ranks, because DCP gathers what failed.
    """
    try:
        return action()
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise cause from None
        raise RuntimeError(str(error)) from None
