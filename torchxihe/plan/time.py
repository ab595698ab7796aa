"""Seconds of a training step, in closed form, by what they are spent on.

Sums over the kernels' groups: products at a rate that depends on their width, attention, memory traffic of everything
elementwise, passes over weights, the update, and communication. See `hardware.py` for the rates.
Letters as in `memory.py`.
"""

import math
from dataclasses import dataclass, fields

from torchxihe.config.options import Config
from torchxihe.data.loader import causal_pairs, micro_batches
from torchxihe.kernels.float8_product import float8_recipe, wants_float8_head
from torchxihe.model.flops import training_flops
from torchxihe.parallelisms.context_parallel import context_method
from torchxihe.plan.hardware import (
    FLOAT8_GAIN,
    FLOAT8_HEAD_GAIN,
    FLOAT32_LOSS,
    HALF_WIDTH,
    HOST_GPUS,
    HOST_HOP,
    NETWORK,
    NETWORK_HOP,
    Gpu,
)
from torchxihe.plan.layout import Layout
from torchxihe.plan.memory import FLOAT, Sizes, busiest, sizes_of

# Fitted, as the rates in `hardware.py`.
NORMS = 16
"""Elements per token and hidden size that norms and residual additions of a layer read and write, both passes."""
ROPE = 6
"""The same per width of queries and keys."""
ATTENTION = 17
"""The same of attention per width of the queries."""
AGAIN = 0.4
"""Share of this traffic that activation checkpointing repeats: the forward pass's."""
TILE = 150
"""Keys per query that a tile at the diagonal adds."""
SWIGLU = 9
"""The same per feed-forward width, where the activation is not fused into the products."""
WEIGHTS, WEIGHTS_FSDP = 9, 33
"""Bytes per parameter and micro-batch: casts and gradient additions; under FSDP2 also copies around collectives."""
BLOCK_SECONDS = 3.5e-4
"""Per layer and micro-batch, where every block is a graph of its own."""
UPDATE, UPDATE_16BIT = 31, 47
"""Bytes per parameter of AdamW and the gradient norm; with moments in bfloat16."""
SLOWDOWN = 0.41
"""What a collective takes from the computation beside it: its whole size at the link's rate, times this."""
TENSOR = 2.5
"""Time of tensor parallelism's collectives, which are short, relative to that of their bytes."""
HOST_SECONDS = 1e-3
"""Of every step, in which no kernel runs."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one step."""

    products: float = 0
    """Matrix products."""
    attention: float = 0
    recomputation: float = 0
    """Of activation checkpointing."""
    traffic: float = 0
    """Norms, RoPE, softmax, casts and additions of weights and gradients: memory bandwidth."""
    update: float = 0
    """Optimizer and gradient norm."""
    communication: float = 0
    """What collectives add to the step."""
    bubble: float = 0
    """Of a pipeline, in which a stage has nothing to compute."""
    host: float = 0
    """What no kernel runs in."""

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_seconds(config: Config, layout: Layout, rows: int, gpu: Gpu, pairs: int = 0) -> Seconds:
    """Of one step on every GPU. pairs: (query, key) pairs of a row's attention; 0: causal, one document.

    Of a pipeline, its slowest stage's, which the others wait for.
    """
    stages = (_stage_seconds(config, layout, rows, gpu, pairs, stage) for stage in sorted({0, layout.pp - 1}))
    return max(stages, key=lambda seconds: seconds.total)


