"""Options that are valid alone and wrong, or without effect, together."""

import math
import re
from collections.abc import Iterator

from torchxihe.config.options import Config, Documents, Model, Parallelism, Source
from torchxihe.errors import UserError
from torchxihe.utils.words import counted

CANDIDATES = 4096
"""Sizes of a micro-batch that are tried at most."""
Key = tuple[str, ...]
Finding = tuple[bool, str, str]
"""Whether the mistake is there, the dotted key, and the message."""


def find_conflicts(config: Config, world_size: int) -> list[tuple[Key, str]]:
    """Every mistake in the combination of options, on `world_size` processes (0: unknown)."""
    findings = [*_model(config), *_run(config), *_parallelism(config, world_size), *_documents(config)]
    return [(tuple(key.split(".")), why) for wrong, key, why in findings if wrong]


def find_warnings(config: Config) -> list[str]:
    """Options that have no effect, or not the intended one, because the run is too short for them.

    They are no mistakes: a trial of a few steps should need no other change of a config than the number of its steps.
    """
    steps, scheduler, validation, checkpoint = (
        config.total_steps,
        config.lr_scheduler,
        config.validation,
        config.checkpoint,
    )
    profiler, warmup = config.profiler, config.lr_scheduler.warmup_steps
    decay = math.ceil(scheduler.decay_fraction * steps) if scheduler.name == "wsd" else 0
    ramp = [until for _, until in config.training.batch_ramp]
    beyond = f"is beyond the run's {steps:,} steps"
    table = [
        (warmup >= steps, "lr_scheduler.warmup_steps", f"{warmup:,} {beyond}: there is no decay"),
        (
            warmup < steps < warmup + decay and scheduler.decay_fraction < 1,
            "lr_scheduler.decay_fraction",
            f"{scheduler.decay_fraction:g} of {steps:,} steps is more than the {steps - warmup:,} after the warmup: "
            "the decay is shortened to these",
        ),
        (validation.every > steps, "validation.every", f"{validation.every:,} {beyond}: nothing is validated"),
        (checkpoint.every > steps, "checkpoint.every", f"{checkpoint.every:,} {beyond}: only the last step is saved"),
        (
            checkpoint.export_every > steps,
            "checkpoint.export_every",
            f"{checkpoint.export_every:,} {beyond}: only the last step is exported",
        ),
        (
            checkpoint.keep_every > steps,
            "checkpoint.keep_every",
            f"{checkpoint.keep_every:,} {beyond}: keep_last decides which checkpoints are kept",
        ),
        (
            bool(checkpoint.keep_best) and not 0 < validation.every <= steps,
            "checkpoint.keep_best",
            "nothing is validated, so no checkpoint is the best",
        ),
        (
            config.metrics.log_every > steps,
            "metrics.log_every",
            f"{config.metrics.log_every:,} {beyond}: only the first and the last step are logged",
        ),
        (
            config.metrics.sample_every > steps,
            "metrics.sample_every",
            f"{config.metrics.sample_every:,} {beyond}: only the last step has a sample",
        ),
        (
            profiler.first_step > steps,
            "profiler.first_step",
            f"{profiler.first_step:,} {beyond}: nothing is traced",
        ),
        (
            0 < profiler.first_step <= steps < profiler.first_step + profiler.steps - 1,
            "profiler.steps",
            f"steps {profiler.first_step:,} to {profiler.first_step + profiler.steps - 1:,} reach beyond the run's "
            f"{steps:,} steps: the trace ends with the run",
        ),
        (
            bool(ramp) and ramp[-1] >= steps,
            "training.batch_ramp",
            f"step {max(ramp, default=0):,} {beyond}: no step has training.global_batch_size rows",
        ),
    ]
    return [f"{key}: {why}" for found, key, why in table if found]


def _model(config: Config) -> Iterator[Finding]:
    model, tokenizer = config.model, config.tokenizer
    yield (
        model.num_attention_heads % model.num_key_value_heads != 0,
        "model.num_key_value_heads",
        f"{model.num_key_value_heads} does not divide model.num_attention_heads = {model.num_attention_heads}",
    )
    yield (
        not tokenizer.path and tokenizer.vocab_size > model.vocab_size,
        "tokenizer.vocab_size",
        f"{tokenizer.vocab_size} is more than model.vocab_size = {model.vocab_size}",
    )
    yield (
        not model.qk_norm and model.hidden_size % model.num_attention_heads != 0,
        "model.hidden_size",
        f"{model.hidden_size} is not a multiple of model.num_attention_heads = {model.num_attention_heads}, which "
        "transformers requires of a Llama; change one of them, or set model.qk_norm = true (Qwen3)",
    )


