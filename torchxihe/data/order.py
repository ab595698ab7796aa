"""The data order: the row of sample number g is a pure function of the seed and g, so resuming takes no time.

Samples are counted from 0 over the run. A *stage* is an interval of steps with one mixture, one batch size and one
seed. Within a stage, samples come in blocks of 2048 in which every source has a fixed quota, evenly interleaved. The
n-th sample of a source is row `permute(seed, source, epoch, i)` with `epoch, i = divmod(n, rows)`. The samples that
were read of a source are always a prefix of this sequence; a stage records the length of the prefix at its start.
`docs/data_format.md` is the reference.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from torchxihe.config.options import Config
from torchxihe.data.store import Prepared
from torchxihe.errors import UserError

BLOCK = 2048
"""Number of samples in which the mixture is exact."""


@dataclass(frozen=True)
class Stage:
    """An interval of the run in which nothing about the order changes."""

    g: int
    """Number of its first sample."""
    step: int
    """Its first optimizer step."""
    global_batch: int
    """Samples per step."""
    seed: int
    sources: tuple[str, ...]
    """Content key of each source."""
    quotas: tuple[int, ...]
    """Samples of each source in a block; they sum to 2048."""
    first: tuple[int, ...]
    """Samples of each source that earlier stages have read."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Stage":
        """The stage that `to_json` wrote."""
        lists = ("sources", "quotas", "first")
        return cls(**{**values, **{name: tuple(values[name]) for name in lists}})

    def first_sample(self, step: int) -> int:
        """Number of the first sample of `step`, which must not lie in a later stage."""
        return self.g + (step - self.step) * self.global_batch

    def consumed(self, g: int) -> tuple[int, ...]:
        """Samples of each source before sample `g`, counted from the start of the run."""
        block, p = divmod(g - self.g, BLOCK)
        before = np.bincount(pattern(self.quotas)[0][:p], minlength=len(self.quotas))
        taken = zip(self.first, self.quotas, before.tolist(), strict=True)
        return tuple(first + block * quota + turns for first, quota, turns in taken)


