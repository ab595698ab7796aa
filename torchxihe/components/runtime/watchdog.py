"""Ends a run that has stopped moving, and says where every rank stands."""

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
    """A thread that ends this process if the phase it is told of lasts too long. Used in a `with`, on all ranks.

    Every rank has one, with the same limits: in a hang all of them report, the one that sleeps and those that wait.
    """

    def __init__(self, run_dir: Path, init_timeout: float, step_timeout: float) -> None:
        """`run_dir` gets NCCL's flight recordings. Slow phases, and the first one, the start, may take `init_timeout`
        seconds, others `step_timeout`; 0: for ever."""
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
        """The phase before is over. `slow`: compiling, validating, saving, which no deadline cuts short."""
        # No notify: the thread looks at these when the limit before runs out, so that a step costs a few assignments.
        with self._changed:
            now = time.monotonic()
            if self._slow:
                self._deadline_since = now
            self._timeout = self._init_timeout if slow else self._step_timeout
            self._phase, self._slow, self._since = phase, slow, now

    def set_deadline(self, seconds: float, why: str = "") -> None:
        """From now on, phases that are not slow have `seconds` in total, because of `why`; 0: no deadline."""
        with self._changed:
            self._deadline, self._deadline_since, self._why = seconds, time.monotonic(), why

    @property
    def phase(self) -> str:
        """What this process is doing."""
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
        """Say where this rank is and end it."""
        print(f"[rank {rank()}] {why} in: {self._phase}; stacks of this rank follow", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if recording := _flight_recording():
            file = self._run_dir / f"nccl-rank-{rank()}.pickle"
            file.write_bytes(recording)
            print(
                f"[rank {rank()}] NCCL's last collectives: {file} (torch.distributed.flight_recorder)", file=sys.stderr
            )
        sys.stderr.flush()
        time.sleep(2)  # let the other ranks, whose time is up too, speak before the first exit ends them
        os._exit(1)


def _flight_recording() -> bytes:
    """NCCL's own record of its last collectives; empty where there is none."""
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
    return dump() if dump is not None and torch.cuda.is_available() else b""