def _run(config: Config) -> Iterator[Finding]:
    training, checkpoint = config.training, config.checkpoint
    yield (
        bool(training.steps) == bool(training.tokens),
        "training.steps",
        "give training.steps or training.tokens, one of the two (0: not given)",
    )
    largest = max(training.global_batch_size, *(sequences for sequences, _ in training.batch_ramp), 1)
    yield (
        max(training.tokens, training.steps * largest * config.data.seq_len) >= 2**62,
        "training.steps" if training.steps else "training.tokens",
        "the run would have more than 2^62 tokens",
    )
    untils = [until for _, until in training.batch_ramp]
    yield (
        untils != sorted(set(untils)),
        "training.batch_ramp",
        "its pairs are [sequences, until step]; the steps must rise",
    )
    yield (
        bool(config.validation.every and not config.validation.fraction and not config.validation.sets),
        "validation.fraction",
        "0 holds no documents out, so there is nothing to validate on; set it, add validation.sets, or set "
        "validation.every = 0",
    )
    yield (
        bool(checkpoint.export_every) and (not checkpoint.every or checkpoint.export_every % checkpoint.every != 0),
        "checkpoint.export_every",
        f"{checkpoint.export_every} is not a multiple of checkpoint.every = {checkpoint.every}; exports are made of "
        "checkpoints",
    )
    yield (
        config.parallelism.activation_checkpointing == "budget" and not training.compile,
        "parallelism.activation_checkpointing",
        '"budget" is a feature of the compiler and needs training.compile = true',
    )


def data_degrees(parallelism: Parallelism, world_size: int) -> tuple[int, int]:
    """`dp_replicate` and `dp_shard` on `world_size` processes. Raises UserError that lists the valid ones."""
    data, divided = world_size, list[str]()
    for option, degree in (("tp", parallelism.tp), ("cp", parallelism.cp), ("pp", parallelism.pp)):
        if data % degree:
            left = counted(world_size, "process") + (f" / {' / '.join(divided)} = {data}" if divided else "")
            valid = ", ".join(str(n) for n in range(1, data + 1) if data % n == 0)
            raise UserError(f"parallelism.{option} = {degree} does not divide {left}; valid: {valid}")
        data //= degree
        divided += [option] if degree > 1 else []
    shard = data // parallelism.dp_replicate if parallelism.dp_shard == -1 else parallelism.dp_shard
    if parallelism.dp_replicate * shard == data:
        return parallelism.dp_replicate, shard
    valid = ", ".join(f"{n} × {data // n}" for n in range(1, data + 1) if data % n == 0)
    product = f"parallelism.dp_replicate × parallelism.dp_shard = {parallelism.dp_replicate} × {parallelism.dp_shard}"
    others = [f"{name} = {n}" for name in ("pp", "cp", "tp") if (n := getattr(parallelism, name)) > 1]
    product += f" (× {' × '.join(others)})" if others else ""
    given = f"{product} does not match {counted(world_size, 'process')}"
    raise UserError(f"{given}; valid combinations (dp_replicate × dp_shard): {valid}")


