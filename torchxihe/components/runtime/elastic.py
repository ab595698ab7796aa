"""torchrun's agent for runs whose number of hosts changes (NNODES=2:4), and for the end of any run of several hosts.

torchrun's c10d rendezvous counts heartbeats and forms a new world; its agent restarts the workers when a host joins.
What it lacks is here: it does not restart them because a host is gone, restarts them after a user's mistake, cannot be
told to leave, and waits 300 s for a host that was lost after the last step.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    _RendezvousExitOp,
)
from torch.distributed.launcher import api

from torchxihe.components.runtime.hosts import Hosts
from torchxihe.errors import UserError
from torchxihe.utils.network import wait_for
from torchxihe.utils.processes import STOPPED, USER_MISTAKE, end_of

BACKEND = "torchxihe"
"""Name of the rendezvous below for torchrun."""
FINISHED = "finished"
NAME = f"host {socket.gethostname()}"
LAST_CALL_SECONDS = 5
"""How long a new world waits for more hosts once there are enough."""
HEARTBEAT_SECONDS, HEARTBEATS = 2, 5
"""A host without a heartbeat for this long, this many times, is lost."""
JOIN_AGAIN_SECONDS = 600
"""How long the store's host may refuse connections: it may be started again."""
END_SECONDS = 20
"""How long a host waits, after its last step, for those that have not reported theirs."""
SETTLED_SECONDS = 120
"""Workers that have lived this long do not count as a failed start."""


class LeavingError(RendezvousError):
    """This host was asked to stop: it leaves the run to the others."""


class Rendezvous(DynamicRendezvousHandler):
    """torchrun's rendezvous, which also notices a host that is gone, and can be left."""

    stopping: Callable[[], bool]
    """Whether this host was asked to stop."""
    broken = False
    """Whether this host has lost its connection, and not the run its end."""
    _size = 0

    def get_backend(self) -> str:
        """The name that torchrun knows it by."""
        return BACKEND

    @property
    def lost(self) -> bool:
        """Whether a host of the current world is gone, or the others take this one for gone."""
        state = self._state_holder.state
        return len(state.participants) < self._size or self._this_node not in state.participants

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next world. Raises LeavingError, RendezvousError."""
        if self.stopping():
            raise LeavingError
        self._size = 0
        info = super().next_rendezvous()
        self._size = info.world_size
        return info

    def num_nodes_waiting(self) -> int:
        """Hosts that want to join; a host that is gone counts as well, so that the agent forms a new world."""
        if waiting := super().num_nodes_waiting():
            return waiting
        if not self.lost:
            return 0
        state = self._state_holder.state
        own = self._this_node in state.participants
        gone = f"{self._size - len(state.participants)} of {self._size} hosts are lost" if own else "was given up"
        print(f"{NAME}: {gone}; forming a new world", file=sys.stderr, flush=True)
        return 1

    def shutdown(self) -> bool:
        """End the run for all hosts, or only leave it.

        torchrun calls this after every error. Where the connection was lost and is there again by now, the run of the
        other hosts would end.
        """
        if not self.stopping() and not self.broken:
            return super().shutdown()
        self._stop_heartbeats()
        if not self.stopping():
            return False
        try:
            self._op_executor.run(_RendezvousExitOp(), self._get_deadline(self._settings.timeout.close))
        except RendezvousError:
            return False
        return True


class Agent(LocalElasticAgent):
    """torchrun's agent."""

    _started, _world = 0.0, 0

    def __init__(self, finished: Callable[[], None], *args: Any, **options: Any) -> None:
        """`finished`: called when the workers of this host have succeeded."""
        super().__init__(*args, **options, exit_barrier_timeout=END_SECONDS)
        self._finished, self._most_restarts = finished, self._remaining_restarts

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Train. Raises RendezvousError and DistError where the connection to the other hosts is lost."""
        try:
            return super().run(role)  # pyright: ignore[reportCallIssue]
        except (RendezvousError, DistError):
            handler = self._worker_group.spec.rdzv_handler
            if isinstance(handler, Rendezvous):
                handler.broken = True
            raise

    def _exit_barrier(self) -> None:
        self._finished()
        super()._exit_barrier()

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        super()._initialize_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if worker_group.group_world_size != self._world:
            self._remaining_restarts = self._most_restarts
        self._started, self._world = time.monotonic(), worker_group.group_world_size or 0

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        result: RunResult = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.state == WorkerState.FAILED:
            if any(failure.exitcode == USER_MISTAKE for failure in result.failures.values()):
                self._remaining_restarts = 0  # it would be made again
            elif self._remaining_restarts and time.monotonic() - self._started > SETTLED_SECONDS:
                self._remaining_restarts = self._most_restarts
            rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
            if self._remaining_restarts and failure.exitcode != STOPPED:
                what = f"rank {rank} {end_of(failure.exitcode)}"
                print(f"{NAME}: {what}; forming a new world", file=sys.stderr, flush=True)
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kill them where a process or a host is gone: those that wait for it cannot agree to save."""
        handler = worker_group.spec.rdzv_handler
        if isinstance(handler, Rendezvous) and (handler.lost or worker_group.state == WorkerState.FAILED):
            self._shutdown(signal.SIGKILL)
        else:
            super()._stop_workers(worker_group)  # pyright: ignore[reportCallIssue]


def end_soon(finished: Callable[[], None] = lambda: None) -> None:
    """Have torchrun use this agent. `finished`: see there."""
    agent: Any = partial(Agent, finished)
    api.LocalElasticAgent = agent  # torchrun has no parameter for it


def _create(stopping: Callable[[], bool], params: RendezvousParameters) -> RendezvousHandler:
    backend, store = create_backend(params)
    handler = Rendezvous.from_backend(
        params.run_id,
        store,
        backend,
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        RendezvousTimeout(
            join=timedelta(seconds=params.get_as_int("join_timeout", 600) or 600),
            last_call=timedelta(seconds=LAST_CALL_SECONDS),
        ),
        keep_alive_interval=HEARTBEAT_SECONDS,
        keep_alive_max_attempt=HEARTBEATS,
    )
    handler.stopping = stopping
    return handler


def train_elastically(attempt: Callable[[], int], hosts: Hosts, stopping: Callable[[], bool]) -> int:
    """Run torchrun (`attempt`) until the run ends or this host leaves it; the exit code. Raises UserError.

    After a lost connection to the store it joins again. `stopping`: whether this host was asked to stop.
    """
    # Workers of the new rank 0 must not look for the old one's store: pytorch#135712.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    rendezvous_handler_registry.register(BACKEND, partial(_create, stopping))
    end_soon(lambda: hosts.note_end(FINISHED))
    while True:
        try:
            code = attempt()
            if code:
                hosts.note_end(f"{NAME} ended it; see its message")
            return code
        except LeavingError:
            print(f"{NAME} has left the run; the other hosts continue it", flush=True)
            return 0
        except RendezvousClosedError:
            how = hosts.read_end()
            if how == FINISHED:
                print(f"{NAME}: the run is finished", flush=True)
                return 0
            remedy = "start the store again, or set another RDZV_ID"
            raise UserError(
                f"RDZV_ENDPOINT={hosts.endpoint}: this run is over there: {how or 'its hosts have ended'}; {remedy}"
            ) from None
        except (RendezvousError, DistError) as error:
            if stopping():
                return 0
            print(f"{NAME} has lost the rendezvous ({type(error).__name__}); joins again", file=sys.stderr, flush=True)
            wait_for(hosts.endpoint, JOIN_AGAIN_SECONDS, hosts.link)
