"""Stopping on a signal or at the time limit: all ranks after the same step, with a checkpoint."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from torchxihe.components.runtime.watchdog import Watchdog
from torchxihe.errors import LostPeerError
from torchxihe.utils.distributed import use_default_timeout
from torchxihe.utils.processes import SIGNALS

END = b"\0"  # no signal's number
AGREEMENT_TIMEOUT = 20.0  # torchrun, and most schedulers, kill 30 s after their signal


class Stop:
    """Collects reasons to stop and has the ranks agree on the step to stop after. Used in a `with`, on all ranks.

    From a signal until the ranks agree the watchdog has a deadline: a peer that has crashed never agrees, and the other
    ranks must not wait for it in a collective forever. Signals are read in a thread, because Python runs no signal
    handler while its main thread waits in a collective.
    """

    def __init__(self, watchdog: Watchdog, time_limit: float = 0.0) -> None:
        """`time_limit`: seconds after which to stop, 0: never."""
        self.reason = ""
        """Why this rank wants to stop; "" if it does not."""
        self._watchdog, self._limit = watchdog, time_limit
        self._start = self._last = time.monotonic()
        self._step_seconds = 0.0
        self._before: dict[signal.Signals, object] = {}
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None
        new = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._group = use_default_timeout(new) if isinstance(new, dist.ProcessGroup) else None

    def __enter__(self) -> "Stop":
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _handled_by_listener) for number in SIGNALS}
        self._listener = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._watchdog.set_deadline(0)
        if kind is None and self._work is not None:
            with contextlib.suppress(RuntimeError):  # a rank was lost after its last step
                self._work.wait()  # every rank has started it
        signal.set_wakeup_fd(self._wakeup_before)
        if kind is not None:  # a run that has succeeded is over: signals, now ignored, no longer change its exit code
            for number, handler in self._before.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        # Waited for: if it held the last reference to this object, it would free a tensor while Python exits: an abort.
        os.write(self._write_fd, END)
        self._listener.join()
        os.close(self._write_fd)

    def agreed(self) -> bool:
        """Whether to stop now: the same on all ranks, a step after the first of them wanted to.

        Called once per step. It starts a reduction of one number on the host and waits for that of the previous step,
        which has had the duration of a step: neither the host nor the GPU waits.
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
                    raise LostPeerError("another rank exited; see its last message for the reason") from None
                answer = bool(self._flag.item())
            self._flag = torch.tensor([float(bool(self.reason))])
            self._work = dist.all_reduce(self._flag, group=self._group, async_op=True)
        if answer:
            self.reason = self.reason or "another rank was asked to stop"
            self._watchdog.set_deadline(0)
        return answer

    def _listen(self) -> None:
        """Read signals until the end."""
        while (number := os.read(self._read_fd, 1)) != END:
            if self.reason or number[0] not in SIGNALS:
                continue  # a second signal changes nothing
            self.reason = signal.Signals(number[0]).name
            timeout = max(AGREEMENT_TIMEOUT, 3 * self._step_seconds)
            self._watchdog.set_deadline(timeout, f"{self.reason}, but not all ranks agreed to stop")
        os.close(self._read_fd)


def _handled_by_listener(number: int, frame: FrameType | None) -> None:
    """The handler of Python's main thread; the listener has read the signal's number from the wakeup descriptor."""