@lru_cache
def pattern(quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Source of each of a block's samples, and how many of that source came before it in the block (int64 [2048])."""
    counts = np.array(quotas)
    source = np.repeat(np.arange(len(counts)), counts)
    turn = np.concatenate([np.arange(count) for count in quotas])
    # Sample k of n is placed in the middle of the k-th of n equal parts of the block. The sort is stable: ties go by
    # source. Equal fractions give equal floats, and different ones differ by more than 1e-8.
    order = np.argsort((turn + 0.5) / counts[source], kind="stable")
    return source[order], turn[order]


def make_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in a block, in the order of `weights`: shares of 2048 by largest remainder.

    Weights count as the decimal numbers that they are written as, and the shares are exact fractions: of equal
    remainders, the earlier source's comes first. Raises UserError if a share is rounded to 0.
    """
    decimal = [Fraction(repr(weight)) for weight in weights]
    shares = [weight * BLOCK / sum(decimal) for weight in decimal]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: BLOCK - sum(quotas)]:
        quotas[i] += 1
    for i, quota in enumerate(quotas):
        if not quota:
            least = f"{float((sum(decimal) - decimal[i]) / (BLOCK - 1)):.3g}"
            raise UserError(
                f"data.sources.{i}.weight: {weights[i]:g} is less than one sample in {BLOCK}; with the other sources' "
                f"weights, {least} is one sample: raise it to at least that, or remove the source"
            )
    return tuple(quotas)


def _read_of(stages: Sequence[Stage], g: int) -> dict[str, int]:
    """How many samples of each source the stages have read before sample `g`, by content key."""
    read: dict[str, int] = {}
    for stage, end in zip(stages, [*(following.g for following in stages[1:]), g], strict=True):
        read |= zip(stage.sources, stage.consumed(end), strict=True)
    return read


def next_stage(previous: Sequence[Stage], config: Config, prepared: Prepared, step: int) -> Stage:
    """The stage that `config` asks for from `step` on, after `previous` (all of the run's stages, in order).

    A source resumes after the last row that was read of it, even if it was left out in between; one that was never
    read starts at its first row (`changed_sources` reports which).
    """
    keys = tuple(source.key for source in prepared.sources)
    g = previous[-1].first_sample(step) if previous else 0
    read = _read_of(previous, g) if previous else {}
    quotas = make_quotas([source.weight for source in prepared.sources])
    first = tuple(read.get(key, 0) for key in keys)
    return Stage(g, step, config.batch_size(step), config.training.seed, keys, quotas, first)


def changed_sources(saved: Sequence[Stage], prepared: Prepared, step: int) -> list[str]:
    """How the sources differ from those of the last step of a run that resumes at `step`: a line for each.

    Sources are compared by content key: changed documents, templates or tokenizers count, even with the same config.
    """
    stages = [stage for stage in saved if stage.step < step]
    if not stages:
        return []
    read = _read_of(stages, stages[-1].first_sample(step))
    keys = [source.key for source in prepared.sources]
    lines = [
        f"data.sources: the source with content key {key}, of which {read[key]:,} rows have been read, is removed from "
        "the mixture"
        for key in stages[-1].sources
        if key not in keys
    ]
    for i, source in enumerate(prepared.sources):
        if source.key not in read:
            lines.append(
                f"data.sources.{i} ({source.name}): this content (key {source.key}) has not been read before: it "
                "starts at its first row"
            )
    return lines


def plan_stages(config: Config, prepared: Prepared, saved: Sequence[Stage] = (), step: int = 0) -> tuple[Stage, ...]:
    """The stages of a run that starts or resumes at `step` with `config`, up to its last step.

    Stages of `saved` that began before `step` stay. A new one follows where anything differs from the one before: at
    `step`, and at each step of a batch-size ramp.
    """
    stages = tuple(stage for stage in saved if stage.step < step)
    what = ("global_batch", "seed", "sources", "quotas")
    for start in (step, *(until for _, until in config.training.batch_ramp if step < until < config.total_steps)):
        wanted = next_stage(stages, config, prepared, start)
        if not stages or any(getattr(stages[-1], name) != getattr(wanted, name) for name in what):
            stages = (*stages, wanted)
    return stages


def check_epochs(config: Config, prepared: Prepared, order: "Order") -> None:
    """Raise UserError if the run reads a source more than `data.max_epochs` times."""
    most = config.data.max_epochs
    for i, (name, epochs) in enumerate(zip(prepared.names, order.epochs(config.total_steps), strict=True)):
        if most and epochs > most:
            raise UserError(
                f"data.max_epochs: the run would read data.sources.{i} ({name}) {epochs:.2f} times, more than {most}; "
                "shorten the run, lower the weight of that source, or raise data.max_epochs"
            )


class Order:
    """The source and row of every sample of a run."""

    def __init__(self, stages: Sequence[Stage], rows: Mapping[str, int]) -> None:
        """`rows`: training rows by content key, in the order of the sources that `samples` numbers."""
        self.stages = tuple(stages)
        self._keys = list(rows)
        self._rows = np.array(list(rows.values()), np.int64)

    def stage_at(self, g: int) -> Stage:
        """The stage that sample `g` belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.g <= g)

    def batch(self, step: int) -> tuple[int, int]:
        """Number of the first sample of `step`, and how many samples the step has."""
        stage = next(stage for stage in reversed(self.stages) if stage.step <= step)
        return stage.first_sample(step), stage.global_batch

    def epochs(self, step: int) -> list[float]:
        """How many epochs of each source the steps before `step` read, in the order that `samples` numbers."""
        g = self.batch(step)[0]
        stage = self.stage_at(g)
        consumed = dict(zip(stage.sources, stage.consumed(g), strict=True))
        return [consumed.get(key, 0) / rows for key, rows in zip(self._keys, self._rows.tolist(), strict=True)]

    def describe(self, step: int, names: list[str]) -> str:
        """The sample numbers of the global batch of `step` and the names of their sources, as text."""
        first, size = self.batch(step)
        sources = sorted(set(self.samples(np.arange(first, first + size))[0].tolist()))
        return f"samples g = {first} to {first + size - 1} from {', '.join(names[i] for i in sources)}"

    def sample(self, g: int) -> tuple[int, int]:
        """Source and row of sample `g`."""
        source, row, _ = self.samples(np.array([g]))
        return int(source[0]), int(row[0])

    def samples(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, row and epoch (int64 [n] each) of the samples `g` (int64 [n]), which must lie in one stage."""
        stage = self.stage_at(int(g[0]))
        place = np.array([self._keys.index(key) for key in stage.sources])
        sources, turns = pattern(stage.quotas)
        block, p = np.divmod(g - stage.g, BLOCK)
        local = sources[p]
        n = np.array(stage.first)[local] + block * np.array(stage.quotas)[local] + turns[p]
        source = place[local]
        epoch, i = np.divmod(n, self._rows[source])
        row = np.empty_like(i)
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            here = (source == s) & (epoch == e)
            row[here] = permute(stage.seed, self._keys[s], e, i[here], int(self._rows[s]))
        return source, row, epoch


def permute(seed: int, source_key: str, epoch: int, i: np.ndarray, rows: int) -> np.ndarray:
    """The image of `i` (int64 [n]) under a keyed pseudo-random permutation of range(rows).

    A Feistel network over pairs (left, right) of mixed radix, so that its domain is hardly larger than `rows`: eight
    half rounds, each adding the splitmix64 finaliser of one half to the other. A result of `rows` or more is mapped
    again until it is less (cycle walking), so the map is a permutation of range(rows).
    """
    radix = max(1, int(np.ceil(np.sqrt(rows))))
    sizes = np.uint64(radix), np.uint64(-(-rows // radix))
    keys = _round_keys(seed, source_key, epoch)
    out = i.astype(np.uint64)
    pending = np.arange(len(out))
    while len(pending):
        left, right = np.divmod(out[pending], sizes[1])
        for k in range(0, len(keys), 2):
            left = (left + _mix(right + keys[k]) % sizes[0]) % sizes[0]
            right = (right + _mix(left + keys[k + 1]) % sizes[1]) % sizes[1]
        out[pending] = left * sizes[1] + right
        pending = pending[out[pending] >= rows]
    return out.astype(np.int64)


@lru_cache(maxsize=1024)
def _round_keys(seed: int, source_key: str, epoch: int) -> np.ndarray:
    """Eight independent 64-bit keys."""
    return np.frombuffer(hashlib.sha512(f"{seed}/{source_key}/{epoch}".encode()).digest(), "<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit flips every output bit with probability 1/2."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
