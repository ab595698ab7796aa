"""Resets the compiler before each test, so that the suite passes in one process."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Without it, the ninth shape of a function with `fullgraph=True` is an error: the recompile limit is 8 (seen)."""
    torch._dynamo.reset()
    yield
