"""Ends a run that hangs, with the stacks of every rank."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import torch

from torchxihe.utils.distributed import rank


class Watchdog:
    """A thread that ends this process if a phase lasts too long. Used in a `with`, on all ranks.

    Every rank has one with the same limits: in a hang all of them report, the one that hangs and those that wait.
    """

    def __init__(self, run_dir: Path, init_timeout: float, step_timeout: float) -> None:
        """`run_dir`: for NCCL's flight recordings. Slow phases, and the start, may take `init_timeout` seconds, others
        `step_timeout`; 0: no limit."""
        self._run_dir, self._init_timeout, self._step_timeout = run_dir, init_timeout, step_timeout
        self._changed = threading.Condition()
        self._phase, self._timeout, self._slow, self._since = "start", init_timeout, False, time.monotonic()
        self._deadline, self._deadline_since, self._why = 0.0, 0.0, ""
        self._ended = False

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def begin(self, phase: str, *, slow: bool = False) -> None:
        """Begin a phase. `slow`: compiling, validating or saving, to which no deadline applies."""
        # No notify: the thread reads these once a second, so that a step costs a few assignments.
        with self._changed:
            now = time.monotonic()
            if self._slow:
                self._deadline_since = now
            self._timeout = self._init_timeout if slow else self._step_timeout
            self._phase, self._slow, self._since = phase, slow, now

    def set_deadline(self, seconds: float, why: str = "") -> None:
        """Allow phases that are not slow `seconds` in total from now on, because of `why`; 0: no deadline."""
        with self._changed:
            self._deadline, self._deadline_since, self._why = seconds, time.monotonic(), why

    @property
    def phase(self) -> str:
        """Name of the current phase."""
        return self._phase

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                left = self._since + self._timeout - now if self._timeout else 1.0
                if left <= 0:
                    self._end(f"no progress for {self._timeout:.0f} s")
                if self._deadline and not self._slow and now > self._deadline_since + self._deadline:
                    self._end(f"{self._why} within {self._deadline:.0f} s")
                self._changed.wait(min(left, 1.0))

    def _end(self, why: str) -> None:
        """Print the stacks of this rank and exit."""
        print(f"[rank {rank()}] {why} in: {self._phase}; stacks of this rank follow", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if recording := _flight_recording():
            file = self._run_dir / f"nccl-rank-{rank()}.pickle"
            file.write_bytes(recording)
            print(
                f"[rank {rank()}] NCCL's last collectives: {file} (torch.distributed.flight_recorder)", file=sys.stderr
            )
        sys.stderr.flush()
        time.sleep(2)  # the first exit ends the other ranks, which have to report too
        os._exit(1)


def _flight_recording() -> bytes:
    """NCCL's record of its last collectives; empty if there is none."""
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
    return dump() if dump is not None and torch.cuda.is_available() else b""
