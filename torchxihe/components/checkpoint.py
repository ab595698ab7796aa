"""Checkpoints: tensors through DCP, the rest as JSON, committed as a whole or not at all, verified before use.

DCP checks no content, ignores extra keys, casts dtypes silently and unpickles what it finds; so the layout, the
hashes (manifest.py) and the strict comparison of keys, shapes and dtypes are ours, and only tensors go through it.
"""

import itertools
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from torchxihe.components.manifest import (
    CORRUPT,
    MANIFEST,
    TRAIN_STATE,
    CorruptError,
    Files,
    Manifest,
    homes_of,
    is_committed,
    mark_corrupt,
    read_manifest,
    remove_step,
    step_flaws,
    step_name,
    step_of,
    steps_in,
    write_manifest,
)
from torchxihe.components.ranks import Ranks
from torchxihe.components.staging import Staging, share_of_this_rank
from torchxihe.components.storage import Location, explained, with_retries
from torchxihe.components.tensor_files import TensorReader, TensorWriter
from torchxihe.config import Checkpoint, UserError
from torchxihe.utils.distributed import is_main, rank, world_size

T = TypeVar("T")
log = logging.getLogger(__name__)

# dcp says so whenever there is no process group, which is how one process runs here.
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


class Checkpointer:
    """Saves and finds the checkpoints of one run. Made, and each method called, on all ranks together."""

    def __init__(self, directory: str | PathLike[str], config: Checkpoint) -> None:
        """`directory` holds the step directories; leftovers of saves that did not end are swept from it."""
        self.directory = Location(directory)
        self.config = config
        self.ranks = Ranks()
        """All of the run, for what is done with files."""
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._verified: Location | None = None
        self.committed: Callable[[Location], None] = lambda directory: None
        """Told on rank 0 of each step, when it is committed, by the thread that wrote it."""
        self.in_use: set[Location] = set()
        """Steps that are being read, on rank 0: not to be deleted."""
        self.ranks.on_main(self._sweep_drafts)

    def save(
        self,
        step: int,
        state: dict[str, Tensor],
        train_state: dict[str, Any],
        validation_loss: float | None = None,
    ) -> Location:
        """Save and commit `step`; a committed one stays as it is. Returns its directory.

        `train_state` must be JSON. With mode "async" the values are copied when this returns and written later:
        `poll` tells of an error. Raises UserError when the disk is full, broken or read-only.
        """
        self.wait()
        directory = self.directory / step_name(step)
        if self.ranks.on_main(lambda: is_committed(directory)):
            return directory
        parts = tuple(sorted({key.partition(".")[0] for key in state}))
        finite = validation_loss is not None and math.isfinite(validation_loss)
        manifest = Manifest(step, {}, parts, validation_loss if finite else None)  # JSON has no NaN, nor is it the best
        state = share_of_this_rank(state)
        text = json.dumps(train_state, indent=1)
        if self.config.mode == "async":
            self._pending = self._thread.submit(self._write, directory, self._staging.copy(state), text, manifest)
        else:
            self._write(directory, state, text, manifest)
        return directory

    def poll(self) -> None:
        """Raise the error of the save in the background, if it has met one; costs nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait until nothing is being written any more; raises the error that the last save met."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def newest(self, finished: Callable[[dict[str, Any]], bool] = lambda train_state: False) -> Location | None:
        """The newest step that is committed and verifies, or None if nothing was ever committed.

        A corrupt one is marked as such, with a warning, and passed over; so is one of the model alone, unless by its
        train_state the run is `finished`, where nothing is left to do. Raises UserError if there are checkpoints and
        none is of use, or if one cannot be read: neither may become a silent fresh start.
        """
        steps = self.ranks.on_main(
            lambda: [(d, is_committed(d), CORRUPT in d.names()) for d in steps_in(self.directory)]
        )
        passed = []
        for i, (directory, committed, marked) in enumerate(steps):
            if marked:
                passed.append(f"{directory.name} is marked {CORRUPT}")
                continue
            if not committed and (not directory.local or any(later for _, later, _ in steps[:i])):
                continue  # half-deleted, which is only done after a newer one is committed, or half-uploaded
            found = self._flaws(directory)
            if found:
                self.ranks.on_main(lambda directory=directory, reason=found[0]: mark_corrupt(directory, reason))
                passed.append(f"{directory.name}: {found[0]}")
                if is_main():
                    log.warning("%s is corrupt and passed over: %s", directory, "; ".join(found))
                continue
            parts = self.ranks.on_main(lambda directory=directory: read_manifest(directory).parts)
            self._verified = directory
            if parts == ("model",) and not finished(self.train_state(directory)):
                passed.append(f"{directory.name} holds the model alone")
                continue
            self.ranks.on_main(lambda i=i: self._sweep_half_deleted(steps[i + 1 :]))
            return directory
        if passed:
            remedy = "mend one, or start another run with --run.name=NAME"
            if any("model alone" in why for why in passed):
                remedy += """, from its weights with --checkpoint.load=STEP --checkpoint.load_only='["model"]'"""
            raise UserError(f"{self.directory}: no checkpoint to go on from ({'; '.join(passed)}); {remedy}")
        return None

    def load(self, path: str | PathLike[str], state: dict[str, Tensor], only: tuple[str, ...] = ()) -> dict[str, Any]:
        """Fill `state`'s tensors, in place, from the step directory `path`; returns its train_state.

        `only` names the parts ("model") that are compared and loaded; none: all. Raises UserError if the checkpoint
        is corrupt or unreadable, or if its keys, shapes or dtypes are not exactly `state`'s.
        """
        directory = Location(path)
        train_state = self.train_state(directory)
        wanted = {key: tensor for key, tensor in state.items() if not only or key.partition(".")[0] in only}
        reader = self.ranks.each(lambda: open_fitting(directory, wanted, only))
        load_tensors(wanted, reader, self.ranks.group)
        return train_state

    def train_state(self, path: str | PathLike[str]) -> dict[str, Any]:
        """What was saved beside the tensors of the step directory `path`. Raises UserError if it is corrupt."""
        directory = Location(path)
        if directory != self._verified and (found := self._flaws(directory)):
            raise corrupt(directory, "; ".join(found))
        self._verified = directory
        return self.ranks.on_main(lambda: json.loads(with_retries((directory / TRAIN_STATE).read)))

    def _write(self, directory: Location, state: dict[str, Tensor], train_state: str, manifest: Manifest) -> None:
        """Write a step's files, each rank its own, and commit them. Runs in the background thread if that is wanted."""
        # Only a local rename is one indivisible act. In an object store the manifest, which comes last, commits.
        draft = directory.with_name(f"{directory.name}.tmp") if directory.local else directory

        def prepare() -> None:
            draft.remove()
            draft.make()

        def commit() -> None:
            files: Files = {name: entry for part in written for name, entry in part.items()}
            with (draft / TRAIN_STATE).create() as file:
                file.write(train_state.encode())
            files[TRAIN_STATE] = file.digest()
            write_manifest(draft, replace(manifest, files=files))
            draft.sync()
            if draft != directory:
                directory.remove()  # not committed, or we would not be here: a corrupt one
                draft.rename(directory)
                self.directory.sync()
            self.committed(directory)
            self.retain()

        start = time.perf_counter()
        self.ranks.on_main(prepare)
        writer = TensorWriter(draft)
        try:
            _unwrapped(lambda: dcp_save(state, storage_writer=writer, process_group=self.ranks.group))
        except OSError as error:
            raise explained(error) from None
        written = self.ranks.gather(lambda: writer.files)
        self.ranks.on_main(commit)
        log.info("saved %s in %.1f s", directory, time.perf_counter() - start)

    def _flaws(self, directory: Location) -> list[str]:
        """What is wrong with a step directory, every rank having read its share of the files."""
        found = self.ranks.gather(lambda: step_flaws(directory, rank(), world_size()))
        return list(dict.fromkeys(flaw for part in found for flaw in part))  # a bad manifest is everybody's, once

    def retain(self) -> None:
        """Delete, on rank 0, the committed steps that no retention option keeps and nobody reads."""
        config = self.config
        committed = [directory for directory in steps_in(self.directory) if is_committed(directory)]
        if not config.keep_last:
            return
        keep = set(committed[: config.keep_last])
        keep |= {*itertools.islice(filter(_is_whole, committed), 1)}  # from weights alone no run goes on
        if config.keep_every:
            keep |= {directory for directory in committed if step_of(directory.name) % config.keep_every == 0}
        if config.keep_best:
            losses = {directory: loss for directory in committed if (loss := _validation_loss(directory)) is not None}
            keep |= set(sorted(losses, key=losses.__getitem__)[: config.keep_best])
        for directory in committed:
            if directory not in keep and directory not in self.in_use:
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


def _is_whole(directory: Location) -> bool:
    """Whether a committed step has more than the model. A damaged manifest says no, and ends no run."""
    try:
        return read_manifest(directory).parts != ("model",)
    except CorruptError:
        return False


def _validation_loss(directory: Location) -> float | None:
    """The loss that a committed step was saved with, if any. A damaged manifest has none, and ends no run."""
    try:
        return read_manifest(directory).validation_loss
    except CorruptError:
        return None


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
            lambda: _unwrapped(lambda: dcp_load(state, storage_reader=reader, process_group=group, no_dist=alone))
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
