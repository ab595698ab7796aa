"""Names and configs of Hugging Face's `LlamaForCausalLM` and `Qwen3ForCausalLM`, for export and import."""

from typing import Any

from torchxihe.config.options import Model


def hf_name(name: str) -> str:
    """A parameter's name in a Hugging Face state dict."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def hf_config(
    config: Model, *, seq_len: int, vocab_size: int, eos_id: int, bos_id: int, dtype: str = "float32"
) -> dict[str, Any]:
    """`config.json` of the model, with the vocabulary trimmed to `vocab_size` rows. An id of -1 means there is none."""
    qwen3 = config.qk_norm
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen3 else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": seq_len,
        "rope_theta": config.rope_theta,  # transformers 4; 5 reads the next one
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": eos_id if eos_id >= 0 else None,
        "bos_token_id": bos_id if bos_id >= 0 else None,
        "torch_dtype": dtype,  # transformers 4; 5 reads the next one
        "dtype": dtype,
    }


def model_from_hf(hf: dict[str, Any]) -> tuple[Model, int]:
    """The model that a `config.json` describes, and its maximum sequence length.

    Missing keys have the defaults of `transformers`. Raises ValueError naming everything that the decoder lacks.
    """
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"model_type = {kind!r}; only llama and qwen3 can be imported")
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    named = rope.get("rope_type"), scaling.get("rope_type"), scaling.get("type")
    rope_types = sorted({str(name) for name in named if name not in (None, "default")})
    wanted = {
        "hidden_act": ("silu" if hf.get("hidden_act") == "swish" else hf.get("hidden_act", "silu"), "silu"),
        "rope_type": (", ".join(rope_types) or "default", "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)), 1.0),
        "attention_bias": (bool(hf.get("attention_bias")), False),
        "mlp_bias": (bool(hf.get("mlp_bias")), False),
        "use_sliding_window": (bool(hf.get("use_sliding_window")), False),
        "layer_types": (set(hf.get("layer_types") or ["full_attention"]), {"full_attention"}),
        "quantization_config": (hf.get("quantization_config"), None),
    }
    refused = [f"{key} = {value!r} (must be {only!r})" for key, (value, only) in wanted.items() if value != only]
    if refused:
        raise ValueError(f"not supported: {', '.join(refused)}")
    qwen3 = kind == "qwen3"
    heads = hf["num_attention_heads"]
    model = Model(
        hidden_size=hf["hidden_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads") or (32 if qwen3 else heads),
        head_dim=hf.get("head_dim") or (128 if qwen3 else hf["hidden_size"] // heads),
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        qk_norm=qwen3,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings")),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        initializer_range=float(hf.get("initializer_range", 0.02)),
    )
    longest = hf.get("max_position_embeddings") or (32768 if qwen3 else 2048)
    if not isinstance(longest, int):
        raise ValueError(f"max_position_embeddings = {longest!r}; must be an integer")
    return model, longest
