"""Output head and cross-entropy in one operator; the full logits are never materialised.

Rows go through in chunks. A chunk's logits give its part of the loss, of dX and of dW at once, in the forward pass;
the backward pass only multiplies by the incoming gradient. At 65,536 rows and a vocabulary of 50,304 full float32
logits would take 13 GB, twice.

Axes: N rows (tokens), C hidden size, V vocabulary, n rows of one chunk.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchxihe.utils.device import compile_obstacle
from torchxihe.utils.distributed import all_gather_single

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

IGNORE_INDEX = -100
CHUNK_LOGITS = 2**29  # logits of one chunk, about: 1 GiB in bfloat16
ROWS_MULTIPLE = 128  # tensor-core tile alignment
LOG2E = math.log2(math.e)


def linear_cross_entropy(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log softmax(x wᵀ)[target], and the terms of that sum; 0 for a row whose target is -100.

    x: float32 or bfloat16 [N, C]. w: [V, C], cast to x's dtype for the products; its gradient is accumulated and
    returned in float32. targets: int64 [N]. Returns a float32 scalar and float32 [N], which is detached: only
    the sum has a gradient.
    """
    return vocab_parallel_cross_entropy(x_NC, w_VC, targets_N, vocab_size=w_VC.shape[0], group="")


def vocab_parallel_cross_entropy(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, *, vocab_size: int, group: str
) -> tuple[Tensor, Tensor]:
    """The same where each rank of the process group named `group` has its part of the `vocab_size` rows of w.

    x and targets are the same on every rank, and so are the results; dX is this rank's part of a sum over the ranks. No
    rank ever has the logits of another's rows: per chunk the ranks exchange the sums of their exponentials and the
    targets' logits. group "": one process.
    """
    gradients = torch.is_grad_enabled() and (x_NC.requires_grad or w_VC.requires_grad)
    loss, losses_N, _, _ = _chunked(x_NC, w_VC, targets_N, gradients, vocab_size, group)
    return loss, losses_N.detach()


