"""Checkpoints: tensors through DCP, the rest as JSON, committed as a whole or not at all, verified before use.

DCP checks no content, ignores extra keys, casts dtypes silently and unpickles what it finds; so the layout, the
hashes (manifest.py) and the strict comparison of keys, shapes and dtypes are ours, and only tensors go through it.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    TRAIN_STATE,
    CorruptError,
    Files,
    Manifest,
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
from torchxihe.components.checkpoint.staging import Staging, describe_state, find_holders, share_of_this_rank
from torchxihe.components.checkpoint.state import corrupt, dcp_errors, load_tensors, open_fitting
from torchxihe.components.checkpoint.storage import Location, with_retries
from torchxihe.components.checkpoint.tensor_files import TensorWriter
from torchxihe.components.runtime import Ranks
from torchxihe.config.options import Checkpoint
from torchxihe.errors import UserError, explained
from torchxihe.utils.distributed import is_main

log = logging.getLogger(__name__)


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
        expected: Collection[str] | None = None,
    ) -> Location:
        """Save and commit `step`; a committed one stays as it is. Returns its directory.

        `expected`: the names of all tensors, which the ranks must have between them; None: every rank has all.
        `train_state` must be JSON. With mode "async" the values are copied when this returns and written later:
        `poll` tells of an error. Raises UserError when the disk is full, broken or read-only.
        """
        self.wait()
        directory = self.directory / step_name(step)
        if self.ranks.on_main(lambda: is_committed(directory)):
            return directory
        described = self.ranks.gather(lambda: describe_state(state))
        holders = find_holders(described)
        for rank, entries in enumerate(described) if expected is None else [(0, holders)]:
            missing = sorted(set(expected or holders) - set(entries))
            assert not missing, f"not every tensor would be saved: rank {rank} lacks {missing[:6]}"
        parts = tuple(sorted({key.partition(".")[0] for key in holders}))
        finite = validation_loss is not None and math.isfinite(validation_loss)
        manifest = Manifest(step, {}, parts, validation_loss if finite else None)  # JSON has no NaN, nor is it the best
        state = share_of_this_rank(state, holders, self.ranks.rank)
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
            dcp_errors(lambda: dcp_save(state, storage_writer=writer, process_group=self.ranks.group))
        except OSError as error:
            raise explained(error) from None
        written = self.ranks.gather(lambda: writer.files)
        self.ranks.on_main(commit)
        log.info("saved %s in %.1f s", directory, time.perf_counter() - start)

    def _flaws(self, directory: Location) -> list[str]:
        """What is wrong with a step directory, every rank having read its share of the files."""
        found = self.ranks.gather(lambda: step_flaws(directory, self.ranks.rank, self.ranks.size))
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
