"""The lock of a run directory: one run at a time."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torchxihe.components.runtime.ranks import Ranks
from torchxihe.errors import UserError, explained
from torchxihe.utils.files import locked
from torchxihe.utils.processes import elastic_job

log = logging.getLogger(__name__)


def share_run_directory(run_dir: Path, ranks: Ranks) -> None:
    """Make it, on all ranks together. Raises UserError if a node does not see a file that rank 0 wrote there."""

    def make_mark() -> Path:
        mark = run_dir / f".shared-{uuid.uuid4().hex}"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise UserError(f"run.dir: {explained(error)}") from None
        return mark

    mark = ranks.on_main(make_mark)
    blind = [r for r, sees in enumerate(ranks.gather(mark.exists)) if not sees]
    ranks.on_main(mark.unlink)
    if blind:
        raise UserError(f"run.dir: ranks {blind} do not see rank 0's {run_dir}; put it where all nodes share it")


@contextmanager
def run_lock(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Make and lock `directory`; called on all ranks together.

    Raises UserError, naming the holder's host and process, if it is locked.
    """

    def taken(holder: str) -> None:
        remedy = "wait for it, stop it, or choose another --run.name"
        raise UserError(f"{directory}: {holder} is training in it; {remedy}")

    with ExitStack() as held:

        def take() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            if earlier := held.enter_context(locked(directory / ".lock", taken, elastic_job())):
                log.info("%s: the previous run (%s) was killed or crashed", directory, earlier)

        ranks.on_main(take)
        yield
