"""Run a function on several gloo processes of this machine, for tests.

The processes are forked from a server that has imported torch once, so that a run of four costs a second or two.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from torchxihe.utils.distributed import process_group

# Creating the first DTensor imports dynamo, which takes 1.5 s per process.
PRELOAD = ["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torchxihe.components.checkpoint.checkpointer"]


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    init: bool = True,
    timeout: float = 60,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes and return what each returned, by rank.

    `fn` must be a module-level function; arguments and results must be picklable. The ranks have torchrun's environment
    and one thread each; with `init` they are inside `process_group()`, without it `fn` opens its own. Fails with the
    traceback of the first rank that raised or exited, or after `timeout` seconds with every rank's stack.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The store is in this process and binds its port itself, so no other process can take the port in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as scratch:
        ranks = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            settings = rank_environment(rank, world_size, store.port) | (env or {})
            stack = Path(scratch) / f"stack-{rank}"
            process = context.Process(
                target=_rank, args=(fn, args, settings, init, timeout, stack, writer), daemon=True
            )
            process.start()
            writer.close()
            ranks.append((process, reader))
        try:
            results = _collect([reader for _, reader in ranks], time.monotonic() + timeout + 2, Path(scratch))
            for rank, (process, _) in enumerate(ranks):
                process.join(timeout=10)
                if process.exitcode != 0:
                    raise AssertionError(f"rank {rank} returned, then left with exit code {process.exitcode}")
            return results
        finally:
            for process, reader in ranks:
                process.kill()
                process.join()
                reader.close()


def free_port() -> int:
    """A TCP port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """torchrun's environment variables, with an external store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "",  # more processes than this machine may have GPUs
        "OMP_NUM_THREADS": "1",
    }


def _rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    settings: dict[str, str],
    init: bool,
    timeout: float,
    stack: Path,
    writer: Connection,
) -> None:
    """Runs in each process: call the function and send (succeeded, result or traceback)."""
    os.environ.update(settings)
    torch.set_num_threads(1)
    with stack.open("w") as file:
        faulthandler.dump_traceback_later(timeout, file=file)
        try:
            # Longer than `timeout`, which prints every rank's stack.
            with process_group(2 * timeout) if init else nullcontext():
                result = fn(*args)
            # Plain pickle: multiprocessing's pickler shares a tensor's memory, which is freed when this process exits.
            writer.send_bytes(pickle.dumps((True, result)))
        except BaseException:
            writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _collect(readers: list[Connection], deadline: float, scratch: Path) -> list[Any]:
    """Results by rank. Raises AssertionError with the first rank's traceback, or with all stacks after the timeout."""
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [r for r in range(len(readers)) if r not in results]
            stacks = "\n".join(f"--- rank {r} ---\n{(scratch / f'stack-{r}').read_text()}" for r in late)
            raise AssertionError(f"the processes did not finish in time\n{stacks}")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.index(reader)
            try:
                succeeded, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]
