"""What the gate (tests/faults/test_stop.py) cannot see of stopping."""

import threading
import time
from pathlib import Path

from torchxihe.components.runtime.stop import Stop
from torchxihe.components.runtime.watchdog import Watchdog


class SlowToEnd(Stop):
    def _listen(self) -> None:
        super()._listen()
        time.sleep(0.3)


def test_the_thread_has_ended_before_python_does() -> None:
    """One that lets go of the last tensor while Python ends aborts the process, after all was well: seen once in some
    forty runs on a busy machine."""
    with SlowToEnd(Watchdog(Path(), 0, 0)):
        assert "stop" in {thread.name for thread in threading.enumerate()}
    assert "stop" not in {thread.name for thread in threading.enumerate()}
