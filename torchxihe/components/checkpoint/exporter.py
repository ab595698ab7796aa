"""Exports of checkpoints in the background, during training."""

import logging
import shlex
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.export import export
from torchxihe.components.checkpoint.manifest import is_committed, step_of, steps_in
from torchxihe.components.checkpoint.saved_run import draft_of, open_saved
from torchxihe.components.checkpoint.storage import Location
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.utils.distributed import is_main

log = logging.getLogger(__name__)


class Exporter:
    """Exports the checkpoints that `checkpoint.export_every` asks for, in a thread of rank 0, during training.

    To `exports/` in the run directory. Retention does not delete a checkpoint before its export is done. A failed
    export is a warning; each start makes the missing exports of its checkpoints. A context manager, on all ranks: its
    end waits for running exports, except after an error or `cancel`.
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
                export_.result()  # raises bugs
            if self._exports:
                self._checkpointer.retain()

    def cancel(self) -> None:
        """End running exports; the next start makes them again."""
        self._cancelled = True

    def _offer(self, step_dir: Location) -> None:
        """Start the export of a committed step if it is due; does not wait."""
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
            log.info("the export of %s is postponed to the next start", step_dir.name)
        except UserError as error:
            log.warning(
                "%s: not exported: %s; to retry: torchxihe export %s --out DIR", out, error, shlex.quote(str(step_dir))
            )
        finally:
            self._checkpointer.in_use.discard(step_dir)

    def _progress(self, more: int, total: int) -> None:
        if self._cancelled:
            raise _CancelledError


class _CancelledError(Exception):
    """The run ends without waiting for an export."""
