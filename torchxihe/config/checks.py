"""Options that are valid alone and wrong together."""

from collections.abc import Iterator

from torchxihe.config.options import Config, Documents, Source, documents_of
from torchxihe.errors import UserError

Key = tuple[str, ...]


def find_conflicts(config: Config, world_size: int) -> list[tuple[Key, str]]:
    """Options that are fine alone and wrong together, or on this many processes (0: unknown)."""
    found: list[tuple[Key, str]] = []

    def check(right: bool, key: str, why: str) -> None:
        if not right:
            found.append((tuple(key.split(".")), why))

    model, tokenizer, training = config.model, config.tokenizer, config.training
    check(
        model.num_attention_heads % model.num_key_value_heads == 0,
        "model.num_key_value_heads",
        f"{model.num_key_value_heads} does not divide model.num_attention_heads = {model.num_attention_heads}",
    )
    check(
        bool(tokenizer.path) or tokenizer.vocab_size <= model.vocab_size,
        "tokenizer.vocab_size",
        f"{tokenizer.vocab_size} is more than model.vocab_size = {model.vocab_size}",
    )
    check(
        bool(training.steps) != bool(training.tokens),
        "training.steps",
        "give training.steps or training.tokens, one of the two (0: not given)",
    )
    check(
        model.qk_norm or model.hidden_size % model.num_attention_heads == 0,
        "model.hidden_size",
        f"{model.hidden_size} is no multiple of model.num_attention_heads = {model.num_attention_heads}, which "
        "transformers demands of a Llama; change one of them, or take model.qk_norm = true (Qwen3)",
    )
    untils = [until for _, until in training.batch_ramp]
    check(
        untils == sorted(set(untils)),
        "training.batch_ramp",
        "its pairs are [sequences, until step]; the steps must rise",
    )
    check(
        not config.validation.every or config.validation.fraction > 0 or bool(config.validation.sets),
        "validation.fraction",
        "0 holds no documents out, so there is nothing to validate on; set it, add validation.sets, or set "
        "validation.every = 0",
    )
    every, export_every = config.checkpoint.every, config.checkpoint.export_every
    check(
        not export_every or bool(every and export_every % every == 0),
        "checkpoint.export_every",
        f"{export_every} is no multiple of checkpoint.every = {every}; exports are made of checkpoints",
    )
    check(
        config.parallelism.activation_checkpointing != "budget" or training.compile,
        "parallelism.activation_checkpointing",
        '"budget" is the compiler\'s: it needs training.compile = true',
    )
    check(config.parallelism.dp_shard != 0, "parallelism.dp_shard", "must be -1 or at least 1, got 0")
    if world_size and config.parallelism.dp_shard:
        try:
            config.parallelism.degrees(world_size)
        except UserError as error:
            check(
                False, f"parallelism.{'dp_replicate' if config.parallelism.dp_shard == -1 else 'dp_shard'}", str(error)
            )
    check(bool(config.data.sources), "data.sources", "needs at least one entry")
    names: list[str] = []
    for at, source in documents_of(config):
        check(
            not source.name or source.name not in names,
            f"{at}.name",
            f"two sources or sets are named {source.name!r}; names must differ",
        )
        names.append(source.name)
        check(
            not source.stream or source.max_tokens > 0,
            f"{at}.stream",
            "a streamed source needs max_tokens, or it never ends",
        )
        for key, why in _chat_mistakes(source, config.data.format == "chat"):
            check(False, f"{at}.{key}", why)
    return found


def _chat_mistakes(source: Documents, chat: bool) -> Iterator[tuple[str, str]]:
    """Options of a source that do not go with `data.format`, and why."""
    if chat and source.template != Source.model_fields["template"].default:
        yield "template", 'is for text, but data.format = "chat": tokenizer.chat_template puts conversations into words'
    if chat and source.format in ("text", "lines", "csv", "tokens"):
        yield "format", f'"{source.format}" has no conversations; with data.format = "chat" take "json" or "parquet"'
    if not chat and source.format == "docstrings":
        yield "format", '"docstrings" are conversations: set data.format = "chat"'
