"""Batches that are copied to a GPU asynchronously arrive unchanged."""

from pathlib import Path

import pytest
import torch

from tests.unit.data_corpus import make_config, write_texts
from torchxihe.data.loader import BatchSpec, Loader
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.prepare.pipeline import prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_batches_on_the_gpu_equal_those_on_the_cpu(tmp_path: Path) -> None:
    texts = [f"document {i} " * (1 + i % 7) for i in range(500)]
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", texts), seq_len=64)
    prepared = prepare(config)
    order = Order(plan_stages(config, prepared), prepared.rows)
    on_gpu, on_cpu = (Loader(prepared, order, BatchSpec(64, 4, torch.device(device))) for device in ("cuda:0", "cpu"))
    kept = []
    for i in range(300):
        if i % 20 == 0:  # delay the GPU: copies queue up while the thread reads more batches into pinned memory
            torch.cuda._sleep(50_000_000)
        batch = next(on_gpu)
        assert batch.tokens.device.type == "cuda" and batch.cu_seqlens is not None
        kept.append((batch.tokens, batch.targets, batch.cu_seqlens))
    for tokens, targets, cu_seqlens in kept:
        expected = next(on_cpu)
        assert expected.cu_seqlens is not None
        assert torch.equal(tokens.cpu(), expected.tokens) and torch.equal(targets.cpu(), expected.targets)
        assert torch.equal(cu_seqlens.cpu(), expected.cu_seqlens)
    on_gpu.close(), on_cpu.close()
