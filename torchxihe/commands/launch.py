"""Prepare the data and train on every GPU of this machine, or of several: what run_train.sh runs."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from torchxihe.components.checkpoint.history import check_changes
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.parsers import parse
from torchxihe.utils.network import find_link, job_name, use_link
from torchxihe.utils.processes import ELASTIC, HOSTS, LAUNCHER, SIGNALS, USER_MISTAKE, end_of
from torchxihe.utils.words import counted

if TYPE_CHECKING:
    from torchxihe.components.runtime.hosts import Hosts

READ_SECONDS = 30
"""How long a machine of an elastic run waits for an answer of the store."""
MAX_RESTARTS = 10
"""Failed starts in a row of an elastic run, on the same number of machines, that end it."""
JOIN_SECONDS = 86_400
"""How long machines wait for each other at the start: `prepare` may take hours longer on one of them."""


@dataclass(frozen=True)
class Launch:
    """The processes of a run and their machines."""

    processes: int
    """On this machine."""
    nodes: int
    """At most."""
    node_rank: int
    """-1: unknown."""
    endpoint: str
    """host:port of node 0. "": a single machine."""
    least_nodes: int = 0
    """Number of machines with which an elastic run goes on; 0: always `nodes`."""

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.processes * self.nodes

    @property
    def world_sizes(self) -> list[int]:
        """All numbers of processes that the run may have, the largest first."""
        return [self.processes * nodes for nodes in range(self.nodes, (self.least_nodes or self.nodes) - 1, -1)]

    def torchrun_args(self, *, address: str = "", hosting: bool = False) -> list[str]:
        """The arguments for torchrun. `address` of this machine; `hosting`: whether the store is here."""
        nodes = f"{self.least_nodes}:{self.nodes}" if self.least_nodes else f"{self.nodes}"
        args = [f"--nproc-per-node={self.processes}", f"--nnodes={nodes}", f"--log-dir={os.devnull}"]
        if self.nodes == 1:
            return [*args, "--standalone"]
        args += [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={job_name()}", f"--local-addr={address}"]
        if self.least_nodes:
            waits = f"join_timeout={JOIN_SECONDS},read_timeout={READ_SECONDS},is_host={int(hosting)}"
            return [*args, "--rdzv-backend=torchxihe", f"--rdzv-conf={waits}", f"--max-restarts={MAX_RESTARTS}"]
        if self.node_rank >= 0:
            return [
                *args,
                "--rdzv-backend=static",
                f"--node-rank={self.node_rank}",
                f"--rdzv-conf=timeout={JOIN_SECONDS}",
            ]
        waits = f"join_timeout={JOIN_SECONDS},read_timeout={JOIN_SECONDS},is_host={int(hosting)}"
        return [*args, "--rdzv-backend=c10d", f"--rdzv-conf={waits}"]


def main(args: list[str]) -> None:
    """Check the config for this many processes, prepare, train; ends the process with the run's exit code."""
    options = parse("launch", args)
    launch = read_environment()
    configs = [load_config(options.config, options.overrides, world_size) for world_size in launch.world_sizes]
    config = configs[0]
    check_changes(config)
    args = [options.config, *options.overrides]
    forwarding = Forwarding(elastic=launch.least_nodes > 0)
    hosts = _meet(launch, config) if launch.nodes > 1 else None
    _prepare(args)
    forwarding.end_if_stopped()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    if launch.world_size == 1:
        # Without torchrun: several seconds less, and the trainer gets the signals and gives the exit code itself.
        os.execv(sys.executable, [*_command("train"), *args])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // launch.processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    command = ["-m", "torchxihe", "train", *args]
    if hosts is None:
        sys.exit(torchrun([*launch.torchrun_args(), *command], forwarding))
    os.environ[HOSTS] = "1"
    arguments = [*launch.torchrun_args(address=hosts.link.address, hosting=hosts.hosting), *command]
    # Imported here because it imports torch, as below.
    from torchxihe.components.runtime.elastic import end_soon, train_elastically

    if launch.least_nodes:
        os.environ[ELASTIC] = f"{job_name()}@{launch.endpoint}"
        sys.exit(train_elastically(lambda: torchrun(arguments, forwarding), hosts, lambda: forwarding.stopped))
    end_soon()
    sys.exit(torchrun(arguments, forwarding))


def _meet(launch: Launch, config: Config) -> "Hosts":
    """Find the interface that reaches the other hosts, and check that all will run the same. Raises UserError."""
    link = find_link(launch.endpoint)
    use_link(link)
    print(f"host {socket.gethostname()}: {link.interface} ({link.address}) reaches {launch.endpoint}", flush=True)
    # Imported here because it imports torch: a mistake above is reported without that delay.
    from torchxihe.components.runtime.hosts import Party, meet

    cache = {} if config.data.remote else {"data.cache_dir": Path(config.data.cache_dir)}
    party = Party(
        endpoint=launch.endpoint,
        job=job_name(),
        hosts=0 if launch.least_nodes else launch.nodes,
        node_rank=-1 if launch.least_nodes else launch.node_rank,
        config=config.model_dump(mode="json"),
        shared={"run.dir": config.run_dir} | cache,
        join_seconds=JOIN_SECONDS,
    )
    return meet(party, link)


