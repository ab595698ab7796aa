"""Ranks, signals, hangs, locks, micro-batches. The other packages of `components` import from here."""

from torchxihe.components.runtime.compiled import Compiled
from torchxihe.components.runtime.micro_batch import fit_micro_batch
from torchxihe.components.runtime.ranks import Ranks
from torchxihe.components.runtime.run_lock import run_lock, share_run_directory
from torchxihe.components.runtime.stop import Stop
from torchxihe.components.runtime.watchdog import Watchdog

__all__ = ["Compiled", "Ranks", "Stop", "Watchdog", "fit_micro_batch", "run_lock", "share_run_directory"]
