"""Before a run of several hosts starts: do they reach each other, and will they run the same thing?

Every host registers in a store, in the order of arrival. The hosts that came before answer it: with the time on their
clock, what they run, whether they see the files that it wrote, and whether they can connect to it. The newcomer
compares, and publishes its verdict. A fixed number of hosts waits for the verdicts of all, and one bad verdict ends
them all; in an elastic run only the newcomer ends.
"""

import atexit
import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from torchxihe.errors import UserError
from torchxihe.utils.network import Link, is_open, split_endpoint, wait_for

POLL_SECONDS = 0.3
ANSWER_SECONDS = 30.0
"""How long hosts of a fixed number may take to answer."""
ELASTIC_ANSWER_SECONDS = 3.0
"""How long a newcomer listens in an elastic run, where some of those before it may be gone."""
CLOCK_SECONDS = 3.0
"""How far clocks may be apart; by torchrun's heartbeats a host is dead after 10 s."""


@dataclass(frozen=True)
class Party:
    """What this host is about to run, and with whom."""

    endpoint: str
    job: str
    """Distinguishes runs that use one store."""
    hosts: int
    """How many are waited for; 0: any number (elastic)."""
    node_rank: int
    """-1: unknown."""
    config: dict[str, Any]
    """Must be the same on all hosts."""
    shared: dict[str, Path]
    """Directories that all hosts must share, by option."""
    join_seconds: float


@dataclass(frozen=True)
class Hosts:
    """The result: how this host takes part in the run."""

    link: Link
    endpoint: str
    hosting: bool
    """Whether the store is in this process."""
    job: str
    store: TCPStore
    """Kept, so that it serves as long as this process lives."""

    def note_end(self, how: str) -> None:
        """Tell hosts that come later how the run has ended."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            self._connect().set("end", how)

    def read_end(self) -> str:
        """How the run has ended; "" if nobody has said."""
        with contextlib.suppress(RuntimeError):
            store = self._connect()
            return store.get("end").decode() if store.check(["end"]) else ""
        return ""

    def _connect(self) -> PrefixStore:
        """Anew: an earlier connection may be broken."""
        return connect(self.endpoint, self.job)


@dataclass
class _Presence:
    """This host as the others see it."""

    number: int
    facts: dict[str, Any]
    store: Store
    marks: list[Path] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


def code_hash() -> str:
    """Of the package's sources."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def open_store(endpoint: str, link: Link, *, hosting: bool, join_seconds: float) -> TCPStore:
    """The store at `endpoint`: made here, or waited for. Raises UserError."""
    host, port = split_endpoint(endpoint)
    try:
        if not hosting:
            wait_for(endpoint, join_seconds, link)
        # multi_tenant: torchrun's own store at this endpoint will be the same server
        return TCPStore(
            host,
            port,
            is_master=hosting,
            multi_tenant=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=ANSWER_SECONDS),
        )
    except RuntimeError as error:
        raise UserError(
            f"RDZV_ENDPOINT={endpoint}: host {socket.gethostname()}: {str(error).splitlines()[0]}"
        ) from None


def connect(endpoint: str, job: str) -> PrefixStore:
    """The part of the store at `endpoint` that is for this. Raises RuntimeError."""
    host, port = split_endpoint(endpoint)
    timeout = timedelta(seconds=ANSWER_SECONDS)
    return PrefixStore(
        f"torchxihe/{job}", TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    )


