"""Every option of torchxihe: its type, its default and its meaning.

One frozen pydantic model per TOML section. A config is read in four steps: the file that it `extends` is merged under
it (tables merge, lists replace), `--section.key=value` overrides are applied, everything is validated, and all mistakes
are reported at once, each with the file or flag it comes from. Nothing here imports torch, so that a mistake is
reported in milliseconds. TOML has no null: no option is ever `None`; 0, -1 or "" means "off", where documented.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from torchxihe.config.types import (
    LARGEST,
    BatchRamp,
    BelowOne,
    DocumentFormat,
    Fraction,
    GivenPlace,
    NonNegativeInt,
    Place,
    PositiveFloat,
    PositiveInt,
    Roles,
    Template,
)


class Section(BaseModel):
    """Base of the sections: unknown keys and implicit conversions are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Run(Section):
    """The run directory `<dir>/<name>/`, which holds config, metrics, checkpoints and tokenizer."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""
    """Name of the run directory. "": the stem of the config file."""
    dir: Place = "runs"
    """Directory that holds the run directories; all nodes must share it."""


class Model(Section):
    """The decoder's shape; the names are those of a Hugging Face `config.json`."""

    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt
    """Number of decoder blocks."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_key_value_heads: PositiveInt
    """Key and value heads; fewer than the query heads is grouped-query attention. Must divide them."""
    head_dim: Annotated[int, Field(ge=2, le=LARGEST, multiple_of=2)]
    """Width of one head; even, because rotary embeddings rotate pairs."""
    intermediate_size: PositiveInt
    """Width of the SwiGLU feed-forward."""
    vocab_size: PositiveInt
    """Rows of the embedding table. At least the tokenizer's size; the rows above it are padding."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head. true is Qwen3, false is Llama."""
    tie_word_embeddings: bool = False
    """Use the embedding table as the output head: no head parameter exists."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square inside every RMSNorm."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the truncated normal (cut at 3 sigma) of the initial weights; divided by sqrt(2 *
    num_hidden_layers) for projections into the residual stream."""
    attention: Literal["auto", "fa4", "varlen", "sdpa"] = "auto"
    """Attention kernel: FlashAttention 4 (the extra `[kernels]`, Hopper or newer, heads of 32, 64, 96 or 128),
    PyTorch's variable-length attention (GPU only), or PyTorch's scaled_dot_product_attention. "auto": the fastest that
    works here."""
    mlp: Literal["auto", "quack", "torch"] = "auto"
    """Feed-forward kernel: quack's SwiGLU, fused into the products (the extra `[kernels]`, Hopper), or PyTorch's.
    "auto": the fastest that works here; with `float8.recipe = "tensorwise"` it is torchxihe's kernel around float8
    products."""


class Tokenizer(Section):
    """The tokenizer: an existing one, or a byte-level BPE trained on the run's own sources."""

    path: Place = ""
    """A `tokenizer.json`, a folder that contains one, or a Hugging Face hub id. "": train one on `data.sources`."""
    revision: str = ""
    """Hub revision (branch, tag or commit) of `path`. "": the default branch."""
    vocab_size: Annotated[int, Field(ge=257, le=LARGEST)] = 4096
    """With `path = ""`: maximum size of the trained vocabulary, special token included; a small corpus yields fewer
    entries."""
    train_bytes: PositiveInt = 16_000_000
    """With `path = ""`: maximum bytes of text to train the tokenizer on, taken evenly from the sources."""
    chat_template: Place = ""
    """A file with the chat template (Jinja). "": the tokenizer's own; with `data.format = "chat"`, a simple default for
    a tokenizer that has none."""


