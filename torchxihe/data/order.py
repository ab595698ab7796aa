"""Which row is sample number g: a pure function of the seed and g, so that resuming costs nothing and no rank matters.

Samples are counted from 0 over the whole run. A *stage* is a stretch of it with one mixture, one batch size and one
seed. Within a stage, samples come in blocks of 2048 in which every source has a fixed quota, evenly interleaved; the
n-th sample that a source gives is row `permute(seed, source, epoch, i)` with `epoch, i = divmod(n, rows)`. The samples
consumed of a source are always a prefix of that sequence, whatever the stages: a stage only remembers how long it is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from torchxihe.config.options import Config
from torchxihe.data.store import Prepared
from torchxihe.errors import UserError

BLOCK = 2048
"""Samples in which the mixture is exact."""


@dataclass(frozen=True)
class Stage:
    """A stretch of the run in which nothing about the order changes."""

    g: int
    """Number of its first sample."""
    step: int
    """Its first optimizer step."""
    global_batch: int
    """Samples a step."""
    seed: int
    sources: tuple[str, ...]
    """Content key of each source."""
    quotas: tuple[int, ...]
    """Samples of each source in a block; they sum to 2048."""
    first: tuple[int, ...]
    """Samples of each source that earlier stages have consumed."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Stage":
        """The stage that `to_json` wrote."""
        lists = ("sources", "quotas", "first")
        return cls(**{**values, **{name: tuple(values[name]) for name in lists}})

    def first_sample(self, step: int) -> int:
        """Number of the first sample of `step`, if this stage is still on by then."""
        return self.g + (step - self.step) * self.global_batch

    def consumed(self, g: int) -> tuple[int, ...]:
        """Samples of each source that lie before sample `g`, since the run began."""
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
    # Turn k of n belongs in the middle of the k-th n-th of the block. Stable, so that equal places go by source.
    order = np.argsort((turn + 0.5) / counts[source], kind="stable")
    return source[order], turn[order]


def make_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole shares of a block by largest remainder, in the order of `weights`.

    Raises UserError if a weight is too small to get a share.
    """
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(quotas)]:
        quotas[i] += 1
    for i, quota in enumerate(quotas):
        if not quota:
            others = sum(weights) - weights[i]
            least = f"{others / (BLOCK - 1):.3g}"
            raise UserError(
                f"data.sources.{i}.weight: {weights[i]:g} is less than one sample in {BLOCK}; beside the other "
                f"sources' weights {least} is the smallest that counts"
            )
    return tuple(quotas)


def next_stage(previous: Sequence[Stage], config: Config, prepared: Prepared, step: int) -> Stage:
    """The stage that `config` asks for from `step` on, after `previous` (all of the run's stages, in order).

    A source goes on where it stood, also if it was left out for a while; a new one starts at its beginning.
    """
    keys = tuple(source.key for source in prepared.sources)
    g = previous[-1].first_sample(step) if previous else 0
    ends = [following.g for following in previous[1:]] + [g]
    stood: dict[str, int] = {}
    for stage, end in zip(previous, ends, strict=False):
        stood |= zip(stage.sources, stage.consumed(end), strict=True)
    quotas = make_quotas([source.weight for source in prepared.sources])
    first = tuple(stood.get(key, 0) for key in keys)
    return Stage(g, step, config.batch_size(step), config.training.seed, keys, quotas, first)


def plan_stages(config: Config, prepared: Prepared, saved: Sequence[Stage] = (), step: int = 0) -> tuple[Stage, ...]:
    """The run's stages when it goes on at `step` with `config`, up to its horizon.

    What has run of `saved` stays; a new one follows wherever anything differs from the one before, at `step` and at
    each step of a batch-size ramp. A stage that never ran a step leaves no trace.
    """
    stages = tuple(stage for stage in saved if stage.step < step)
    what = ("global_batch", "seed", "sources", "quotas")
    for start in (step, *(until for _, until in config.training.batch_ramp if step < until < config.total_steps)):
        wanted = next_stage(stages, config, prepared, start)
        if not stages or any(getattr(stages[-1], name) != getattr(wanted, name) for name in what):
            stages = (*stages, wanted)
    return stages


def check_epochs(config: Config, prepared: Prepared, order: "Order") -> None:
    """Raise UserError if the run passes over a source more than `data.max_epochs` times."""
    most = config.data.max_epochs
    for i, (name, epochs) in enumerate(zip(prepared.names, order.epochs(config.total_steps), strict=True)):
        if most and epochs > most:
            raise UserError(
                f"data.max_epochs: the run would pass over data.sources.{i} ({name}) {epochs:.2f} times, more than "
                f"{most}; shorten the run, lower the weight of that source, or raise data.max_epochs"
            )


class Order:
    """The rows of all samples of a run."""

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
        """How often the steps before `step` have gone through each source, in the order that `samples` numbers."""
        g = self.batch(step)[0]
        stage = self.stage_at(g)
        consumed = dict(zip(stage.sources, stage.consumed(g), strict=True))
        return [consumed.get(key, 0) / rows for key, rows in zip(self._keys, self._rows.tolist(), strict=True)]

    def describe(self, step: int, names: list[str]) -> str:
        """The global batch of `step` in words: its samples' numbers and the sources, called `names`, they come from."""
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
    """Where a keyed pseudo-random permutation of range(rows) sends `i` (int64 [n]).

    A Feistel network over pairs (left, right) of mixed radix, so that its domain is hardly larger than `rows`: eight
    rounds, each adding the splitmix64 finaliser of one half to the other. A result beyond `rows` is sent on again
    (cycle-walking) until it lies within, which keeps it a permutation.
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