def check_in(party: Party, link: Link, store: TCPStore) -> None:
    """Register, be answered, judge, and answer those that come later, in a thread. Raises UserError naming the host."""
    shared = PrefixStore(f"torchxihe/{party.job}", store)
    listener = socket.create_server((link.address, 0), backlog=1024, family=_family(link.address))
    threading.Thread(target=_accept, args=(listener,), name="accept", daemon=True).start()
    me = _Presence(shared.add("hosts", 1), _facts(party, link, listener), shared)
    others = party.hosts or sys.maxsize
    if me.number > others:
        raise UserError(
            f"NNODES={party.hosts}: host {me.facts['host']} is number {me.number} at {party.endpoint}; stop what runs "
            "there, or set another RDZV_ID"
        )
    try:
        with _marked(party, me):
            before = time.time()
            shared.set(f"host/{me.number}", json.dumps(me.facts))
            answering = threading.Thread(target=_answer_later_hosts, args=(party, me), name="hosts", daemon=True)
            answering.start()
            # Python's exit ends a thread that is inside the store's C++ code by an abort.
            atexit.register(lambda: (me.ended.set(), answering.join()))
            verdict = _judge(me, _answers(party, me), before)
    except UserError as error:
        verdict = str(error)
    shared.set(f"verdict/{me.number}", verdict or "same")
    if not verdict and party.hosts:
        verdict = _first_bad_verdict(party, me)
    if party.hosts:
        time.sleep(3 * POLL_SECONDS)  # where this host holds the store, the others still read from it
    if verdict:
        raise UserError(verdict)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _facts(party: Party, link: Link, listener: socket.socket) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "address": link.address,
        "interface": link.interface,
        "port": listener.getsockname()[1],
        "node_rank": party.node_rank,
        "code": code_hash(),
        "torch": torch.__version__,
        "config": party.config,
    }


@contextlib.contextmanager
def _marked(party: Party, me: _Presence) -> Iterator[None]:
    """Inside, each shared directory has a file of this host's. Raises UserError."""
    me.facts["marks"] = {}
    try:
        for option, folder in party.shared.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mark = folder / f".host-{uuid.uuid4().hex}"
                mark.touch()
            except OSError as error:
                raise UserError(f"{option}: {folder}: host {me.facts['host']}: {error.strerror}") from None
            me.marks.append(mark)
            me.facts["marks"][option] = mark.name
        yield
    finally:
        for mark in me.marks:
            mark.unlink(missing_ok=True)


def _accept(listener: socket.socket) -> None:
    while True:
        with contextlib.suppress(OSError):
            listener.accept()[0].close()


def _answer_later_hosts(party: Party, me: _Presence) -> None:
    """In a thread, as long as this process lives."""
    seen = me.number
    while not me.ended.wait(POLL_SECONDS):
        try:
            while me.store.add("hosts", 0) > seen and me.store.check([f"host/{seen + 1}"]):
                other = json.loads(me.store.get(f"host/{seen + 1}"))
                me.store.set(f"answer/{seen + 1}/{me.number}", json.dumps(_answer(party, me, other)))
                seen += 1
        except RuntimeError:  # the connection to the store is lost
            if party.hosts:
                return
            with contextlib.suppress(RuntimeError):
                me.store = connect(party.endpoint, party.job)


def _answer(party: Party, me: _Presence, other: dict[str, Any]) -> dict[str, Any]:
    now = time.time()
    unseen = [option for option, name in other["marks"].items() if not _appears(party.shared[option] / name)]
    facts = {key: value for key, value in me.facts.items() if key != "marks"}
    return facts | {"time": now, "unseen": unseen, "error": _connect(other)}


def _appears(mark: Path) -> bool:
    """Network file systems show a new file after a moment."""
    for _ in range(5):
        if mark.exists():
            return True
        time.sleep(0.2)
    return False


def _connect(other: dict[str, Any]) -> str:
    """Why this host cannot connect to another; "" if it can."""
    try:
        return "" if is_open(other["address"], other["port"], 5.0) else "connection refused"
    except OSError as error:
        return "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)


def _answers(party: Party, me: _Presence) -> list[dict[str, Any]]:
    """What the hosts that came before say."""
    missing, answers = list(range(1, me.number)), list[dict[str, Any]]()
    deadline = time.monotonic() + (ANSWER_SECONDS if party.hosts else ELASTIC_ANSWER_SECONDS)
    while missing and time.monotonic() < deadline:
        time.sleep(0.05)
        for number in list(missing):
            if me.store.check([key := f"answer/{me.number}/{number}"]):
                answers.append(json.loads(me.store.get(key)) | {"received": time.time()})
                missing.remove(number)
    if missing and party.hosts:
        name = json.loads(me.store.get(f"host/{missing[0]}"))["host"]
        raise UserError(f"host {name} does not answer host {me.facts['host']}; is it still running?")
    return answers