class Documents(Section):
    """A validation set: documents that are never trained on. It has the options of a source except `weight`."""

    path: GivenPlace
    """A file, a directory, a glob, a hub id, "{stdlib}" (this Python's standard library) or "{site-packages}"."""
    name: str = ""
    """Name in logs and metrics. "": derived from `path` and `subset`."""
    glob: str = ""
    """With a directory as `path`: which files below it. "": all that are not hidden."""
    format: DocumentFormat = "auto"
    """How files are read. "auto": by their suffixes (.jsonl, .ndjson and .json, .parquet, .arrow, .csv and .tsv; any
    other file is one text document; a directory written by `save_to_disk` is a "dataset"). "lines": each line is a
    document; carriage returns at its end are dropped. "json" covers JSON lines. "csv" has a header; a row with a
    different number of fields is a bad row; TSV has no quoting. "tokens": token files of nanoGPT, llm.c or Megatron,
    read in place. "docstrings": the functions of Python files, each a conversation that asks for its docstring. A
    byte-order mark at the beginning of a text file is dropped. Files with the additional suffix .gz or .zst are
    decompressed. A document is at most 1 GiB."""
    subset: str = ""
    """Hub only: the configuration's name, such as "20231101.en". "": the default one."""
    split: str = "train"
    """Hub and saved datasets: the split to read."""
    revision: str = ""
    """Hub only: branch, tag or commit. "": the default branch."""
    stream: bool = False
    """Hub only: read over the network without downloading the dataset first; set `max_tokens`, too."""
    max_tokens: NonNegativeInt = 0
    """Stop after the document that reaches this many tokens. 0: no limit."""
    template: Template = "{text}"
    """Text of one document, with columns of the row in braces: "{question}\\n{answer}"."""
    messages: str = "messages"
    """With `data.format = "chat"`: the column of the conversation, a list of {role, content} or {from, value}. Rows
    without the column "messages" may have ShareGPT's `conversations` or Alpaca's columns instead (docs/sft.md)."""


class Source(Documents):
    """One source of documents: local files, a saved dataset or a Hugging Face hub dataset."""

    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Share of the training tokens, relative to the other sources' weights; refused below one sample in 2,048."""


class Data(Section):
    """Documents, their mixture, and how they are packed into rows."""

    sources: Annotated[tuple[Source, ...], Field(strict=False)]
    """Where documents come from: one `[[data.sources]]` table each."""
    format: Literal["text", "chat"] = "text"
    """What a row of the data is. "text": a document, with loss on every token. "chat": a conversation, rendered by the
    tokenizer's chat template, with loss on the messages of `loss_roles`."""
    loss_roles: Roles = ("assistant",)
    """With `format = "chat"`: the roles whose messages carry a loss (docs/sft.md)."""
    seq_len: Annotated[int, Field(ge=2, le=LARGEST)]
    """Tokens of one training sequence. A stored row has one more, the last target."""
    packing: Literal["concat", "best_fit"] = "best_fit"
    """How documents become rows: best-fit-decreasing, long ones split, or consecutive windows of the token stream."""
    document_mask: bool = True
    """Documents in a row do not attend to each other. false: plain causal attention over the row."""
    cache_dir: Place = ".cache/torchxihe"
    """Where prepared token stores and trained tokenizers are kept; all nodes must share it, or have a `remote`."""
    remote: Place = ""
    """An fsspec URL ("s3://bucket/prepared") from which training reads what `prepare --upload` has copied there; each
    node keeps what it has read in its own `cache_dir`. "": training reads `cache_dir`."""
    remote_cache_gib: PositiveFloat = 100.0
    """With `remote`: disk space for what was read; the least recently used is deleted (docs/data.md)."""
    on_bad_rows: Literal["skip", "error"] = "skip"
    """A row that cannot be read (malformed, not UTF-8, a column missing or no string): skip and count it, or stop."""
    max_bad_rows: Fraction = 0.01
    """With `on_bad_rows = "skip"`: still stop if more than this share of a source's rows is bad."""
    max_epochs: NonNegativeInt = 0
    """Refuse to start a run that would read any source more times than this. 0: no limit."""


class Validation(Section):
    """Loss on documents that training never sees."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Share of the documents held out, chosen by a hash of their content, per source. 0: none."""
    every: NonNegativeInt = 0
    """Steps between two validations; a run of at least that many steps also validates after its last step. 0: never."""
    max_tokens: NonNegativeInt = 1_000_000
    """Tokens of a validation at most, from all sources in proportion to their size, and of each set. 0: all."""
    sets: Annotated[tuple[Documents, ...], Field(strict=False)] = ()
    """Separate documents to validate on: one `[[validation.sets]]` table each."""