def linear_cross_entropy_reference(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same from full float32 logits: the reference."""
    logits_NV = F.linear(x_NC.float(), w_VC.float())
    losses_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
    return losses_N.sum(), losses_N.detach()


def chunk_rows(rows: int, vocab: int, logits: int = CHUNK_LOGITS) -> int:
    """Rows of one chunk, of `rows` with `vocab` logits each: equal chunks of about `logits` at most."""
    size = -(-rows // -(-rows * vocab // logits))
    return -(-size // ROWS_MULTIPLE) * ROWS_MULTIPLE


def _cross_entropy_(logits_nV: Tensor, targets_n: Tensor, losses_n: Tensor, gradients: bool) -> None:
    """Write a chunk's losses (float32 [n]); with `gradients`, overwrite the logits by the sum's gradient."""
    if logits_nV.is_cuda and not compile_obstacle():
        # Triton only comes with PyTorch's CUDA builds.
        from torchxihe.kernels.cross_entropy_triton import cross_entropy_

        cross_entropy_(logits_nV, targets_n, losses_n, IGNORE_INDEX, gradients)
        return
    logits = logits_nV.float()
    lse_n1 = torch.logsumexp(logits, dim=-1, keepdim=True)
    valid_n1 = (targets_n != IGNORE_INDEX).unsqueeze(-1)
    index_n1 = torch.where(valid_n1, targets_n.unsqueeze(-1), 0)
    losses_n.copy_(torch.where(valid_n1, lse_n1 - logits.gather(-1, index_n1), 0.0).squeeze(-1))
    if gradients:
        probabilities = torch.exp(logits - lse_n1)
        probabilities.scatter_add_(-1, index_n1, -valid_n1.float())
        logits_nV.copy_(probabilities.mul_(valid_n1))


def _vocab_parallel_cross_entropy_(
    logits_nV: Tensor, targets_n: Tensor, losses_n: Tensor, gradients: bool, first: int, group: dist.ProcessGroup
) -> None:
    """The same for the logits of the rows of w from `first` on, of which every rank of `group` has others."""
    valid_n, index_n = targets_n != IGNORE_INDEX, targets_n - first
    mine_n = valid_n & (index_n >= 0) & (index_n < logits_nV.shape[1])
    targets_n = torch.where(mine_n, index_n, IGNORE_INDEX)  # of this rank
    target_n = logits_nV.gather(-1, torch.where(mine_n, index_n, 0).unsqueeze(-1)).squeeze(-1).float()
    mine_2n = torch.stack([_log2_sum_exp(logits_nV), torch.where(mine_n, target_n, 0.0)])
    all_2n = mine_2n.new_empty(group.size(), *mine_2n.shape)  # of each rank
    all_gather_single(all_2n.flatten(0, 1), mine_2n, group=group)
    lse_n = (all_2n[:, 0] / LOG2E).logsumexp(0)
    losses_n.copy_(torch.where(valid_n, lse_n - all_2n[:, 1].sum(0), 0.0))
    if gradients:
        _softmax_gradient_(logits_nV, targets_n, torch.where(valid_n, lse_n * LOG2E, torch.inf))


def _log2_sum_exp(logits_nV: Tensor) -> Tensor:
    """log2 of the sum of a row's exponentials, float32 [n]."""
    if not (logits_nV.is_cuda and not compile_obstacle()):
        return torch.logsumexp(logits_nV.float(), dim=-1) * LOG2E
    # Triton only comes with PyTorch's CUDA builds.
    from torchxihe.kernels.cross_entropy_triton import cross_entropy_

    lse_n = torch.empty(logits_nV.shape[0], dtype=torch.float32, device=logits_nV.device)
    first = torch.zeros(logits_nV.shape[0], dtype=torch.int64, device=logits_nV.device)
    cross_entropy_(logits_nV, first, torch.empty_like(lse_n), IGNORE_INDEX, gradients=False, lse_n=lse_n)
    return lse_n


def _softmax_gradient_(logits_nV: Tensor, targets_n: Tensor, lse_n: Tensor) -> None:
    """Overwrite logits with 2^(log2(e) logit - lse), less 1 at their targets, if they have one."""
    if logits_nV.is_cuda and not compile_obstacle():
        # Triton only comes with PyTorch's CUDA builds.
        from torchxihe.kernels.cross_entropy_triton import softmax_gradient_

        softmax_gradient_(logits_nV, targets_n, lse_n, IGNORE_INDEX)
        return
    probabilities = torch.exp2(logits_nV.float() * LOG2E - lse_n.unsqueeze(-1))
    has_n1 = (targets_n != IGNORE_INDEX).unsqueeze(-1)
    probabilities.scatter_add_(-1, torch.where(has_n1, targets_n.unsqueeze(-1), 0), -has_n1.float())
    logits_nV.copy_(probabilities)


@torch.library.custom_op("torchxihe::linear_cross_entropy", mutates_args=())
def _chunked(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, gradients: bool, vocab_size: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (float32 scalar), its terms (float32 [N]), dX [N, C] in x's dtype, dW [V, C] in float32; the gradients
    are empty unless `gradients`."""
    ranks = dist.distributed_c10d._resolve_process_group(cast("Any", group)) if group else None
    part = -(-vocab_size // ranks.size()) if ranks else vocab_size  # of the vocabulary; the last rank may have less
    rows = x_NC.shape[0]
    w = w_VC.to(x_NC.dtype)
    loss = torch.zeros((), dtype=torch.float32, device=x_NC.device)
    losses_N = torch.empty(rows, dtype=torch.float32, device=x_NC.device)
    dx = torch.empty_like(x_NC) if gradients else x_NC.new_empty(0)
    dw = torch.zeros_like(w_VC, dtype=torch.float32) if gradients else w_VC.new_empty(0, dtype=torch.float32)
    size = chunk_rows(rows, part)
    for start in range(0, rows, size):
        chunk = slice(start, start + size)
        logits_nV = x_NC[chunk] @ w.t()
        if ranks:
            first = ranks.rank() * part
            _vocab_parallel_cross_entropy_(logits_nV, targets_N[chunk], losses_N[chunk], gradients, first, ranks)
        else:
            _cross_entropy_(logits_nV, targets_N[chunk], losses_N[chunk], gradients)
        loss += losses_N[chunk].sum()
        if gradients:
            torch.mm(logits_nV, w, out=dx[chunk])
            _add_product(dw, logits_nV.t(), x_NC[chunk])
        del logits_nV  # or two chunks' logits are alive at once
    return loss, losses_N, dx, dw


def _add_product(sum_VC: Tensor, a_Vn: Tensor, b_nC: Tensor) -> None:
    """sum += a @ b, with the sum in float32 whatever the factors' dtype."""
    if a_Vn.dtype == torch.float32:
        sum_VC.addmm_(a_Vn, b_nC)
    elif a_Vn.is_cuda:
        torch.addmm(sum_VC, a_Vn, b_nC, out_dtype=torch.float32, out=sum_VC)
    else:
        sum_VC += a_Vn @ b_nC


@_chunked.register_fake
def _(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, gradients: bool, vocab_size: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x_NC.new_empty((), dtype=torch.float32)
    losses_N = x_NC.new_empty(x_NC.shape[0], dtype=torch.float32)
    if not gradients:
        return loss, losses_N, x_NC.new_empty(0), w_VC.new_empty(0, dtype=torch.float32)
    return loss, losses_N, torch.empty_like(x_NC), torch.empty_like(w_VC, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros of dX's and dW's size for unused outputs
    ctx.w_dtype = inputs[1].dtype
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    others = (None,) * (len(ctx.needs_input_grad) - 2)
    return (dx.float() * grad).to(dx.dtype), (dw * grad).to(ctx.w_dtype), *others


def add_gradients(op: Any) -> None:
    """Register the backward pass of an operator of (x, w, ...) that returns (loss, its terms, dX, dW)."""
    op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy_flops(
    x: tuple[int, int], w: tuple[int, int], targets: Any, gradients: bool, *args: Any, **kwargs: Any
) -> int:
    """FLOPs of the products; high enough that no memory budget recomputes them."""
    return (6 if gradients else 2) * x[0] * w[0] * w[1]


add_gradients(_chunked)
register_flop_formula(torch.ops.torchxihe.linear_cross_entropy)(linear_cross_entropy_flops)
