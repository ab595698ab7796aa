"""starts.jsonl in a run directory: a line for every start and every orderly end, with the hosts that took part."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt

from torchxihe.utils.records import DamagedError, Record, parse_record, read_bounded

STARTS = "starts.jsonl"


class Start(Record):
    """A line of starts.jsonl."""

    event: Literal["start", "end"]
    time: FiniteFloat
    """Seconds since the epoch."""
    step: NonNegativeInt
    """Steps that were completed then."""
    hosts: dict[str, list[int]] = Field(default_factory=dict)
    """Of a start: the ranks on each host."""
    why: str = ""
    """Of an end: "finished", or why the run was stopped."""


@dataclass(frozen=True)
class Noted:
    """Writes them, on rank 0."""

    run_dir: Path

    def start(self, step: int, hosts: list[str]) -> None:
        """`hosts`: the host of every rank. Raises OSError."""
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            ranks.setdefault(host, []).append(rank)
        self._append(Start(event="start", time=round(time.time(), 3), step=step, hosts=ranks))

    def end(self, step: int, why: str) -> None:
        """Raises OSError."""
        self._append(Start(event="end", time=round(time.time(), 3), step=step, why=why))

    def _append(self, line: Start) -> None:
        with (self.run_dir / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line.model_dump(exclude_defaults=True)) + "\n")


def read_starts(run_dir: Path) -> list[Start]:
    """In order of time; damaged lines are skipped."""
    found: list[Start] = []
    try:
        lines = read_bounded(run_dir / STARTS).splitlines()
    except (OSError, DamagedError):
        return found
    for line in lines:
        try:
            found.append(parse_record(line, Start))
        except DamagedError:
            continue
    return found
