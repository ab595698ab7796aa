"""Checkpoints: tensors through DCP, the rest as JSON, committed atomically, verified before use.

DCP checks no content, ignores extra keys, casts dtypes silently and unpickles any class; so the file layout, the hashes
(manifest.py), the strict comparison of keys, shapes and dtypes (state.py) and the reader of tensors (tensor_files.py)
are ours.
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

from torchxihe.components.checkpoint.history import read_train_state
from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    TRAIN_STATE,
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
from torchxihe.components.checkpoint.state import (
    corruption_explained,
    dcp_errors,
    described_state,
    load_tensors,
    open_fitting,
)
from torchxihe.components.checkpoint.storage import CorruptError, Location
from torchxihe.components.checkpoint.tensor_files import TensorWriter
from torchxihe.components.runtime import Ranks
from torchxihe.config.options import Checkpoint, Model
from torchxihe.errors import UserError, explained
from torchxihe.utils.distributed import is_main

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and finds the checkpoints of one run. Constructed, and each method called, on all ranks together."""

    def __init__(self, directory: str | PathLike[str], config: Checkpoint) -> None:
        """`directory` contains the step directories; drafts of interrupted saves are deleted from it."""
        self.directory = Location(directory)
        self.config = config
        self.ranks = Ranks()
        """All ranks of the run, for work on files."""
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._verified: Location | None = None
        self.committed: Callable[[Location], None] = lambda directory: None
        """Called on rank 0 after each commit, in the thread that wrote the checkpoint."""
        self.in_use: set[Location] = set()
        """Steps that are being exported, on rank 0: retention does not delete them."""
        self.ranks.on_main(self._sweep_drafts)

    def save(
        self,
        step: int,
        state: dict[str, Tensor],
        train_state: dict[str, Any],
        validation_loss: float | None = None,
        expected: Collection[str] | None = None,
        make: Callable[[str], Tensor] | None = None,
    ) -> Location:
        """Save and commit `step`, unless it is committed already. Returns its directory.

        `expected`: names of tensors that some rank must have; None: every rank has the tensors of all ranks.
        `make` makes each tensor, by its name, when it is written; those of `state` only describe them then.
        `train_state` is JSON. With mode "async" the values have been copied when this returns and are written later:
        `poll` raises the errors. Raises UserError when the disk is full, broken or read-only.
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
        manifest = Manifest(step, {}, parts, validation_loss if finite else None)  # JSON has no NaN
        state = share_of_this_rank(state, holders, self.ranks.rank)
        text = json.dumps(train_state, indent=1)
        if self.config.mode == "async":
            self._pending = self._thread.submit(self._write, directory, self._staging.copy(state), text, manifest)
        else:
            self._write(directory, state, text, manifest, make)
        return directory

    def save_model(self, step: int, model: Model, make: Callable[[str], Tensor], train_state: dict[str, Any]) -> None:
        """Save a checkpoint of a model alone, in one process and with one tensor in memory at a time.

        `make` gives a tensor by its name in `flat_state`: float32, on the host. Raises UserError as `save`, and what
        `make` raises of it.
        """
        self.save(step, described_state(model), train_state, make=make)
        self.close()

    def poll(self) -> None:
        """Raise the error of a background save that has ended; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background save; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the background save and end its thread; raises its error."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def newest(self, finished: Callable[[dict[str, Any]], bool] = lambda train_state: False) -> Location | None:
        """The newest committed step that verifies, or None if nothing was ever committed.

        A corrupt one is marked CORRUPT, with a warning, and skipped; so is one of the model alone, unless the run is
        `finished` according to its train_state. Raises UserError if there are checkpoints and none can be resumed from,
        or if one cannot be read: the run must not start from step 0 silently.
        """
        steps = self.ranks.on_main(
            lambda: [(d, is_committed(d), CORRUPT in d.names()) for d in steps_in(self.directory)]
        )
        skipped = []
        for i, (directory, committed, marked) in enumerate(steps):
            if marked:
                skipped.append(f"{directory.name} is marked {CORRUPT}")
                continue
            if not committed and (not directory.local or any(later for _, later, _ in steps[:i])):
                continue  # half-deleted, which is only done after a newer one is committed, or half-uploaded
            found = self._flaws(directory)
            if found:
                self.ranks.on_main(lambda directory=directory, reason=found[0]: mark_corrupt(directory, reason))
                skipped.append(f"{directory.name}: {found[0]}")
                if is_main():
                    log.warning("%s is corrupt and is skipped: %s", directory, "; ".join(found))
                continue
            parts = self.ranks.on_main(lambda directory=directory: read_manifest(directory).parts)
            self._verified = directory
            if parts == ("model",) and not finished(self.train_state(directory)):
                skipped.append(f"{directory.name} holds the model alone")
                continue
            self.ranks.on_main(lambda i=i: self._sweep_half_deleted(steps[i + 1 :]))
            return directory
        if skipped:
            remedy = "restore one from a copy, or start another run with --run.name=NAME"
            if any("model alone" in why for why in skipped):
                remedy += """, from its weights with --checkpoint.load=STEP --checkpoint.load_only='["model"]'"""
            raise UserError(f"{self.directory}: no checkpoint to resume from ({'; '.join(skipped)}); {remedy}")
        return None

    def load(self, path: str | PathLike[str], state: dict[str, Tensor], only: tuple[str, ...] = ()) -> dict[str, Any]:
        """Fill `state`'s tensors, in place, from the step directory `path`; returns its train_state.

        Each rank gives the tensors that it holds. `only` names the parts ("model") that are compared and loaded; none:
        all. Raises UserError if the checkpoint is corrupt or unreadable, or if its keys, shapes or dtypes are not
        exactly those of all ranks' states together.
        """
        directory = Location(path)
        train_state = self.train_state(directory)
        wanted = {key: tensor for key, tensor in state.items() if not only or key.partition(".")[0] in only}
        described = self.ranks.gather(lambda: describe_state(wanted))
        find_holders(described)
        everything = {key: entry for entries in described for key, entry in entries.items()}
        reader = self.ranks.each(lambda: open_fitting(directory, everything, only))
        load_tensors(wanted, reader, self.ranks.group)
        return train_state

    def train_state(self, path: str | PathLike[str]) -> dict[str, Any]:
        """The train_state of the step directory `path`. Raises UserError if any file there is corrupt."""
        directory = Location(path)
        with corruption_explained(directory):
            if directory != self._verified and (found := self._flaws(directory)):
                raise CorruptError("; ".join(found))
        self._verified = directory

        def read() -> dict[str, Any]:
            with corruption_explained(directory):
                return read_train_state(directory)

        return self.ranks.on_main(read)

    def _write(
        self,
        directory: Location,
        state: dict[str, Tensor],
        train_state: str,
        manifest: Manifest,
        make: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Write a step's files, each rank its own, and commit them. With mode "async", in the background thread."""
        # Only a local rename is atomic. In an object store the manifest, which is written last, commits.
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
                directory.remove()  # a corrupt one: `save` returns early if it is committed
                draft.rename(directory)
                self.directory.sync()
            self.committed(directory)
            self.retain()

        start = time.perf_counter()
        self.ranks.on_main(prepare)
        writer = TensorWriter(draft, make)
        try:
            dcp_errors(lambda: dcp_save(state, storage_writer=writer, process_group=self.ranks.group))
        except OSError as error:
            raise explained(error) from None
        written = self.ranks.gather(lambda: writer.files)
        self.ranks.on_main(commit)
        log.info("saved %s in %.1f s", directory, time.perf_counter() - start)

    def _flaws(self, directory: Location) -> list[str]:
        """What is wrong with a step directory; each rank reads its share of the files."""
        found = self.ranks.gather(lambda: step_flaws(directory, self.ranks.rank, self.ranks.size))
        return list(dict.fromkeys(flaw for part in found for flaw in part))  # every rank reports a bad manifest

    def retain(self) -> None:
        """Delete, on rank 0, the committed steps that no retention option keeps and that are not being exported."""
        config = self.config
        committed = [directory for directory in steps_in(self.directory) if is_committed(directory)]
        if not config.keep_last:
            return
        keep = set(committed[: config.keep_last])
        keep |= {*itertools.islice(filter(_has_optimizer, committed), 1)}  # a run cannot resume from weights alone
        if config.keep_every:
            keep |= {directory for directory in committed if step_of(directory.name) % config.keep_every == 0}
        if config.keep_best:
            losses = {directory: loss for directory in committed if (loss := _validation_loss(directory)) is not None}
            keep |= set(sorted(losses, key=losses.__getitem__)[: config.keep_best])
        for directory in committed:
            if directory not in keep and directory not in self.in_use:
                remove_step(directory)

    def _sweep_drafts(self) -> None:
        """Delete the drafts of interrupted saves."""
        for name in self.directory.names():
            if name.endswith(".tmp") and step_of(name.removesuffix(".tmp")) >= 0:
                (self.directory / name).remove()

    def _sweep_half_deleted(self, older: list[tuple[Location, bool, bool]]) -> None:
        """Delete those steps before a valid one whose deletion was interrupted."""
        for directory, committed, marked in older:
            if not committed and not marked:
                directory.remove()


def _has_optimizer(directory: Location) -> bool:
    """Whether a committed step has more than the model; False if its manifest is damaged."""
    try:
        return read_manifest(directory).parts != ("model",)
    except CorruptError:
        return False


def _validation_loss(directory: Location) -> float | None:
    """The validation loss in a committed step's manifest; None if it has none or is damaged."""
    try:
        return read_manifest(directory).validation_loss
    except CorruptError:
        return None
