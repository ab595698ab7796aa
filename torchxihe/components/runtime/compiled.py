"""Compiled code that travels with a run, so that it starts faster on a machine that has not compiled it.

What torch.compile makes is in a cache on the machine's own disk; a copy of what this run uses of it is in the run
directory. Only that directory's own run reads it: like any pickled code, it is as trusted as who wrote it.
"""

import logging
from pathlib import Path

import torch
import torch.compiler
import xxhash
from torch._dynamo.utils import counters

from torchxihe.utils.files import write_bytes

FILE = "compiled.bin"
log = logging.getLogger(__name__)


class Compiled:
    """The copy in a run directory: a line with torch's version and the hash of the rest, then torch's artifacts."""

    def __init__(self, run_dir: Path) -> None:
        """Give the compiler what is there; it uses nothing that was made for another GPU."""
        self.file, self._made = run_dir / FILE, 0
        if not self.file.is_file():
            return
        header, _, artifacts = self.file.read_bytes().partition(b"\n")
        if not header.startswith(_version()):
            log.info("%s is of another version of torch; compiling again", self.file)
        elif header != _header(artifacts):
            log.warning("%s is damaged; compiling again", self.file)
        else:
            torch.compiler.load_cache_artifacts(artifacts)

    def save(self) -> None:
        """Write what has been compiled or used so far, unless all of it is there."""
        made = counters["inductor"]["fxgraph_cache_miss"]
        saved = torch.compiler.save_cache_artifacts() if made > self._made else None
        self._made = made
        if saved is None:
            return
        artifacts, _ = saved
        try:
            write_bytes(self.file, _header(artifacts) + b"\n" + artifacts)
        except OSError as error:
            log.warning("%s: %s; another machine compiles again", self.file, error.strerror)


def _version() -> bytes:
    return f"torch {torch.__version__} ".encode()


def _header(artifacts: bytes) -> bytes:
    return _version() + xxhash.xxh3_128_hexdigest(artifacts).encode()
