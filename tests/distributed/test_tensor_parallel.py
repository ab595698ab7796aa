"""The loss that is parallel over the vocabulary against full logits."""

import pytest
import torch

from tests.distributed.launch import run_distributed
from torchxihe.kernels import linear_cross_entropy as lce
from torchxihe.kernels.linear_cross_entropy import linear_cross_entropy_reference, vocab_parallel_cross_entropy


def _vocab_parallel(vocab: int) -> tuple[float, float, float]:
    """Largest differences of loss, dX and dW from full logits in float64, the vocabulary cut unevenly."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 16, generator=generator), torch.randn(vocab, 16, generator=generator)
    targets = torch.randint(0, vocab, (300,), generator=generator)
    targets[::7] = -100
    part = -(-vocab // size)
    mine = w[rank * part : (rank + 1) * part].clone().requires_grad_()
    inputs = x.clone().requires_grad_()
    group = torch.distributed.group.WORLD
    assert group is not None
    loss, losses = vocab_parallel_cross_entropy(inputs, mine, targets, vocab_size=vocab, group=group.group_name)
    loss.backward()
    exact = [value.double().requires_grad_() for value in (x, w)]
    expected, terms = linear_cross_entropy_reference(exact[0], exact[1], targets)
    expected.backward()
    assert inputs.grad is not None and mine.grad is not None and exact[0].grad is not None and exact[1].grad is not None
    torch.distributed.all_reduce(inputs.grad)  # each rank's is a part of the sum
    return (
        float((losses - terms).abs().max() + (loss - expected).abs() / expected),
        float((inputs.grad - exact[0].grad).abs().max()),
        float((mine.grad - exact[1].grad[rank * part : (rank + 1) * part]).abs().max()),
    )


@pytest.mark.parametrize(("world", "vocab"), [(2, 67), (3, 67), (4, 13)])
def test_the_loss_is_parallel_over_the_vocabulary(world: int, vocab: int) -> None:
    """In several chunks. Seen to fail with the sum of one rank only and with a target's row on two ranks."""
    for differences in run_distributed(_small_chunks, world, vocab):
        assert max(differences) < 2e-5


def _small_chunks(vocab: int) -> tuple[float, float, float]:
    lce.CHUNK_LOGITS = 128 * 20
    return _vocab_parallel(vocab)