def _parallelism(config: Config, world_size: int) -> Iterator[Finding]:
    parallelism = config.parallelism
    yield parallelism.dp_shard == 0, "parallelism.dp_shard", "must be -1 or at least 1, got 0"
    model, tp = config.model, parallelism.tp
    divided = {
        "model.num_key_value_heads": model.num_key_value_heads,
        "model.intermediate_size": model.intermediate_size,
        "data.seq_len": config.data.seq_len,
    }
    shared = math.gcd(*divided.values())
    valid = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
    for option, size in divided.items():
        yield size % tp != 0, "parallelism.tp", f"{tp} does not divide {option} = {size}; valid: {valid}"
    yield (
        (tp - 1) * -(-model.vocab_size // tp) >= model.vocab_size,
        "parallelism.tp",
        f"{tp} ranks are too many for model.vocab_size = {model.vocab_size}: one would have no row",
    )
    yield from _context_parallelism(config)
    yield from _pipeline_parallelism(config)
    yield (
        tp > 1 and config.float8.recipe not in ("", "tensorwise"),
        "float8.recipe",
        f'"{config.float8.recipe}" is not supported with parallelism.tp > 1; use "tensorwise"',
    )
    if world_size and parallelism.dp_shard:
        try:
            degrees = data_degrees(parallelism, world_size)
        except UserError as error:
            given = re.match(r"parallelism\.(tp|cp|pp) = ", str(error))
            option = given[1] if given else "dp_replicate" if parallelism.dp_shard == -1 else "dp_shard"
            yield True, f"parallelism.{option}", str(error)
        else:
            yield from _on_processes(config, *degrees)


def _on_processes(config: Config, replicate: int, shard: int) -> Iterator[Finding]:
    """What does not fit the number of data-parallel ranks."""
    model, parallelism, training = config.model, config.parallelism, config.training
    tp, shards, data = parallelism.tp, shard * parallelism.cp, replicate * shard
    for option, size in (("model.vocab_size", model.vocab_size), *_divided_rows(model)):
        yield (
            _is_cut_unevenly(size, tp, shards),
            option,
            f"{size} rows cannot be divided over parallelism.tp = {tp} and then over dp_shard × cp = {shards} by "
            f"PyTorch; use a multiple of {tp * shards}",
        )
    smallest = min([training.global_batch_size, *(size for size, _ in training.batch_ramp)])
    multiple = ", and the interleaved schedule a multiple of pp" * (parallelism.pp_schedule == "interleaved")
    yield (
        not micro_batch_limit(config, data),
        "training.global_batch_size",
        f"a step of {smallest} sequences on {counted(data, 'data-parallel rank')} has too few micro-batches: a "
        f"pipeline needs at least parallelism.pp = {parallelism.pp} of them{multiple}",
    )


def context_methods(config: Config, cp: int) -> list[str]:
    """The values of `parallelism.cp_method` that work with `cp` ranks, the preferred one first."""
    tp, seq_len = config.parallelism.tp, config.data.seq_len
    heads, keys = config.model.num_attention_heads // tp, config.model.num_key_value_heads // tp
    works = {
        "ulysses": keys >= cp or (keys > 0 and cp % keys == 0 and heads % cp == 0),
        "gather": seq_len % (2 * cp) == 0,
    }
    order = ("ulysses", "gather") if keys >= cp else ("gather", "ulysses")
    return [method for method in order if works[method] and seq_len % (cp * tp) == 0]


def _context_parallelism(config: Config) -> Iterator[Finding]:
    model, parallelism, seq_len = config.model, config.parallelism, config.data.seq_len
    cp, tp, method = parallelism.cp, parallelism.tp, parallelism.cp_method

    def fits(n: int) -> bool:
        methods = context_methods(config, n)
        return bool(methods) if method == "auto" else method in methods

    valid = ", ".join(str(n) for n in range(1, 1025) if cp > 1 and fits(n))
    heads, keys = model.num_attention_heads // tp, model.num_key_value_heads // tp
    a_rank = " a tensor-parallel rank" if tp > 1 else ""
    why = {
        "ulysses": f"does not divide data.seq_len = {seq_len}, or exceeds {keys} key-value heads{a_rank} and is no "
        f"multiple of these that divides {heads} query heads",
        "gather": f"does not divide data.seq_len = {seq_len} into two chunks a rank",
    }
    why["auto"] = f"does not divide data.seq_len = {seq_len}" + (f" / tp = {seq_len // tp}" if tp > 1 else "")
    yield cp > 1 and not fits(cp), "parallelism.cp", f"{cp} {why[method]}; valid: {valid}"


def _pipeline_parallelism(config: Config) -> Iterator[Finding]:
    parallelism, layers = config.parallelism, config.model.num_hidden_layers
    pp, per_rank = parallelism.pp, parallelism.pp_stages_per_rank
    product = f"{pp} × pp_stages_per_rank = {pp * per_rank}" if per_rank > 1 else f"{pp}"
    yield (
        pp * per_rank > layers and pp > 1,
        "parallelism.pp",
        f"{product} stages need as many layers, model.num_hidden_layers = {layers}",
    )
    interleaved = parallelism.pp_schedule == "interleaved"
    yield (
        interleaved != (per_rank > 1),
        "parallelism.pp_stages_per_rank",
        f'must be {"at least 2" if interleaved else "1"} with pp_schedule = "{parallelism.pp_schedule}", '
        f"got {per_rank}",
    )


def _divided_rows(model: Model) -> Iterator[tuple[str, int]]:
    """What decides the rows of each matrix that tensor parallelism divides by rows, and their number."""
    yield "model.num_attention_heads", model.num_attention_heads * model.head_dim
    yield "model.num_key_value_heads", model.num_key_value_heads * model.head_dim
    yield "model.intermediate_size", model.intermediate_size


def _is_cut_unevenly(rows: int, tp: int, shards: int) -> bool:
    """Whether DTensor (torch 2.13) takes FSDP2's shards of tensor parallelism's parts for others than they are.

    It assumes that the parts of a rank of FSDP2, laid end to end, are divided over tp as any tensor is.
    """

    def cut(size: int, parts: int) -> list[int]:
        most = -(-size // parts)
        return [max(0, min(most, size - part * most)) for part in range(parts)]

    of_ranks = zip(*(cut(part, shards) for part in cut(rows, tp)), strict=True)
    return tp > 1 and shards > 1 and any(list(sizes) != cut(sum(sizes), tp) for sizes in of_ranks)


def micro_batch_limit(config: Config, data_ranks: int) -> int:
    """The largest micro-batch, of at most `training.micro_batch_size` (0: any) rows, with which a pipeline can run
    every step, as each needs `parallelism.pp` micro-batches; 0: none. `data_ranks` read different rows."""
    training, pp = config.training, config.parallelism.pp
    sizes = [training.global_batch_size, *(size for size, _ in training.batch_ramp)]
    most = training.micro_batch_size or max(sizes)
    if pp == 1:
        return most
    most = min(most, min(sizes) // (data_ranks * pp))  # the smallest batch has `pp` micro-batches then
    if config.parallelism.pp_schedule == "1F1B":
        return most

    def has_full_rounds(rows: int) -> bool:
        rows = -(-sizes[0] // (data_ranks * -(-sizes[0] // (data_ranks * rows))))  # as few as need no more
        counts = [-(-size // (data_ranks * rows)) for size in sizes]
        return not any(n % (n // pp) for n in counts)

    return next((rows for rows in range(most, 0, -1)[:CANDIDATES] if has_full_rounds(rows)), 0)


def _listed(names: list[str]) -> str:
    named = [name for name in names if name]
    return f" ({', '.join(named)})" if named else ""


def _documents(config: Config) -> Iterator[Finding]:
    """Mistakes in the sources and the validation sets."""
    yield not config.data.sources, "data.sources", "needs at least one entry"
    best_by, sets = config.checkpoint.best_by, [documents.name for documents in config.validation.sets]
    yield (
        best_by not in ("sources", *filter(None, sets)),
        "checkpoint.best_by",
        f'must be "sources" or the name of one of validation.sets{_listed(sets)}, got {best_by!r}',
    )
    yield (
        config.data.format != "chat" and config.data.loss_roles not in ((), ("assistant",)),
        "data.loss_roles",
        'is for conversations; set data.format = "chat", or remove it',
    )
    yield not config.data.loss_roles, "data.loss_roles", 'names no role; the usual one is ["assistant"]'
    names: list[str] = []
    for at, source in config.documents:
        yield (
            source.name == "sources",
            f"{at}.name",
            '"sources" means all documents held out of data.sources; choose another name',
        )
        yield (
            bool(source.name) and source.name in names,
            f"{at}.name",
            f"two sources or sets are named {source.name!r}; names must differ",
        )
        names.append(source.name)
        yield (
            source.stream and not source.max_tokens,
            f"{at}.stream",
            "a streamed source has no end of its own; give max_tokens",
        )
        for key, why in _chat_mistakes(source, config.data.format == "chat"):
            yield True, f"{at}.{key}", why


def _chat_mistakes(source: Documents, chat: bool) -> Iterator[tuple[str, str]]:
    """Options of a source that contradict `data.format`, and why."""
    if chat and source.template != Source.model_fields["template"].default:
        yield "template", 'is for text; with data.format = "chat" conversations are rendered by tokenizer.chat_template'
    if chat and source.format in ("text", "lines", "tokens"):
        yield (
            "format",
            f'"{source.format}" has no conversations; with data.format = "chat" use "json" or "parquet"',
        )
    if not chat and source.format == "docstrings":
        yield "format", '"docstrings" are conversations: set data.format = "chat"'