def _stage_seconds(config: Config, layout: Layout, rows: int, gpu: Gpu, pairs: int, stage: int) -> Seconds:
    s = sizes_of(config, layout, rows, stage)
    count = micro_batches(config.training.global_batch_size, layout.data, rows)
    mode, traffic = config.parallelism.activation_checkpointing, gpu.traffic
    pairs = rows * (pairs or causal_pairs(config.data.seq_len)) // layout.cp

    blocks = s.layers * sum(_product(s.N, c, out, gpu) for c, out in _products(s))
    blocks /= FLOAT8_GAIN if float8_recipe(config) else 1
    last = stage == layout.pp - 1
    head = _product(s.N, s.C, s.V, gpu) if last else 0.0
    head /= FLOAT8_HEAD_GAIN if (float8_head := wants_float8_head(config)) else 1
    attention_rate = gpu.attention[max(dim for dim in gpu.attention if dim <= s.D)]
    tiles = pairs + s.N * TILE  # at the diagonal, tiles are computed whole
    attention = 12 * s.layers * s.H * s.D * tiles / attention_rate  # 4 forward, 8 backward
    if layout.cp > 1 and context_method(config, layout.cp) == "ulysses":
        attention *= busiest(max(s.K, layout.cp), layout.cp, s.rows)
    if s.a == FLOAT:
        blocks, head, attention = (FLOAT32_LOSS * seconds for seconds in (blocks, head, attention))
    attention += s.a * s.layers * s.N * ATTENTION * s.H * s.D / traffic
    elementwise = s.a * s.layers * (s.n * NORMS * s.C + s.N * ROPE * s.E + (0 if gpu.hopper else s.N * SWIGLU * s.F))
    passes = 2 if layout.tp == 1 and not float8_head else 3  # reading or writing all logits in `a` bytes
    softmax = passes * s.a * s.N * s.V if last else 0.0
    weights = (WEIGHTS_FSDP if layout.fsdp and layout.pp == 1 else WEIGHTS) * s.parameters
    once = WEIGHTS_FSDP * s.parameters / traffic if layout.pp > 1 else 0.0  # a pipeline gathers and reduces once a step
    again = 0.0 if mode == "none" else AGAIN * elementwise / traffic
    if mode in ("full", "budget"):
        again += (blocks + attention) / 3
    compute = Seconds(
        products=count * (blocks + head),
        attention=count * attention,
        recomputation=count * again,
        traffic=count * (elementwise + softmax + weights) / traffic + once,
    )
    return Seconds(
        **{
            **compute.parts(),
            "update": _update(config, layout, s, gpu),
            "host": HOST_SECONDS + (count * s.layers * BLOCK_SECONDS if layout.gpus > 1 else 0),
            "communication": _communication(config, layout, s, gpu, count, compute.total),
            "bubble": (layout.pp - 1) / config.parallelism.pp_stages_per_rank * (compute.total - once) / count,
        }
    )


def tokens_per_second(config: Config, seconds: Seconds) -> float:
    """Of all GPUs."""
    return config.tokens_per_step / seconds.total


def model_flops_utilization(config: Config, seconds: Seconds, layout: Layout, gpu: Gpu, pairs: int = 0) -> float:
    """FLOPs that the mathematics requires, relative to the GPUs' peak."""
    pairs = config.training.global_batch_size * (pairs or causal_pairs(config.data.seq_len))
    return training_flops(config.model, config.tokens_per_step, pairs) / seconds.total / layout.gpus / gpu.peak


def _products(s: Sizes) -> list[tuple[int, int]]:
    """Input and output widths of a layer's products: queries and keys, values, output, gate and up, down."""
    return [(s.C, s.E), (s.C, s.K * s.D), (s.H * s.D, s.C), (s.C, 2 * s.F), (s.F, s.C)]


def _product(tokens: int, width: int, out: int, gpu: Gpu) -> float:
    """Seconds of a product and of the two of its backward pass; the narrowest dimension limits the rate."""
    narrow = min(tokens, width, out)
    return 6 * tokens * width * out * (narrow + HALF_WIDTH) / narrow / gpu.products


def _update(config: Config, layout: Layout, s: Sizes, gpu: Gpu) -> float:
    each = UPDATE if config.optimizer.state_dtype == "float32" else UPDATE_16BIT
    seconds = each * s.parameters / s.S / gpu.traffic
    if config.optimizer.name == "muon":  # five iterations on every matrix, each on one rank
        model = config.model
        c, f, d = model.hidden_size, model.intermediate_size, model.head_dim
        keys = d * model.num_key_value_heads
        shapes = [(c, f)] * 3 + [(c, d * model.num_attention_heads)] * 2 + [(c, keys)] * 2
        flops = s.layers * sum(5 * (4 * max(shape) * min(shape) ** 2 + 2 * min(shape) ** 3) for shape in shapes)
        seconds += flops * (c + HALF_WIDTH) / c / layout.gpus / gpu.products
    return seconds


