"""How the processes of a planned run are laid out, and every way that the checks of the config allow."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torchxihe.config.checks import data_degrees, find_conflicts
from torchxihe.config.options import Config, Parallelism

MOST_STAGES = 16
"""Of a pipeline, that are tried."""


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh's axes; their product is the number of processes. `ParallelDims` without processes."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        """Number of processes, one per GPU."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks over which FSDP2 shards what tensor parallelism has left of a parameter."""
        return self.dp_shard * self.cp

    @property
    def fsdp(self) -> bool:
        """Whether FSDP2 holds the parameters."""
        return self.shards > 1 or self.tp > 1 or self.pp > 1

    @property
    def ddp(self) -> bool:
        """Whether DDP reduces the gradients."""
        return self.dp_replicate > 1 and not self.fsdp


def layout_of(parallelism: Parallelism, gpus: int) -> Layout:
    """The layout of `gpus` processes that `parallelism` asks for. Raises UserError if its degrees do not fit."""
    return Layout(*data_degrees(parallelism, gpus), parallelism.cp, parallelism.tp, parallelism.pp)


def legal_layouts(config: Config, gpus: int) -> Iterator[Layout]:
    """Every layout of `gpus` processes that the config's checks accept."""
    for pp, tp in itertools.product(_divisors(gpus), _divisors(gpus)):
        if gpus % (pp * tp) or pp > min(MOST_STAGES, config.model.num_hidden_layers):
            continue
        for cp in _divisors(gpus // pp // tp):
            for shard in _divisors(gpus // pp // tp // cp):
                layout = Layout(gpus // pp // tp // cp // shard, shard, cp, tp, pp)
                if not find_conflicts(with_layout(config, layout), gpus):
                    yield layout


def with_layout(config: Config, layout: Layout, **parallelism: object) -> Config:
    """`config` with the layout's degrees and other options of its parallelism."""
    degrees = dataclasses.asdict(layout)
    if layout.pp == 1:
        degrees |= {"pp_schedule": "1F1B", "pp_stages_per_rank": 1}
    return config.model_copy(update={"parallelism": config.parallelism.model_copy(update=degrees | parallelism)})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
