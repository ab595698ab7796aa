"""Stopping in good order: on a signal or at the time limit, all ranks after the same step, with a checkpoint."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from torchxihe.config import UserError
from torchxihe.utils.distributed import as_patient, rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
END = b"\0"  # no signal's number
PATIENCE_SECONDS = 20.0  # torchrun, and most schedulers, kill 30 s after their signal


class Stop:
    """Collects reasons to stop and has the ranks agree on the step to stop after. Used in a `with`, on all ranks.

    From a signal until the ranks agree a timer runs, which ends this process: a peer that has crashed will never
    agree, and its survivors must not wait for it in a collective for ever. It listens in a thread of its own, because
    Python handles no signal while its main thread waits inside one.
    """

    def __init__(self, time_limit: float = 0.0, patience: float = PATIENCE_SECONDS) -> None:
        """`time_limit`: seconds after which to stop, 0: never. `patience`: the timer's least length, in seconds."""
        self.reason = ""
        """Why this rank wants to stop; "" if it does not."""
        self._limit, self._patience = time_limit, patience
        self._start = self._last = time.monotonic()
        self._step_seconds = 0.0
        self._timer: threading.Timer | None = None
        self._unhurried = False
        self._before: dict[signal.Signals, object] = {}
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None
        new = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._group = as_patient(new) if isinstance(new, dist.ProcessGroup) else None

    def __enter__(self) -> "Stop":
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _noted_elsewhere) for number in SIGNALS}
        self._listener = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop_timer()
        if kind is None and self._work is not None:
            self._work.wait()  # every rank has started it
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        # Waited for: were it the last to hold this object, it might free a tensor while Python ends, which aborts.
        os.write(self._write_fd, END)
        self._listener.join()
        os.close(self._write_fd)

    def agreed(self) -> bool:
        """Whether to stop now: the same answer on all ranks, a step after the first of them wanted to.

        Called once a step. It starts a reduction of one number on the host and waits for the one of the step before,
        which has had a step's time: neither the host nor the GPU waits.
        """
        now = time.monotonic()
        self._step_seconds, self._last = now - self._last, now
        if self._limit and now - self._start > self._limit:
            self.reason = self.reason or "training.time_limit"
        answer = bool(self.reason)
        if self._group is not None:
            answer = False
            if self._work is not None:
                try:
                    self._work.wait()
                except RuntimeError:
                    raise UserError("another rank is gone; what it said last tells why") from None
                answer = bool(self._flag.item())
            self._flag = torch.tensor([float(bool(self.reason))])
            self._work = dist.all_reduce(self._flag, group=self._group, async_op=True)
        if answer:
            self.reason = self.reason or "another rank was asked to"
            self._stop_timer()
        return answer

    @contextmanager
    def unhurried(self, slow: bool = True) -> Iterator[None]:
        """Inside, if it is `slow`, the timer ends nothing: compiling, validating and saving take longer than a step."""
        self._unhurried = slow
        try:
            yield
        finally:
            self._unhurried = False

    def over(self) -> None:
        """There are no more steps: the timer ends nothing of what is left to do."""
        self._unhurried = True

    def _listen(self) -> None:
        """Wait for signals, from now to the end."""
        while (number := os.read(self._read_fd, 1)) != END:
            if self.reason or number[0] not in SIGNALS:
                continue  # a second signal changes nothing
            self.reason = signal.Signals(number[0]).name
            self._start_timer(max(self._patience, 3 * self._step_seconds))
        os.close(self._read_fd)

    def _start_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._give_up, (seconds,))
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self, seconds: float) -> None:
        """End this process: the others have not answered."""
        if self._unhurried:
            self._start_timer(seconds)
            return
        what = f"{self.reason}, but not all ranks agreed to stop within {seconds:.0f} s: ending without a checkpoint"
        print(f"[rank {rank()}] {what}", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)


def _noted_elsewhere(number: int, frame: FrameType | None) -> None:
    """The handler that Python calls when it gets round to it; the thread has known since the signal came."""
