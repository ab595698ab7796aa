"""Compiled code that travels with a run, so that it starts faster on a machine that has not compiled it.

What torch.compile makes is in a cache on the machine's own disk; a copy of what this run uses of it is in the run
directory. Only that directory's own run reads it: like any pickled code, it is as trusted as who wrote it.
"""

import logging
from pathlib import Path

import torch.compiler
from torch._dynamo.utils import counters

from torchxihe.utils.files import write_bytes

FILE = "compiled.bin"
log = logging.getLogger(__name__)


class Compiled:
    """The copy in a run directory."""

    def __init__(self, run_dir: Path) -> None:
        """Give the compiler what is there; what was made by another version, or for another GPU, is not used."""
        self.file, self._made = run_dir / FILE, 0
        if self.file.exists():
            torch.compiler.load_cache_artifacts(self.file.read_bytes())

    def save(self) -> None:
        """Write what has been compiled or used so far, unless all of it is there."""
        made = counters["inductor"]["fxgraph_cache_miss"]
        artifacts = torch.compiler.save_cache_artifacts() if made > self._made else None
        self._made = made
        if artifacts is None:
            return
        try:
            write_bytes(self.file, artifacts[0])
        except OSError as error:
            log.warning("%s: %s; another machine compiles again", self.file, error.strerror)
