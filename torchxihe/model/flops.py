"""Parameters and floating-point operations (FLOPs) of a model, and the one convention by which MFU is counted."""

from torchxihe.config.options import Model


def parameter_counts(config: Model) -> tuple[int, int]:
    """(all parameters, those that multiply every token: head included, embedding lookup and norms excluded)."""
    c, f, heads, kv_heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    matrices = config.num_hidden_layers * (c * config.head_dim * 2 * (heads + kv_heads) + 3 * c * f)
    norms = config.num_hidden_layers * (2 * c + (2 * config.head_dim if config.qk_norm else 0)) + c
    table = config.vocab_size * c
    return matrices + norms + table * (1 if config.tie_word_embeddings else 2), matrices + table


def training_flops(config: Model, tokens: int, pairs: int) -> float:
    """FLOPs that training on `tokens` tokens needs, whose attention has `pairs` (query, key) pairs.

    Forward 2 and backward 4 for each parameter that multiplies a token; forward 4 and backward 8 for each pair, head
    and head dimension. Only pairs that no mask hides count (`Batch.pairs`); recomputation never counts.
    """
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * parameter_counts(config)[1] * tokens + attention * pairs


def palm_flops_per_token(config: Model, seq_len: int) -> float:
    """The same per token by the convention of PaLM's appendix B (arXiv:2204.02311), to compare with others' figures.

    There every token attends to all `seq_len` positions of its row, masked or not.
    """
    return training_flops(config, 1, seq_len)


def head_in_layers(config: Model, seq_len: int) -> float:
    """How many layers need as many FLOPs as the head, in rows of one document of `seq_len` tokens."""
    head = config.vocab_size * config.hidden_size
    products = (parameter_counts(config)[1] - head) / config.num_hidden_layers
    return head / (products + config.num_attention_heads * config.head_dim * seq_len)