class Training(Section):
    """The training step and the length of the run."""

    steps: NonNegativeInt = 0
    """Optimizer steps to train for. Give this or `tokens`, not both."""
    tokens: NonNegativeInt = 0
    """Tokens to train for; rounded up to full steps. Give this or `steps`, not both."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all GPUs and micro-batches."""
    batch_ramp: BatchRamp = ()
    """Other batch sizes before `global_batch_size`: pairs of sequences per step and the step until which this size is
    used. [[64, 500], [128, 1000]]: 64 in the first 500 steps, 128 up to step 1000. []: none."""
    micro_batch_size: NonNegativeInt = 1
    """Maximum sequences per forward pass on one GPU; the global batch is divided into as many micro-batches as needed,
    whose gradients are accumulated. With a `batch_ramp`, it is chosen for `global_batch_size` and constant: smaller
    batches are padded. 0: as many as fit, found by up to three trial steps at the start, each of which compiles. The
    loss does not depend on it."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the data order."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations and matrix multiplications. Master weights, gradient sums and optimizer are float32."""
    compile: bool = True
    """torch.compile, block by block."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm to this. 0: measure it, never clip."""
    deterministic: bool = False
    """Bitwise reproducible on a GPU too, at some cost in speed. Runs on a CPU always are."""
    max_skipped: NonNegativeInt = 20
    """Stop, at the next log step, when this many consecutive steps were skipped because loss or gradient norm was not
    finite or beyond `skip_spikes_beyond`. 0: never."""
    skip_spikes_beyond: Annotated[float, Field(ge=0)] = 0.0
    """Skip steps whose loss or gradient norm exceeds the mean of the last 128 accepted ones by more than this many
    standard deviations. 0: only those that are not finite."""
    time_limit: Annotated[float, Field(ge=0)] = 0.0
    """Seconds after its start at which the run saves a checkpoint and ends, as on SIGTERM. 0: none."""
    init_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds that the start, the first step (which compiles), a validation or a checkpoint may take. After that the
    run is considered hung: every rank prints its stacks and exits. 0: no limit."""
    step_timeout: Annotated[float, Field(ge=0)] = 600.0
    """The same for every other step."""


class Optimizer(Section):
    """The optimizer; its hyper-parameters always come from here, never from a checkpoint."""

    name: Literal["adamw", "muon"] = "adamw"
    """"adamw": fused AdamW, weight decay on matrices only (none on embeddings and norms). "muon": Muon for the blocks'
    matrices, AdamW for everything else."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate; by default 2e-5 for fine-tuning on conversations, which does not inherit the rate of
    pre-training (docs/sft.md). Muon's updates are scaled to the size of AdamW's, so that one rate serves both."""
    momentum: BelowOne = 0.95
    """Muon's decay rate of the momentum (Nesterov's)."""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which moments and momentum are kept between steps. "bfloat16" saves 4 of 16 bytes per parameter for
    AdamW and 2 of 12 for Muon; with betas[1] far above 0.95, AdamW's second moment is not updated in this precision."""


class LRScheduler(Section):
    """The learning rate as a pure function of the step."""

    name: Literal["wsd", "cosine"] = "wsd"
    """"wsd": warmup, stable, decay. "cosine": warmup, then cosine over the rest."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warmup from 0; the first step already has lr / warmup_steps."""
    decay_fraction: Fraction = 0.2
    """wsd: share of all steps, at the end, in which the rate decays."""
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """wsd: shape of the decay: linear, 1 - sqrt(progress), or half a cosine."""
    min_lr_fraction: Fraction = 0.0
    """The decay ends at this fraction of the peak rate, one step after the last."""


