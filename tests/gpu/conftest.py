"""The suite passes in one process: each test compiles from nothing, and none meets another's recompile limit."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Seen to be needed: with `fullgraph=True` the ninth shape of a function is an error (a limit of 8)."""
    torch._dynamo.reset()
    yield
