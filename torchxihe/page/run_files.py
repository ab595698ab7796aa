"""What a run directory tells about its run: metrics, messages, samples, incidents, config, state.

Everything is read from files that another process may be writing, of bounded size, and may be damaged.
"""

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from torchxihe.components.observe.curves import Lines
from torchxihe.components.observe.metrics import METRICS, add_metrics
from torchxihe.config.options import Config
from torchxihe.utils.records import DamagedError, open_regular, read_stream
from torchxihe.utils.words import counted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_METRICS = 2**30
"""Bytes of metrics.jsonl that are read: a million steps."""
LARGEST_CONFIG = 2**20
MOST_RANKS = 16
"""Logs that are read."""
SILENT = 600.0
"""Seconds without a new line after which a run that did not end is called silent: it may have been killed."""

_MESSAGE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} rank (\d+) \[(.*?)\] ([A-Z]+) (.*)")
_SAMPLE = re.compile(r"sample at step (\d+):\n(.*)", re.DOTALL)
_TABLE = re.compile(r"(kernels|run|model|device|memory|batch|tokenizer|optimizer|plan|data) +(.*)")
_INCIDENTS = re.compile(
    r"resuming from|starting with the|stopped after step|.* was killed or crashed$"
    r"|.* (changes|is removed|is added)\b.* at step \d+$"
)
"""Messages that are neither warnings nor errors, but part of what happened to a run."""


@dataclass(frozen=True)
class Message:
    """A message in a log."""

    when: str
    rank: int
    phase: str
    level: str
    text: str


@dataclass(frozen=True)
class Incident:
    """Something that happened to a run, other than training."""

    when: str
    """Local time of the machine that trained; "": unknown."""
    kind: str
    """"warning", "error", "restart", "change", "skipped"."""
    text: str


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    state: str
    """"training", "silent" (no new line for `SILENT` seconds), "finished", "stopped" (it can be resumed)."""
    step: int
    total: int
    """Steps of the config; 0: unknown."""
    updated: float
    """Seconds since the epoch of the last change; 0: unknown."""


class RunFiles:
    """A run directory. An instance remembers what it has read of the metrics and reads only what is new."""

    def __init__(self, directory: Path, allowed: Callable[[Path], bool] = lambda path: True) -> None:
        """`allowed`: whether a file, its symbolic links resolved, may be read."""
        self.directory, self._allowed = directory, allowed
        self._train: dict[int, dict[str, float]] = {}
        self._valid: dict[int, dict[str, float]] = {}
        self._lock = threading.Lock()
        self._read, self._inode, self._begins = 0, 0, b""

    def metrics(self) -> tuple[Lines, Lines]:
        """As of `read_metrics`; none if there is no readable file. May be called from several threads."""
        with self._lock:
            return self._metrics()

    def _metrics(self) -> tuple[Lines, Lines]:
        try:
            with self._open(METRICS) as file:
                inode = os.fstat(file.fileno()).st_ino
                size, begins = os.fstat(file.fileno()).st_size, file.read(64)
                if inode != self._inode or size < self._read or not begins.startswith(self._begins):
                    self._train, self._valid, self._read = {}, {}, 0
                self._inode, self._begins = inode, begins
                file.seek(self._read)
                new = file.read(max(LARGEST_METRICS - self._read, 0))
        except (OSError, DamagedError):
            return [], []
        complete = new[: new.rfind(b"\n") + 1]  # the last line may be half written
        add_metrics(complete.decode(errors="replace").splitlines(), self._train, self._valid)
        self._read += len(complete)
        train, valid = self._train, self._valid
        return [train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)]

    def messages(self, tail: int, ranks: int = MOST_RANKS) -> list[Message]:
        """The messages in the last `tail` bytes of each log, in order of time."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.directory / "logs"))[:ranks]
        except OSError:
            return []
        found = [message for name in names for message in self._messages_of(f"logs/{name}", tail)]
        return sorted(found, key=lambda message: message.when)

    def _messages_of(self, name: str, tail: int) -> Iterator[Message]:
        try:
            with self._open(name) as file:
                file.seek(max(os.fstat(file.fileno()).st_size - tail, 0))
                lines = file.read(tail).decode(errors="replace").split("\n")
        except (OSError, DamagedError):
            return
        head, more = None, []
        for line in [*lines, None]:
            match = _MESSAGE.match(line) if line is not None else None
            if (match or line is None) and head:
                text = "\n".join([head[5], *more]).rstrip("\n")
                yield Message(head[1], int(head[2]), head[3], head[4], text)
            if match:
                head, more = match, []
            elif head and line is not None:
                more.append(line)

    def config_text(self) -> str:
        """config.toml; "" if there is none."""
        try:
            with self._open("config.toml") as file:
                return read_stream(file, LARGEST_CONFIG).decode(errors="replace")
        except (OSError, DamagedError):
            return ""

    def config(self) -> Config | None:
        """None if it is missing, damaged, or another version's."""
        try:
            return Config.model_validate(tomllib.loads(self.config_text()))
        except (ValidationError, ValueError, RecursionError):
            return None

    def status(self, train: Lines) -> Status:
        """`train`: training's lines of the metrics."""
        config, step = self.config(), int(train[-1]["step"]) if train else 0
        total = config.total_steps if config else 0
        times = [self._stat(name).st_mtime for name in (METRICS, "logs/rank-00000.log") if self._stat(name)]
        updated = max(times, default=0.0)
        holder = self._stat(".lock")  # has the name of a process while that trains, and after it was killed
        if holder and holder.st_size:
            state = "silent" if time.time() - updated > SILENT else "training"
        else:
            state = "finished" if total and step >= total else "stopped"
        return Status(state, step, total, updated)

    def changed(self) -> str:
        """A text that changes when one of the files does."""
        stats = [self._stat(name) for name in (METRICS, "logs/rank-00000.log", ".lock", "config.toml")]
        return " ".join(f"{stat.st_mtime_ns}-{stat.st_size}" if stat else "0" for stat in stats)

    def _stat(self, name: str) -> Any:
        """The stat result of a file; None if there is none."""
        try:
            return (self.directory / name).stat()
        except OSError:
            return None

    def _open(self, name: str) -> BinaryIO:
        """A file for reading. Raises OSError, DamagedError."""
        path = Path(os.path.realpath(self.directory / name))
        if not self._allowed(path):
            raise PermissionError(f"{path} is outside of the given directories")
        return open_regular(path)

    def may_read(self, path: Path) -> bool:
        """Whether a file or directory, its symbolic links resolved, may be read."""
        return self._allowed(Path(os.path.realpath(path)))


