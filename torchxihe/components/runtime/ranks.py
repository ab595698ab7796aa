"""File operations on several ranks: if one fails, all ranks raise its error."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from torchxihe.errors import UserError, explained
from torchxihe.utils.distributed import is_main

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)  # a rank may wait for another's slow disk; one that exited is noticed immediately


class Ranks:
    """All processes of the run, in a gloo group of their own, so that a thread can use it during a training step's
    collectives. With one process there is no group."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on every rank, by rank. An OSError or UserError on one is raised on all."""
        result: tuple[Any, Exception | None]
        try:
            result = action(), None
        except OSError as error:
            result = None, explained(error)
        except UserError as error:
            result = None, error
        results: list[Any] = [result]
        if self.group is not None:
            results = [None] * self.size
            dist.all_gather_object(results, result, group=self.group)
        for _, error in results:
            if error is not None:
                raise error
        return [value for value, _ in results]

    def each(self, action: Callable[[], T]) -> T:
        """This rank's result of `action`, after it has succeeded on all."""
        mine: list[T] = []
        self.gather(lambda: mine.append(action()))
        return mine[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0; only rank 0 calls it, and its error is raised on all."""
        return self.gather(lambda: action() if is_main() else None)[0]  # pyright: ignore[reportReturnType]
