"""Exports of checkpoints in the background, while training goes on."""

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.export import draft_of, export
from torchxihe.components.checkpoint.manifest import is_committed, step_of, steps_in
from torchxihe.components.checkpoint.saved_run import open_saved
from torchxihe.components.checkpoint.storage import Location
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.utils.distributed import is_main

log = logging.getLogger(__name__)


class Exporter:
    """Exports the checkpoints that `checkpoint.export_every` asks for: rank 0, in a thread, while training goes on.

    To `exports/` in the run directory. A checkpoint is not deleted before its export is done. An export that fails is
    a warning. Each start makes those of its checkpoints that are missing, for whatever reason. Used in a `with`, on all
    ranks, which waits for what is under way, unless it is left by an error or after `cancel`.
    """

    def __init__(self, config: Config, checkpointer: Checkpointer) -> None:
        self._every, self._last = config.checkpoint.export_every, config.total_steps
        self._folder = config.run_dir / "exports"
        self._checkpointer = checkpointer
        self._cancelled = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._exports: list[Future[None]] = []
        checkpointer.committed = self._offer

    def __enter__(self) -> "Exporter":
        if is_main() and self._every:
            for draft in self._folder.glob(draft_of(Path("step-*")).name):
                shutil.rmtree(draft)
            for step_dir in reversed(steps_in(self._checkpointer.directory)):
                if is_committed(step_dir):
                    self._offer(step_dir)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._cancelled |= kind is not None
        self._thread.shutdown()
        self._checkpointer.committed = lambda directory: None
        if kind is None:
            for export_ in self._exports:
                export_.result()  # raises what should not have happened
            if self._exports:
                self._checkpointer.retain()

    def cancel(self) -> None:
        """End what is under way; the next start makes it again."""
        self._cancelled = True

    def _offer(self, step_dir: Location) -> None:
        """Export a committed step if that is wanted; returns at once."""
        step, out = step_of(step_dir.name), self._folder / step_dir.name
        if not self._every or (step % self._every and step != self._last) or out.exists():
            return
        self._checkpointer.in_use.add(step_dir)
        self._exports.append(self._thread.submit(self._export, step_dir, out))

    def _export(self, step_dir: Location, out: Path) -> None:
        start = time.perf_counter()
        try:
            self._progress(0, 0)
            export(open_saved(step_dir), out, progress=self._progress)
            log.info("exported %s in %.1f s", out, time.perf_counter() - start)
        except _CancelledError:
            log.info("the export of %s is left to the next start", step_dir.name)
        except UserError as error:
            log.warning("%s: not exported: %s; for another try: torchxihe export %s --out DIR", out, error, step_dir)
        finally:
            self._checkpointer.in_use.discard(step_dir)

    def _progress(self, more: int, total: int) -> None:
        if self._cancelled:
            raise _CancelledError


class _CancelledError(Exception):
    """The run ends, and does not wait for an export."""