def _judge(me: _Presence, answers: list[dict[str, Any]], before: float) -> str:
    """The first thing that is wrong with this host; "" if nothing is."""
    mine = me.facts
    here = f"host {mine['host']}"
    for other in answers:
        there = f"host {other['host']}"
        link = f"{mine['address']}, {mine['interface']}"
        if other["error"]:
            remedy = "open the ports between the hosts, or set GLOO_SOCKET_IFNAME to the interface that reaches them"
            return f"{here} ({link}): {there} cannot connect to it: {other['error']}; {remedy}"
        if error := _connect(other):
            link = f"{other['address']}, {other['interface']}"
            remedy = "open the ports between the hosts, or set GLOO_SOCKET_IFNAME to the interface that reaches them"
            return f"{here} cannot connect to {there} ({link}): {error}; {remedy}"
        if mine["node_rank"] == other["node_rank"] >= 0:
            return f"{here}: NODE_RANK={mine['node_rank']} is that of {there}, too; number the hosts from 0"
        for what, remedy in (
            ("code", "use one checkout, or the same commit"),
            ("torch", "install the same version on all hosts"),
        ):
            if mine[what] != other[what]:
                name = "torchxihe's code" if what == "code" else what
                return f"{here} has {name} {mine[what]}, {there} has {other[what]}; {remedy}"
        if keys := _differences(mine["config"], other["config"]):
            key, values = keys[0], [_value(facts["config"], keys[0]) for facts in (mine, other)]
            return (
                f"{here} has {key} = {values[0]}, {there} has {values[1]}; give all hosts the same config and options"
            )
        if (ahead := _ahead(before, other["time"], other["received"])) and abs(ahead) > CLOCK_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            return f"{here}: its clock is {abs(ahead):.0f} s {way} that of {there}; synchronise them (NTP)"
        for option in other["unseen"]:
            return f"{option}: {there} does not see what {here} wrote there; put it where all hosts share it"
    return ""


def _ahead(before: float, time_there: float, after: float) -> float:
    """Seconds by which the clock here is at least ahead of that of an answer between `before` and `after`."""
    return before - time_there if before > time_there else min(after - time_there, 0.0)


def _differences(mine: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ."""
    keys = list[str]()
    for key in sorted(mine.keys() | other.keys()):
        a, b = mine.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys


def _value(config: dict[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return json.dumps(value)[:100]


def _first_bad_verdict(party: Party, me: _Presence) -> str:
    """Wait until all hosts have come, or one has found something wrong: then what; "" if nothing is."""
    start, said, here = time.monotonic(), time.monotonic(), f"host {me.facts['host']}"
    waiting = set(range(1, party.hosts + 1))
    while waiting:
        try:
            for number in sorted(waiting):
                if me.store.check([f"verdict/{number}"]):
                    verdict = me.store.get(f"verdict/{number}").decode()
                    if verdict != "same":
                        return verdict
                    waiting.remove(number)
            come = int(me.store.add("hosts", 0))
        except RuntimeError:
            return f"{here}: the host of RDZV_ENDPOINT={party.endpoint} has ended; see its message"
        now = time.monotonic()
        if now - start > party.join_seconds:
            return f"NNODES={party.hosts}: only {party.hosts - len(waiting)} hosts came; start the others"
        if waiting and now - said > 20:
            print(f"{here} waits: {come} of {party.hosts} hosts have come", file=sys.stderr, flush=True)
            said = now + 100
        time.sleep(POLL_SECONDS)
    return ""


def meet(party: Party, link: Link) -> Hosts:
    """Open the store, here if this host has to, and `check_in`. Raises UserError."""
    host, port = split_endpoint(party.endpoint)
    here = party.node_rank == 0
    if party.node_rank < 0 and link.is_own:
        with contextlib.suppress(OSError):
            here = not is_open(host, port, 5.0)
    store = open_store(party.endpoint, link, hosting=here, join_seconds=party.join_seconds)
    check_in(party, link, store)
    return Hosts(link, party.endpoint, here, party.job, store)