class Parallelism(Section):
    """How the model is distributed. `pp × dp_replicate × dp_shard × cp × tp` must equal the number of processes."""

    dp_replicate: PositiveInt = 1
    """Full copies of the parameters, whose gradients are summed over the copies (DDP, HSDP)."""
    dp_shard: Annotated[int, Field(ge=-1, le=LARGEST)] = -1
    """Processes that share one copy of the parameters (FSDP2). -1: all that the other axes leave. 1: DDP."""
    cp: PositiveInt = 1
    """Context parallelism: number of processes over which every row is divided along the sequence, for rows that do not
    fit on one GPU. The parameters are sharded over them, too. `cp × tp` must divide `seq_len`; `cp_method` needs more.
    1: off."""
    cp_method: Literal["auto", "ulysses", "gather"] = "auto"
    """How attention sees the other parts of a row. "ulysses": each process attends with some of the heads to full rows
    (a tensor-parallel rank has at least `cp` key-value heads, or `cp` is a multiple of these that divides its query
    heads). "gather": each with all heads, to gathered keys and values (`2 × cp` must divide `seq_len`). "auto":
    "ulysses" up to `cp` = key-value heads, then "gather"."""
    tp: PositiveInt = 1
    """Tensor parallelism: number of processes over which every layer's matrices, heads and activations are divided;
    best within one host. Must divide the key-value heads, `intermediate_size` and `seq_len`. 1: off."""
    pp: PositiveInt = 1
    """Pipeline parallelism: number of stages that divide the layers, for models that sharding alone does not carry and
    for slow links between hosts. A step needs at least `pp` micro-batches. 1: off."""
    pp_schedule: Literal["1F1B", "interleaved"] = "1F1B"
    """Order of the passes: "1F1B", one stage per process, or "interleaved", several. Of a step, (p - 1) / (v · m +
    p - 1) is idle, with p processes of v stages and m micro-batches."""
    pp_stages_per_rank: PositiveInt = 1
    """Stages of each process: 1 with "1F1B", at least 2 with "interleaved"."""
    reshard_after_forward: bool = True
    """FSDP2 (not with `pp`): free a block's gathered parameters after its forward pass, and shard each micro-batch's
    gradients at once. false: less communication, but every process holds all parameters and, with several micro-batches
    per step, all gradients."""
    activation_checkpointing: Literal["none", "selective", "full", "budget"] = "none"
    """Recompute in the backward pass: nothing, all but matrix products and attention, entire blocks, or what the
    compiler finds cheapest within `activation_budget`."""
    activation_budget: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With "budget": share of the activations kept, from 0 (entire blocks recomputed) to 1 (nothing)."""


class Float8(Section):
    """Float8 products in head and blocks."""

    recipe: Literal["", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = ""
    """One scale per tensor (fastest; on a GPU the feed-forward's activation has one per token), or in the blocks one
    per row (most accurate; `_with_gw_hp` keeps the weights' gradients in 16-bit). "": off."""
    scope: Literal["auto", "head", "blocks", "all"] = "auto"
    """Which products: those of the head (one scale per tensor; without `tp`), or of the blocks (torchao, the extra
    `[float8]`). "auto": the head, and the blocks from `model.hidden_size` 2048 on (docs/performance.md)."""


class Checkpoint(Section):
    """Saving and resuming. A run always resumes from its own newest valid checkpoint."""

    every: NonNegativeInt = 0
    """Steps between two checkpoints; the last step is always saved. 0: only the last."""
    mode: Literal["async", "sync"] = "async"
    """"async": training waits only for a copy to host memory, which is written in the background. "sync": it waits
    until the checkpoint is on disk."""
    dir: Place = ""
    """Where checkpoints go instead of the run directory: a directory or an fsspec URL ("s3://bucket/runs", "gs://..."),
    in which the run gets a directory with its name. "": `checkpoints/` in the run directory."""
    load: Place = ""
    """Start a new run from this step directory (or the newest in this run or checkpoints directory). "": from scratch.
    Ignored once the run has its own checkpoint."""
    load_only: Annotated[tuple[Literal["model"], ...], Field(strict=False)] = ()
    """What is loaded from `load`. ["model"]: only the weights, with a new optimizer, from step 0. []: everything."""
    export_every: NonNegativeInt = 0
    """Steps between two exports: the checkpoints of these steps, and the last one, are also written as Hugging Face
    folders, to `exports/` in the run directory, while training continues. A multiple of `every`. 0: none."""
    keep_last: NonNegativeInt = 3
    """Number of newest checkpoints to keep; the newest that a run can resume from is always kept. 0: all."""
    keep_every: NonNegativeInt = 0
    """Never delete the checkpoints of steps divisible by this. 0: none beyond `keep_last`."""
    keep_best: NonNegativeInt = 0
    """Keep this many checkpoints with the lowest validation loss, among those whose step was validated. 0: none."""
    best_by: str = "sources"
    """Which validation loss decides which checkpoint is the best (`keep_best`, the manifest, the closing summary):
    "sources" (all documents held out from `data.sources`; if there are none, all validation sets together), or the name
    of one of `validation.sets`."""
    final: Literal["full", "model"] = "full"
    """What the last step saves. "model": only the weights, a third of the size; if the run is extended later, it
    resumes from the checkpoint before."""

    @property
    def best_metric(self) -> str:
        """The metric that `best_by` names."""
        return "validation/loss" if self.best_by == "sources" else f"validation/{self.best_by}/loss"


class Metrics(Section):
    """What is written while training."""

    log_every: PositiveInt = 10
    """Steps between two lines on the console and in `metrics.jsonl`; the host waits for the GPU at each. The first step
    is also logged."""
    sample_every: NonNegativeInt = 0
    """Steps between two samples of generated text; a finished run always prints one. 0: only at the end."""
    sample_prompt: str = ""
    """Prompt of the samples; with `data.format = "chat"`, a user's message. "": the beginning of a document."""
    sample_tokens: NonNegativeInt = 100
    """Tokens of a sample. 0: no samples."""
    tensorboard: bool = False
    """Also write TensorBoard event files, to `tensorboard/` in the run directory. Needs the package tensorboard."""
    prometheus: bool = False
    """Also write the latest metrics to `metrics.prom` in the run directory, for node_exporter's textfile collector."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Also report to Weights & Biases; "offline" keeps everything in `wandb/` in the run directory. Needs the package
    wandb and, online, WANDB_API_KEY in the environment or in `.env`."""
    wandb_project: str = "torchxihe"
    """Project of the wandb run."""


class Profiler(Section):
    """Traces of a few steps, for chrome://tracing or ui.perfetto.dev; see docs/watch.md."""

    first_step: NonNegativeInt = 0
    """First step to trace, on rank 0; the first steps after a start include compilation. 0: none."""
    steps: PositiveInt = 3
    """Steps to trace."""
    memory: bool = False
    """Record the stack of every GPU allocation, and write a snapshot after the traced steps and when memory is
    exhausted."""


class Config(Section):
    """All options of a run. `torchxihe config CONFIG` prints them; the run directory has them as `config.toml`."""

    run: Run = Run()
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    validation: Validation = Validation()
    training: Training
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    parallelism: Parallelism = Parallelism()
    float8: Float8 = Float8()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    profiler: Profiler = Profiler()

    _behind: tuple[int, int] = PrivateAttr((0, 0))

    def resumed_at(self, step: int, samples: int) -> "Config":
        """The same for a run that has read `samples` rows in `step` steps; `total_steps` depends on it."""
        config = self.model_copy()
        config._behind = step, samples
        return config

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch, padding included; after the ramp, if there is one."""
        return self.training.global_batch_size * self.data.seq_len

    @property
    def horizon(self) -> str:
        """The option of `training` that sets the length of the run."""
        return "steps" if self.training.steps else "tokens"

    @property
    def total_steps(self) -> int:
        """The horizon in optimizer steps."""
        if self.training.steps:
            return self.training.steps
        step, samples = self._behind
        left = max(-(-self.training.tokens // self.data.seq_len) - samples, 0)
        for sequences, until in self.training.batch_ramp:
            steps = max(until - step, 0)
            if steps * sequences >= left:
                return step + -(-left // sequences)
            step, left = step + steps, left - steps * sequences
        return step + -(-left // self.training.global_batch_size)

    def batch_size(self, step: int) -> int:
        """Sequences of `step`, counted from 0."""
        ramp = (sequences for sequences, until in self.training.batch_ramp if step < until)
        return next(ramp, self.training.global_batch_size)

    @property
    def run_dir(self) -> Path:
        """Directory of this run."""
        return Path(self.run.dir) / self.run.name

    @property
    def documents(self) -> list[tuple[str, Documents]]:
        """The sources and then the validation sets, each with its key ("data.sources.0")."""
        lists = (("data.sources", self.data.sources), ("validation.sets", self.validation.sets))
        return [(f"{key}.{i}", documents) for key, all_of in lists for i, documents in enumerate(all_of)]