def _communication(config: Config, layout: Layout, s: Sizes, gpu: Gpu, count: int, compute: float) -> float:
    """Seconds that collectives add to a step of `count` micro-batches with `compute` seconds of kernels.

    Tensor and context parallelism wait for theirs. Those of the parameters run beside the computation: they cost what
    they take from it, and where they take longer than it, the rest of their time.
    """
    reshard = config.parallelism.reshard_after_forward and layout.pp == 1
    mode = config.parallelism.activation_checkpointing
    waits = 0.0
    if layout.pp > 1:  # hidden states there, their gradients back
        bandwidth = gpu.link if layout.gpus <= HOST_GPUS else NETWORK
        waits += 2 * count * config.parallelism.pp_stages_per_rank * (s.a * s.n * s.C / bandwidth + HOST_HOP)
    if layout.tp > 1:
        again = {"full": 4, "selective": 2}.get(mode, 0)
        each = Collective(s.a * s.N * s.C, layout.tp, 1, gpu)
        waits += count * s.layers * (8 + again) * TENSOR * each.alone
    if layout.cp > 1:
        if context_method(config, layout.cp) == "gather":  # gradients return in float32
            forward = 2 if mode in ("full", "selective") else 1
            gathered = Collective(s.a * s.N * layout.cp * 2 * s.K * s.D, layout.cp, layout.tp, gpu)
            waits += count * s.layers * (forward + FLOAT / s.a) * gathered.alone
        else:
            keys = max(s.K, layout.cp)
            moved = Collective(s.a * s.N * (2 * s.H + 2 * keys) * s.D, layout.cp, layout.tp, gpu)
            waits += count * s.layers * (3 if mode == "full" else 2) * moved.all_to_all
    beside = waiting = 0.0
    units = s.layers * s.block // s.unit + 1
    passes = 1 if layout.pp > 1 else count  # a pipeline gathers and reduces once a step
    if layout.shards > 1:
        for size, times, calls in (
            (s.a * s.layers * s.block, passes * (2 if reshard else 1), units - 1),  # all-gathers, again for backward
            (s.a * (s.table + s.head) + FLOAT * (s.root - s.table - s.head), passes, 1),
            (FLOAT * s.parameters, count if reshard else 1, units),  # reduce-scatters
        ):
            collective = Collective(size, layout.shards, layout.tp, gpu, calls)
            beside += times * collective.cost
            waiting += times * collective.alone
    if layout.dp_replicate > 1:
        reduced = 2 * FLOAT * s.parameters / s.S
        sums = Collective(reduced, layout.dp_replicate, layout.tp * layout.shards, gpu, 2 * units)
        beside += sums.cost
        # Under HSDP and DDP they begin with the last micro-batch's backward pass.
        waiting = max(waiting, sums.alone + compute * (1 - 2 / 3 / count))
    return waits + beside + max(0.0, waiting - compute)


@dataclass(frozen=True)
class Collective:
    """An all-gather, a reduce-scatter (or half an all-reduce) of `size` bytes over `ranks`, `inner` GPUs apart."""

    size: float
    ranks: int
    inner: int
    gpu: Gpu
    calls: int = 1

    @property
    def moved(self) -> float:
        """Bytes that each rank sends."""
        return self.size * (self.ranks - 1) / self.ranks

    @property
    def cost(self) -> float:
        """Seconds that it takes from the computation beside it, which hardly depend on the number of ranks."""
        return SLOWDOWN * self.size / self.gpu.link

    @property
    def local(self) -> int:
        """Its ranks on one host."""
        return max(1, min(self.ranks, HOST_GPUS // self.inner))

    @property
    def all_to_all(self) -> float:
        """Seconds of an exchange of `size` bytes in all: what leaves the host goes through the GPU's own adapter."""
        remote = self.size * max(0, self.ranks - self.local) / self.ranks
        return (self.moved - remote) / self.gpu.link + remote / NETWORK

    @property
    def alone(self) -> float:
        """Seconds that it takes by itself: a ring, through one network adapter for each GPU of the group and host."""
        local = self.local
        hosts = math.ceil(self.ranks / local)
        bandwidth = self.gpu.link if hosts == 1 else min(self.gpu.link, local * NETWORK)
        hops = hosts * (local - 1) * HOST_HOP + (hosts - 1) * NETWORK_HOP
        return self.moved / bandwidth + self.calls * hops
