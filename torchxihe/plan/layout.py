"""How the processes of a planned run are laid out, and every way that the checks of the config allow."""

from collections.abc import Iterator
from dataclasses import dataclass

from torchxihe.config.checks import data_degrees, find_conflicts
from torchxihe.config.options import Config, Parallelism


@dataclass(frozen=True)
class Layout:
    """Degrees of the mesh's axes; their product is the number of processes. `ParallelDims` without processes."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def gpus(self) -> int:
        """Number of processes, one per GPU."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

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
        return self.shards > 1 or self.tp > 1

    @property
    def ddp(self) -> bool:
        """Whether DDP reduces the gradients."""
        return self.dp_replicate > 1 and not self.fsdp


def layout_of(parallelism: Parallelism, gpus: int) -> Layout:
    """The layout of `gpus` processes that `parallelism` asks for. Raises UserError if its degrees do not fit."""
    return Layout(*data_degrees(parallelism, gpus), parallelism.cp, parallelism.tp)


def legal_layouts(config: Config, gpus: int) -> Iterator[Layout]:
    """Every layout of `gpus` processes that the config's checks accept."""
    for tp in _divisors(gpus):
        for cp in _divisors(gpus // tp):
            for shard in _divisors(gpus // tp // cp):
                layout = Layout(gpus // tp // cp // shard, shard, cp, tp)
                if not find_conflicts(with_layout(config, layout), gpus):
                    yield layout


def with_layout(config: Config, layout: Layout, **parallelism: object) -> Config:
    """`config` with the layout's degrees and other options of its parallelism."""
    degrees = {"dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "cp": layout.cp, "tp": layout.tp}
    return config.model_copy(update={"parallelism": config.parallelism.model_copy(update=degrees | parallelism)})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
