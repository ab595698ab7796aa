"""Peak memory of a training step, in closed form: bytes per GPU by part.

A peak is at one of a few moments of the step; the estimate is the largest of them. Each counts what is alive then, with
the kernels of a GPU: FlashAttention, QK-norm and RoPE in one kernel, SwiGLU (quack's on Hopper, else the compiler's).
`tests/distributed/test_plan.py` compares this with the storages that the trainer's own step allocates (on fake
tensors), `tests/unit/test_plan.py` with peaks measured on GPUs (benchmarks/results/plan_*.md).

Letters, all of one rank: a bytes of an activation's element, N tokens of a micro-batch (B·T / cp), n = N / tp of them
where activations are sharded over the sequence, C hidden size, D head dimension; H query heads, K key-value heads and
F feed-forward width of the rank (1 / tp of the model's), V its rows of the vocabulary, E = (H + K)·D; S ranks that
FSDP2 shards over. Everything is in bytes unless it says "elements" or "parameters".
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torchxihe.components.optimizer.adamw import BFloat16AdamW
from torchxihe.config.options import Config
from torchxihe.kernels.float8_cross_entropy import CHUNK_LOGITS as FLOAT8_CHUNK
from torchxihe.kernels.float8_cross_entropy import CHUNKS_OF_DW
from torchxihe.kernels.float8_product import float8_recipe, wants_float8_head
from torchxihe.kernels.linear_cross_entropy import CHUNK_LOGITS, chunk_rows
from torchxihe.parallelisms.context_parallel import context_method
from torchxihe.parallelisms.data_parallel import UNIT_PARAMETERS
from torchxihe.parallelisms.pipeline_parallel import stage_layers
from torchxihe.plan.layout import Layout

FLOAT = 4
"""Bytes of a master weight, of a gradient's sum and of a float32 moment."""


