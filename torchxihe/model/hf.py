"""Hugging Face's names for what we have: `LlamaForCausalLM` and `Qwen3ForCausalLM`."""

from typing import Any

from torchxihe.config import Model


def hf_name(name: str) -> str:
    """A parameter's name in a Hugging Face state dict."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def hf_config(config: Model, *, seq_len: int, vocab_size: int, eos_id: int, bos_id: int) -> dict[str, Any]:
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
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": eos_id if eos_id >= 0 else None,
        "bos_token_id": bos_id if bos_id >= 0 else None,
        "torch_dtype": "float32",
    }