class Forwarding:
    """Passes signals on to this process's children, from a thread that waits for them.

    The main thread blocks them, and so do the children until they handle them (`torchxihe.__main__.main`): no signal is
    lost, and none interrupts Python while it starts.
    """

    def __init__(self, *, elastic: bool) -> None:
        """`elastic`: the children are started again."""
        self._stopped, self._over, self.elastic = 0, False, elastic
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)  # gets the number, whichever thread the signal is delivered to
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def child_ended(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGCHLD: once a training process has ended, signals no longer change the exit code."""
        self._over = not self.elastic

    @property
    def stopped(self) -> bool:
        """Whether a signal came."""
        return self._stopped > 0

    def end_if_stopped(self) -> None:
        """End this process if a signal came while `prepare` ran, even if that had already finished."""
        if self._stopped:
            _interrupt(self._stopped)

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while True:
            number = os.read(self._read, 1)[0]
            if number not in SIGNALS:
                continue
            self._stopped = number
            tasks = Path("/proc/self/task").glob("*/children")
            children = [int(pid) for task in tasks for pid in task.read_text().split()]
            for pid in children:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)
            if not children:
                time.sleep(0.2)  # the main thread may be about to learn that its children have ended
                if not self._over:
                    _interrupt(number)


def _interrupt(number: int) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def read_environment() -> Launch:
    """The launch that the environment asks for, one process per GPU if it does not say."""
    processes = _number("NGPU", "PET_NPROC_PER_NODE")
    gpus = _gpu_count()
    if gpus and processes > gpus:
        raise UserError(f"NGPU={processes}: this machine has {counted(gpus, 'GPU')}")
    least_nodes, nodes = _node_counts()
    node_rank = _number("NODE_RANK", "PET_NODE_RANK", default=-1, least=0)
    endpoint = _first("RDZV_ENDPOINT", "PET_RDZV_ENDPOINT")
    if not endpoint and (host := _first("MASTER_ADDR", "PET_MASTER_ADDR")):
        endpoint = f"{host}:{_first('MASTER_PORT', 'PET_MASTER_PORT') or 29500}"
    if nodes > 1 and not endpoint:
        raise UserError(f"NNODES={nodes}: needs RDZV_ENDPOINT=host:port, by which the machines find machine 0")
    if node_rank >= nodes:
        raise UserError(f"NODE_RANK={node_rank}: must be below NNODES={nodes}; machines are counted from 0")
    if endpoint and ":" not in endpoint:
        endpoint += ":29500"
    return Launch(processes or gpus or 1, nodes, node_rank, endpoint if nodes > 1 else "", least_nodes)


def _node_counts() -> tuple[int, int]:
    """The least number of machines (0: fixed) and the largest."""
    text = _first("NNODES", "PET_NNODES")
    least, _, most = text.partition(":")
    if not most:
        return 0, _number("NNODES", "PET_NNODES", default=1)
    if not (least.isdecimal() and most.isdecimal() and 0 < int(least) <= int(most)) or int(most) < 2:
        raise UserError(f"NNODES={text}: must be a number, or LEAST:MOST, such as 2:4")
    return int(least), int(most)


def torchrun(args: list[str], forwarding: Forwarding) -> int:
    """Run torchrun in this process; its exit code.

    In this process and not as a program of its own for two reasons. As a program it ends every worker 30 s after a
    signal and then exits with 1 however they ended; here only the workers get the signal, and it waits for them. And it
    prints a page after a worker's error message; here it is silent, and only a worker that was killed is reported.
    """
    # Imported here because it imports torch: a mistake in the config is reported without that delay.
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)
    signal.signal(signal.SIGCHLD, forwarding.child_ended)
    try:
        run(parse_args(["--signals-to-handle=SIGQUIT", *args]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (1, USER_MISTAKE):
            print(f"rank {rank} (process {failure.pid}) {end_of(failure.exitcode)}", file=sys.stderr)
        return 1
    except (RendezvousError, DistError) as error:
        if forwarding.elastic:
            raise  # may be met again with another attempt
        raise UserError(f"RDZV_ENDPOINT: the machines did not find each other: {error}") from None
    return 0


def _prepare(args: list[str]) -> None:
    """Run `prepare` to its end; ends this process if it fails, after it has printed why.

    On every machine: where they share the cache, its lock makes all but one wait, and these find the data prepared.
    """
    # In a session of its own, so that it gets Ctrl-C once: from here.
    environment = os.environ | {LAUNCHER: str(os.getpid())}
    prepare = subprocess.Popen([*_command("prepare"), *args], start_new_session=True, env=environment)
    code = prepare.wait()
    if code < 0:
        print(f"prepare {end_of(code)}", file=sys.stderr)
        sys.exit(128 - code)
    if code:
        sys.exit(code)


def _command(name: str) -> list[str]:
    return [sys.executable, "-u", "-m", "torchxihe", name]


def _gpu_count() -> int:
    """GPUs of this machine that torch can use."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    # Imported only where there is a driver: it takes seconds, and the training processes will want it cached anyway.
    import torch

    return torch.cuda.device_count()


def _first(*names: str) -> str:
    """The first of these environment variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _number(*names: str, default: int = 0, least: int = 1) -> int:
    """The first of these environment variables that is set, as a whole number; torchrun's "auto" is the default."""
    text = _first(*names)
    if not text or text in ("auto", "gpu", "cpu"):
        return default
    if not text.isdecimal() or int(text) < least:
        name = next(name for name in names if os.environ.get(name))
        raise UserError(f"{name}={text}: must be a whole number, {least} or more")
    return int(text)
