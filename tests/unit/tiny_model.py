"""The smallest model that the tests of benchmarks train."""

TINY_MODEL = """
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 16
intermediate_size = 64
vocab_size = 384
"""