def samples(messages: list[Message]) -> list[tuple[int, str]]:
    """Step and text of the samples, the newest last; of a repeated step the later one."""
    found = {int(match[1]): match[2] for m in messages if (match := _SAMPLE.fullmatch(m.text))}
    return sorted(found.items())


def start_table(messages: list[Message]) -> list[tuple[str, str]]:
    """Name and value of the rows of the table that the last start logged, wrapped lines joined."""
    rows: list[tuple[str, str]] = []
    for message in messages:
        if message.rank or message.phase != "start" or message.level != "INFO":
            continue
        if match := _TABLE.fullmatch(message.text):
            if match[1] in ("kernels", "run") and any(name == match[1] for name, _ in rows):
                rows = []  # of an earlier start
            rows.append((match[1], match[2]))
        elif rows and message.text.startswith(" " * 11):
            rows[-1] = rows[-1][0], f"{rows[-1][1]} {message.text.strip()}"
    return rows


def incidents(messages: list[Message], train: Lines, corrupt: dict[str, str]) -> list[Incident]:
    """What happened, in order of time; repeated warnings once. corrupt: reasons by checkpoint."""
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for message in messages:
        text = kind = ""
        if message.level in ("WARNING", "ERROR", "CRITICAL"):
            kind, text = message.level.lower().replace("critical", "error"), message.text
        elif message.text.startswith("ended by an error\n"):
            kind, text = "error", message.text.rstrip().rsplit("\n", 1)[-1]
        elif message.rank == 0 and message.level == "INFO" and _INCIDENTS.match(message.text):
            kind, text = "change" if " at step " in message.text else "restart", message.text
        if text:
            first, count = found.get((kind, text), (message.when, 0))
            found[kind, text] = first, count + 1
    listed = [
        Incident(when, kind, f"{text} ({count} times)" if count > 1 else text)
        for (kind, text), (when, count) in found.items()
    ]
    listed += _skipped(train)
    listed += [Incident("", "error", f"{name} is marked corrupt: {reason}") for name, reason in corrupt.items()]
    return sorted(listed, key=lambda incident: incident.when)


def _skipped(train: Lines) -> Iterator[Incident]:
    """Skipped steps; consecutive log intervals that have some are one incident."""
    before = 0
    for bad, group in itertools.groupby(train, key=lambda line: line.get("skipped", 0) > 0):
        lines = list(group)
        last = lines[-1]
        if bad:
            when = ""
            if 0 < last.get("time", 0) < 1e11:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last["time"]))
            count = counted(round(min(sum(line["skipped"] for line in lines), 1e15)), "step")
            yield Incident(when, "skipped", f"{count} skipped after step {before:,}, up to step {int(last['step']):,}")
        before = int(last["step"])
