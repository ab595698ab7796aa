"""What all tests share: one thread a process, GPU tests skipped without a GPU, and no setting of the user's shell."""

import os

import pytest

# Two workers on a small machine, and tests that fork four ranks: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NGPU", "NNODES", "NODE_RANK", "RDZV_ENDPOINT"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="50 random kills, 1,000 mutations, all layouts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="with --long"))
    gpu = [item for item in items if "gpu" in item.path.parts or item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch  # slow, and most runs of one unit test need it not

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