@dataclass(frozen=True)
class Memory:
    """Bytes that are alive at one moment, by what they are for."""

    parameters: float = 0
    """Master weights, float32."""
    optimizer: float = 0
    """Moments or momentum, and what an update needs beside them."""
    gradients: float = 0
    """Float32; under FSDP2 sharded, except those of the unit that is being reduced."""
    activations: float = 0
    """What the backward pass needs, and the intermediate results of one layer."""
    weights: float = 0
    """Copies of weights in the dtype of the activations, and FSDP2's gathered ones."""
    loss: float = 0
    """Chunk of logits, gradients of head and last activations."""
    communication: float = 0
    """Buffers of collectives."""
    moment: str = ""
    """When this is."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}


@dataclass(frozen=True)
class Sizes:
    """The letters of this file for one rank. A pipeline stage has some of the layers, and table or head or neither."""

    a: int
    N: int
    n: int
    C: int
    D: int
    H: int
    K: int
    F: int
    V: int
    S: int
    layers: int
    block: int
    """Parameters of one layer, before FSDP2 shards them."""
    root: int
    """Those of table, head and final norm."""
    table: int
    """Those of a table that FSDP2 gathers by itself, in the dtype of the activations: one that is not tied."""
    head: int
    """Those of a head of which the same is true."""
    chunk: int
    """Rows of one chunk of logits."""
    rows: int
    """Of a micro-batch."""

    @property
    def E(self) -> int:
        """Width of queries and keys."""
        return (self.H + self.K) * self.D

    @property
    def parameters(self) -> int:
        """All parameters of the rank, before FSDP2 shards them."""
        return self.layers * self.block + self.root

    @property
    def unit(self) -> int:
        """Parameters of the blocks that FSDP2 gathers together."""
        return min(-(-UNIT_PARAMETERS // self.block), self.layers) * self.block


def sizes_of(config: Config, layout: Layout, rows: int, stage: int = 0) -> Sizes:
    """The sizes of a rank of pipeline stage `stage` whose micro-batch has `rows` rows."""
    model, tp = config.model, layout.tp
    c, d, h, k = model.hidden_size, model.head_dim, model.num_attention_heads // tp, model.num_key_value_heads // tp
    f, vocab = model.intermediate_size // tp, -(-model.vocab_size // tp)
    norms = 2 * c + (2 * d if model.qk_norm else 0)
    tokens = rows * config.data.seq_len // layout.cp
    layers, root = model.num_hidden_layers, vocab * c * (1 if model.tie_word_embeddings else 2) + c
    apart = 0 if model.tie_word_embeddings else vocab * c
    if layout.pp > 1:
        per_rank = config.parallelism.pp_stages_per_rank
        parts = stage_layers(model, config.data.seq_len, layout.pp * per_rank)
        layers = sum(len(part) for part in parts[stage :: layout.pp])
        root = vocab * c * (stage == 0) + (vocab * c + c) * (stage == layout.pp - 1)  # a tied table is on both
    return Sizes(
        a=2 if config.training.dtype == "bfloat16" else FLOAT,
        N=tokens,
        n=tokens // tp,
        C=c, D=d, H=h, K=k, F=f, V=vocab,
        S=layout.shards,
        layers=layers,
        block=c * d * 2 * (h + k) + 3 * c * f + norms,
        root=root,
        table=apart * (stage == 0),
        head=apart * (stage == layout.pp - 1),
        chunk=chunk_rows(tokens, vocab, FLOAT8_CHUNK if wants_float8_head(config) else CHUNK_LOGITS),
        rows=rows,
    )  # fmt: skip


def peak_memory(config: Config, layout: Layout, rows: int, *, fused: bool = True) -> Memory:
    """The largest of `moments`, of all stages. fused: quack's SwiGLU, which does not save the activation (Hopper)."""
    stages = sorted({0, layout.pp // 2, layout.pp - 1})  # those between first and last differ by what is in flight
    found = (moment for stage in stages for moment in moments(config, layout, rows, stage, fused=fused))
    return max(found, key=lambda memory: memory.total)


def in_flight(config: Config, layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, a whole rank's layers counted as one."""
    per_rank = config.parallelism.pp_stages_per_rank
    if layout.pp == 1 or per_rank == 1:
        return min(layout.pp - stage, micro_batches)
    warmup = 2 * (layout.pp - stage - 1) + (per_rank - 1) * layout.pp + 1
    return min(warmup / per_rank, micro_batches)


def moments(config: Config, layout: Layout, rows: int, stage: int = 0, *, fused: bool = True) -> Iterator[Memory]:
    """Memory at each moment of a step that can be its peak, in their order, on a rank of pipeline stage `stage`."""
    s, last = sizes_of(config, layout, rows, stage), stage == layout.pp - 1
    micro_batches = -(-config.training.global_batch_size // (layout.data * rows))
    keeps_gathered = layout.fsdp and (layout.pp > 1 or not config.parallelism.reshard_after_forward)
    unsharded_sums = keeps_gathered and micro_batches > 1
    parameters, optimizer = FLOAT * s.parameters / s.S, moment_bytes(config, s)
    sums = FLOAT * s.parameters / (1 if unsharded_sums else s.S)  # gradients, once they are all there
    before = sums if micro_batches > 1 or layout.ddp else 0  # DDP has its buckets from the start
    saved, copies = saved_activations(config, layout, s, fused=fused), saved_weights(config, layout, s)
    held = s.layers * in_flight(config, layout, stage, micro_batches)  # layers whose activations are kept
    hidden = s.a * s.n * s.C * micro_batches * ((stage > 0) + (not last)) if layout.pp > 1 else 0  # to be received
    root = FLOAT * (s.root - s.table - s.head) if layout.fsdp else 0  # gathered in float32, for the whole step
    table, output = (s.a * s.table, s.a * s.head) if layout.fsdp else (0, 0)  # gathered: all along, and for the loss
    gathered = s.a * s.block * s.layers if keeps_gathered else 0
    head = FLOAT * s.V * s.C if last else 0  # the gradient of the head's weight
    unit = s.a * s.unit if layout.fsdp else 0  # gathered, for the forward or the backward pass
    # As `reduced` below: of the last of these that are reduced.
    kept = FLOAT * (s.table or s.root - s.head) if layout.fsdp and micro_batches > 1 and not unsharded_sums else 0
    fixed = {"parameters": parameters, "optimizer": optimizer}

    # The last chunk of logits: everything is saved, and the loss's operator has computed its gradients.
    cast = s.a * s.V * s.C if s.a < FLOAT and not output else 0
    logits = s.chunk * s.V * s.a
    if wants_float8_head(config):  # the gradient in both orders; input and weight, too
        logits, cast = s.chunk * s.V * (s.a + 1 + CHUNKS_OF_DW) + 2 * s.N * s.C, 2 * s.V * s.C
    if last:
        yield Memory(
            **fixed,
            gradients=before,
            activations=held * saved + s.a * (s.n + s.N) * s.C,  # the final norm's input and output
            # Of the unit gathered last, which is the head or the last layer, FSDP2 still has the buffer.
            weights=held * copies + root + table + output + gathered + cast + (output or unit),
            communication=kept + hidden,
            loss=head + s.a * s.N * s.C + logits + 2 * FLOAT * s.N,
            moment="loss",
        )

    # The first layer of the backward pass, all of whose activations are still there; the head has its gradient.
    recomputed, layer = layer_backward(config, layout, s, fused=fused)
    mine = s.a * s.block if layout.fsdp or s.a < FLOAT else 0  # its gradients, in the dtype of its weights
    reduced = FLOAT * s.unit if layout.fsdp else 0  # the input of the last reduction, until the next one
    if output and not unsharded_sums:
        head /= s.S  # it is reduced at once
    yield Memory(
        **fixed,
        gradients=(before or head) + mine,
        activations=held * saved + recomputed + layer,
        weights=held * copies + root + table + (gathered or 2 * unit),  # the next layer's are prefetched
        communication=max(reduced, FLOAT * s.head if output else kept) + hidden,
        moment="first layer of the backward pass",
    )

    # The last one: all other gradients are there.
    yield Memory(
        **fixed,
        gradients=max(before, FLOAT * s.block * s.layers / s.S) + (0 if before else head) + mine,
        activations=saved + recomputed + layer,
        weights=copies + root + table + (gathered or unit),
        communication=reduced + hidden,
        moment="last layer of the backward pass",
    )

    # The table's gradient, dense, which FSDP2 then reduces: a tied one is the head's, too.
    if layout.fsdp:
        yield Memory(
            **fixed,
            gradients=max(before, FLOAT * (s.block * s.layers + s.head) / s.S) + root + table,
            weights=root + table,
            activations=s.a * s.N * s.C,
            communication=max(reduced, FLOAT * s.table),
            moment="gradient of the table",
        )
    yield Memory(
        parameters=parameters,
        optimizer=optimizer + update_bytes(config, layout, s),
        gradients=sums,
        moment="update",
    )


def moment_bytes(config: Config, s: Sizes) -> float:
    """The optimizer's state between the steps: two moments for AdamW, one momentum for Muon's matrices."""
    each = FLOAT if config.optimizer.state_dtype == "float32" else 2
    matrices = s.layers * s.block if config.optimizer.name == "muon" else 0
    return each * (2 * s.parameters - matrices) / s.S


def update_bytes(config: Config, layout: Layout, s: Sizes) -> float:
    """What an update allocates: float32 copies of 16-bit moments, or Muon's stacks of matrices."""
    largest = max(s.V * s.C, s.C * s.F) / s.S
    some = min(BFloat16AdamW.AT_ONCE + largest, s.parameters / s.S)
    copies = 0 if config.optimizer.state_dtype == "float32" else 2 * 2 * FLOAT * some
    if config.optimizer.name != "muon":
        return copies
    # gate and up of all layers have one shape: stacked in 16-bit, and orthogonalised with a few copies.
    stack = s.a * s.layers * 2 * s.C * s.F / s.S
    return max(copies, 5 * stack)


def saved_activations(config: Config, layout: Layout, s: Sizes, *, fused: bool) -> float:
    """Bytes of activations that one layer keeps for the backward pass; with "budget" at most."""
    mode = config.parallelism.activation_checkpointing
    if mode == "full":
        return s.a * s.n * s.C
    keys: float = max(s.K, layout.cp)  # Ulysses repeats them where there are fewer than its ranks
    heads = (2 * s.H + 2 * keys) * busiest(keys, layout.cp, s.rows)  # q, k, v and attention's output
    if layout.cp > 1 and context_method(config, layout.cp) == "gather":
        # Keys of the row, and once more what the first of two chunks sees.
        heads = 2 * s.H + 2 * s.K * (layout.cp + 0.5)
    products = heads * s.D + 2 * s.F  # and gate and up
    inputs, residuals = 2, 2  # normalised inputs of the sublayers, residual stream
    if mode == "selective" or float8_recipe(config):
        inputs = 0  # recomputed, or kept in float8
    if mode == "none" and config.model.qk_norm:
        products += s.E  # before QK-norm
    if mode == "none" and layout.cp > 1 and context_method(config, layout.cp) == "ulysses":
        products += s.H * s.D  # attention's output before its exchange, too
    if mode == "none" and not fused:
        products += s.F  # the activation
    return s.a * (s.N * (inputs * s.C + products) + s.n * residuals * s.C) + FLOAT * s.N * s.H


def busiest(keys: float, cp: int, rows: int) -> float:
    """What Ulysses gives to the rank with most heads, relative to the average; 1 where `cp` divides the key heads.

    Ranks with one more in one half of the rows have one less in the other, as far as there are such.
    """
    whole, more = divmod(keys, cp)
    if rows % 2:
        return (whole + (more > 0)) * cp / keys
    return (2 * whole + (more > 0) + (2 * more > cp)) * cp / (2 * keys)


def saved_weights(config: Config, layout: Layout, s: Sizes) -> float:
    """Bytes of 16-bit weights that one layer keeps for the backward pass, unsharded.

    All in one process; under FSDP2 the joined copies of gate and up, and of queries and keys, which are no parameters.
    """
    if s.a == FLOAT or float8_recipe(config) or config.parallelism.activation_checkpointing != "none":
        return 0
    return s.a * (2 * s.F * s.C + s.E * s.C) if layout.fsdp else s.a * s.block


def layer_backward(config: Config, layout: Layout, s: Sizes, *, fused: bool) -> tuple[float, float]:
    """What checkpointing recomputes of one layer, and the other intermediate results of its backward pass."""
    none = config.model_copy(
        update={"parallelism": config.parallelism.model_copy(update={"activation_checkpointing": "none"})}
    )
    everything = saved_activations(none, layout, s, fused=fused)
    recomputed = everything - saved_activations(config, layout, s, fused=fused)
    # Gradients of gate and up, the activation again, gradients of the residual stream.
    residuals = 4 if config.parallelism.activation_checkpointing == "full" else 1
    return recomputed, s.a * (s.N * 3 * s.F + s.n * residuals * s.C)
