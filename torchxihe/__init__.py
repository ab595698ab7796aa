"""torchxihe pre-trains Llama- and Qwen3-shaped language models in plain PyTorch, from one GPU to a cluster.

`load`, `batches` and `train` do from Python what the commands do from a shell: see docs/python.md. They are imported
when they are first used, and PyTorch with them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from torchxihe.utils.version import __version__

if TYPE_CHECKING:
    from torchxihe.api import LanguageModel, batches, load, train

__all__ = ["LanguageModel", "__version__", "batches", "load", "train"]


def __getattr__(name: str) -> Any:
    """The names of `torchxihe.api`. Raises AttributeError."""
    if name in __all__:
        return getattr(importlib.import_module("torchxihe.api"), name)
    raise AttributeError(f"module torchxihe has no attribute {name}")
