"""Checkpoints: tensors through DCP, the rest as JSON, committed as a whole or not at all, verified before use.

DCP checks no content, ignores extra keys, casts dtypes silently and unpickles what it finds; so the layout, the
hashes (manifest.py) and the strict comparison of keys, shapes and dtypes are ours, and only tensors go through it.
"""

import json
import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from os import PathLike
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torchxihe.components.manifest import (
    CORRUPT,
    MANIFEST,
    CorruptError,
    Files,
    is_committed,
    mark_corrupt,
    remove_step,
    step_flaws,
    step_name,
    step_of,
    steps_in,
    write_manifest,
)
from torchxihe.components.storage import Location, with_retries
from torchxihe.components.tensor_files import TensorReader, TensorWriter
from torchxihe.config import Checkpoint, UserError
from torchxihe.utils.distributed import is_main, rank, world_size

TRAIN_STATE = "train_state.json"
GROUP_TIMEOUT = timedelta(hours=1)  # a rank may wait for another one's slow disk; a dead one is noticed at once

T = TypeVar("T")
log = logging.getLogger(__name__)

# dcp says so whenever there is no process group, which is how one process runs here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Every tensor that a run consists of, by a name that no parallelism changes; they share the originals' memory.

    "model.<parameter>" and "optim.<parameter>.<moment>". Works on a plain, DDP or FSDP2 model alike, so that a state
    saved under one is loaded under any other. Optimizer state that does not exist yet is created, as the first step
    would: DCP loads in place, into what is there.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        assert "_orig_mod" not in name and "_checkpoint_wrapped_module" not in name, f"a wrapper renamed {name}"
        state[f"model.{name}"] = parameter.detach()
    if optimizer is not None:
        _create_adamw_state(optimizer)
        for name, parameter in module.named_parameters():
            for key, value in optimizer.state[parameter].items():
                state[f"optim.{name}.{key}"] = value
    return state


def _create_adamw_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter that has no state yet the one that AdamW starts from."""
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            assert "betas" in group, f"{type(optimizer).__name__} must create its state before it is saved or loaded"
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
            }


class Checkpointer:
    """Saves and finds the checkpoints of one run. Made, and each method called, on all ranks together."""

    def __init__(self, directory: str | PathLike[str], config: Checkpoint) -> None:
        """`directory` holds the step directories; leftovers of saves that did not end are swept from it."""
        self.directory = Location(directory)
        self.config = config
        # A gloo group of our own: no collective of a save ever meets one of the training step.
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._verified: Location | None = None
        self._on_main(self._sweep_drafts)

    def save(self, step: int, state: dict[str, Tensor], train_state: dict[str, Any]) -> Location:
        """Write and commit `step`; a committed one stays as it is. Returns its directory.

        `train_state` must be JSON. Raises UserError when the disk is full, broken or read-only.
        """
        directory = self.directory / step_name(step)
        if self._on_main(lambda: is_committed(directory)):
            return directory
        draft = directory.with_name(f"{directory.name}.tmp") if directory.local else directory

        def prepare() -> None:
            draft.remove()
            draft.make()

        self._on_main(prepare)
        writer = TensorWriter(draft)
        try:
            _unwrapped(lambda: dcp_save(state, storage_writer=writer, process_group=self._group))
        except OSError as error:
            raise _explained(error) from None
        parts = self._everywhere(lambda: writer.files)

        def commit() -> None:
            files: Files = {name: entry for part in parts for name, entry in part.items()}
            with (draft / TRAIN_STATE).create() as file:
                file.write(json.dumps(train_state, indent=1).encode())
            files[TRAIN_STATE] = file.digest()
            write_manifest(draft, step, files)
            draft.sync()
            if draft != directory:
                directory.remove()  # not committed, or we would not be here: a corrupt one
                draft.rename(directory)
                self.directory.sync()
            self._retain()

        self._on_main(commit)
        return directory

    def newest(self) -> Location | None:
        """The newest step that is committed and verifies, or None if nothing was ever committed.

        A corrupt one is marked as such, with a warning, and passed over. Raises UserError if there are checkpoints
        and none of them is valid, or if one cannot be read: neither may become a silent fresh start.
        """
        steps = self._on_main(lambda: [(step, is_committed(step), CORRUPT in step.names()) for step in self._steps()])
        passed = []
        for i, (directory, committed, marked) in enumerate(steps):
            if marked:
                passed.append(f"{directory.name} is marked {CORRUPT}")
                continue
            if not committed and any(later for _, later, _ in steps[:i]):
                continue  # half-deleted: only ever done after a newer one was committed
            found = self._flaws(directory)
            if not found:
                self._on_main(lambda i=i: self._sweep_half_deleted(steps[i + 1 :]))
                self._verified = directory
                return directory
            self._on_main(lambda directory=directory, reason=found[0]: mark_corrupt(directory, reason))
            passed.append(f"{directory.name}: {found[0]}")
            if is_main():
                log.warning("%s is corrupt and passed over: %s", directory, "; ".join(found))
        if passed:
            remedy = "mend one, or start afresh under another --run.name"
            raise UserError(f"{self.directory}: no valid checkpoint ({'; '.join(passed)}); {remedy}")
        return None

    def load(
        self, path: str | PathLike[str], state: dict[str, Tensor], only: tuple[str, ...] = ("model", "optim")
    ) -> dict[str, Any]:
        """Fill `state`'s tensors, in place, from the step directory `path`; returns its train_state.

        `only` names the parts ("model", "optim") that are compared and loaded. Raises UserError if the checkpoint is
        corrupt or unreadable, or if its keys, shapes or dtypes are not exactly `state`'s.
        """
        directory = Location(path)
        if directory != self._verified and (found := self._flaws(directory)):
            raise _corrupt(directory, CorruptError("; ".join(found)))
        wanted = {key: value for key, value in state.items() if key.partition(".")[0] in only}
        try:
            reader = self._everywhere_same(lambda: TensorReader(directory))
        except CorruptError as error:
            raise _corrupt(directory, error) from None
        _compare(directory, wanted, reader.metadata, only)
        try:
            with_retries(lambda: _unwrapped(lambda: dcp_load(wanted, storage_reader=reader, process_group=self._group)))
        except OSError as error:
            raise _explained(error) from None
        return self._on_main(lambda: json.loads(with_retries((directory / TRAIN_STATE).read)))

    def close(self) -> None:
        """Wait until nothing is being written any more."""

    def _steps(self) -> list[Location]:
        return steps_in(self.directory)

    def _flaws(self, directory: Location) -> list[str]:
        """What is wrong with a step directory, every rank having read its share of the files."""
        found = self._everywhere(lambda: step_flaws(directory, rank(), world_size()))
        return list(dict.fromkeys(flaw for part in found for flaw in part))  # a bad manifest is everybody's, once

    def _retain(self) -> None:
        """Delete the committed steps that the retention options do not keep."""
        committed = [directory for directory in self._steps() if is_committed(directory)]
        if self.config.keep_last:
            for directory in committed[self.config.keep_last :]:
                if not self.config.keep_every or step_of(directory.name) % self.config.keep_every:
                    remove_step(directory)

    def _sweep_drafts(self) -> None:
        """Remove what interrupted saves have left."""
        for name in self.directory.names():
            if name.endswith(".tmp") and step_of(name.removesuffix(".tmp")) >= 0:
                (self.directory / name).remove()

    def _sweep_half_deleted(self, older: list[tuple[Location, bool, bool]]) -> None:
        """Remove, of the steps before a valid one, those whose deletion was interrupted."""
        for directory, committed, marked in older:
            if not committed and not marked:
                directory.remove()

    def _everywhere(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on every rank, by rank; if it fails on one, the error is raised on all."""
        result: tuple[Any, Exception | None]
        try:
            result = action(), None
        except (OSError, UserError, CorruptError) as error:
            result = None, error
        results: list[Any] = [result]
        if self._group is not None:
            results = [None] * world_size()
            dist.all_gather_object(results, result, group=self._group)
        for _, error in results:
            if isinstance(error, OSError):
                raise _explained(error)
            if error is not None:
                raise error
        return [value for value, _ in results]

    def _on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, which alone runs it; its error is raised on all."""
        return self._everywhere(lambda: action() if is_main() else None)[0]  # pyright: ignore[reportReturnType]

    def _everywhere_same(self, action: Callable[[], T]) -> T:
        """This rank's result of `action`, after it has succeeded on all of them."""
        mine: list[T] = []
        self._everywhere(lambda: mine.append(action()))
        return mine[0]


