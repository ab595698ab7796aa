"""torchxihe pre-trains Llama- and Qwen3-shaped language models in plain PyTorch, from one GPU to a cluster."""

__version__ = "0.1.0"