def resolve(path: str | PathLike[str]) -> Location:
    """The step directory that `path` means: itself, or the newest committed one of a run or checkpoints directory.

    Raises UserError if there is none. Nothing is read but names: loading verifies.
    """
    place = Location(path)
    if step_of(place.name) >= 0 and place.is_dir():
        if not is_committed(place):
            reason = f"is marked {CORRUPT}" if CORRUPT in place.names() else f"has no {MANIFEST}"
            raise UserError(f"{place}: {reason}, so it is not a valid checkpoint; name another step")
        return place
    for directory in (place, place / "checkpoints"):
        for step in steps_in(directory):
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
        found = step_flaws(directory)
        if found:
            raise CorruptError("; ".join(found))
        reader = TensorReader(directory)
        _compare(directory, state, reader.metadata, ("model",))
        with_retries(lambda: _unwrapped(lambda: dcp_load(state, storage_reader=reader, no_dist=True)))
        return json.loads(with_retries((directory / TRAIN_STATE).read))
    except CorruptError as error:
        raise _corrupt(directory, error) from None
    except OSError as error:
        raise _explained(error) from None


def _corrupt(directory: Location, why: CorruptError) -> UserError:
    return UserError(f"{directory}: corrupt: {why}; use an earlier step")


def _compare(directory: Location, state: dict[str, Tensor], metadata: Metadata, only: tuple[str, ...]) -> None:
    """Raise UserError unless the checkpoint has exactly `state`'s keys, shapes and dtypes (in the parts `only`)."""
    saved = {key: entry for key, entry in metadata.state_dict_metadata.items() if key.partition(".")[0] in only}
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


def _explained(error: OSError) -> UserError:
    """An error of the disk as the one line that a user can act upon."""
    what = error.strerror or str(error) or type(error).__name__
    return UserError(f"{error.filename or 'checkpoint'}: {what}; free or mend the disk and run again")


def _unwrapped(action: Callable[[], T]) -> T:
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
