"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/), with its work divided over all ranks.

Matrices of one shape are updated together. Each rank holds some rows of each of them: all rows in one process and under
DDP, a shard under FSDP2 and HSDP. Orthogonalisation needs whole matrices, so the replicas divide the matrices among
themselves, and in each replica the ranks exchange rows until everyone has whole matrices, its own share of them; their
updates go the same way back. No rank orthogonalises what another does.

Axes: K matrices of one shape, R rows, C columns.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchxihe.utils.distributed import local_part

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalize(x_KRC: Tensor) -> Tensor:
    """Each matrix with its singular values moved to about 1 (0.7 to 1.2), in x's dtype: five Newton-Schulz steps.

    The quintic aX + bXX'X + cXX'XX'X has the steepest slope at zero that still stays bounded: it does not converge to
    exactly 1, which makes no difference to training.
    """
    a, b, c = COEFFICIENTS
    tall = x_KRC.shape[-2] > x_KRC.shape[-1]
    x = x_KRC / torch.linalg.vector_norm(x_KRC, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x.mT @ x if tall else x @ x.mT  # of the shorter side
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def advance_momentum(
    buffer: Tensor, grad: Tensor, grad_scale: Tensor, momentum: float, skip: Tensor, dtype: torch.dtype
) -> Tensor:
    """Move the momentum towards grad / grad_scale, in place unless `skip`; Nesterov's look ahead, in `dtype`."""
    grad = grad / grad_scale
    moved = buffer.to(grad.dtype).lerp(grad, 1 - momentum)
    buffer.copy_(torch.where(skip, buffer, moved))
    return grad.lerp(moved, momentum).to(dtype)


def apply_update(weight: Tensor, update: Tensor, keep: Tensor, rate: Tensor, skip: Tensor) -> None:
    """weight · keep - rate · update, in place unless `skip`.

    keep and rate are scalars on the device: as numbers, others in each step, they would be compiled in.
    """
    moved = weight * keep - rate * update.to(weight.dtype)
    weight.copy_(torch.where(skip, weight, moved))


class Muon(torch.optim.Optimizer):
    """Muon for matrices, the optimizer given with them for everything else; one step of the two together.

    The update of a matrix is scaled by 0.2 · sqrt(max(rows, columns)), which gives it the root mean square of AdamW's
    (arXiv:2502.16982): one learning rate and one weight decay serve both. Two float32 scalars on the device must be set
    before each step: `grad_scale`, by which gradients are divided, and `found_inf`; above 0 it makes the step leave all
    parameters and all state as they are, bit for bit.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: torch.optim.Optimizer,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        mesh: DeviceMesh | None,
        compile: bool,
    ) -> None:
        """`matrices` are 2-D: plain, or sharded by rows over `mesh`'s dp_shard.

        `dtype` is what they are orthogonalised in, `state_dtype` what their momentum is kept in.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._rest, self._dtype, self._exchange = rest, dtype, Exchange(mesh)
        self._advance = torch.compile(advance_momentum, dynamic=False) if compile else advance_momentum
        self._apply = torch.compile(apply_update, dynamic=False) if compile else apply_update
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self._stacks = [(same, self._create_state(same, state_dtype)) for same in by_shape.values()]
        self.state.update(rest.state)
        rest.state = self.state
        self.param_groups += rest.param_groups

    def _create_state(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
        """The momentum of matrices of one shape as one tensor [K, local rows, C]; each one's state is a view of it."""
        stack = torch.stack([torch.zeros_like(local_part(parameter), dtype=dtype) for parameter in parameters])
        for parameter, buffer in zip(parameters, stack.unbind(), strict=True):
            if isinstance(parameter, DTensor):
                buffer = DTensor.from_local(
                    buffer,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            self.state[parameter]["momentum_buffer"] = buffer
        return stack

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients, which every parameter must have."""
        self._rest.grad_scale, self._rest.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self._rest.step()
        skip, group = self.found_inf > 0, self.param_groups[0]
        lr: float = group["lr"]
        keep = torch.full_like(self.grad_scale, 1 - lr * group["weight_decay"])
        for parameters, momentum_KRC in self._stacks:
            rows, columns = parameters[0].shape
            grad_KRC = torch.stack([local_part(cast("Tensor", parameter.grad)) for parameter in parameters])
            update_KRC = self._advance(momentum_KRC, grad_KRC, self.grad_scale, group["momentum"], skip, self._dtype)
            update_KRC = self._exchange(orthogonalize, update_KRC, rows)
            rate = torch.full_like(keep, 0.2 * max(rows, columns) ** 0.5 * lr)
            for parameter, update in zip(parameters, update_KRC.unbind(), strict=True):
                self._apply(local_part(parameter), update, keep, rate, skip)


class Exchange:
    """Applies a function of whole matrices to matrices of which each rank holds some rows."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self._replicas, self._replica = _place(mesh, "dp_replicate")
        self._shards, self._shard = _place(mesh, "dp_shard")
        self._mesh = mesh

    def __call__(self, fn: Callable[[Tensor], Tensor], local_KRC: Tensor, rows: int) -> Tensor:
        """`fn` of each [rows, C] matrix, of which this rank holds and gets back its rows: [K, local rows, C].

        Collective over the mesh; the host waits for nothing.
        """
        if self._mesh is None:
            return fn(local_KRC)
        most = -(-len(local_KRC) // self._replicas)  # matrices a replica
        mine_KRC = local_KRC[self._replica * most : (self._replica + 1) * most]
        mine_KRC = self._in_shards(fn, mine_KRC, rows) if self._shards > 1 else fn(mine_KRC)
        if self._replicas == 1:
            return mine_KRC
        all_KRC = local_KRC.new_empty(self._replicas * most, *local_KRC.shape[1:])
        padded = all_KRC[self._replica * most : (self._replica + 1) * most]
        padded[: len(mine_KRC)] = mine_KRC
        dist.all_gather_into_tensor(all_KRC, padded, group=self._mesh.get_group("dp_replicate"))
        return all_KRC[: len(local_KRC)]

    def _in_shards(self, fn: Callable[[Tensor], Tensor], local_KRC: Tensor, rows: int) -> Tensor:
        """The same in one replica: rank j gets the j-th part of the matrices whole, and sends the results back."""
        matrices, row_counts = _parts(len(local_KRC), self._shards), _parts(rows, self._shards)
        columns = local_KRC.shape[2]
        own, local_rows = matrices[self._shard], row_counts[self._shard]
        to_owners = [count * local_rows * columns for count in matrices]
        to_shards = [own * count * columns for count in row_counts]
        received = self._all_to_all(local_KRC.flatten(), to_owners, to_shards)
        pieces = [
            piece.view(own, count, columns) for piece, count in zip(received.split(to_shards), row_counts, strict=True)
        ]
        whole_KRC = fn(torch.cat(pieces, dim=1))
        pieces = [piece.flatten() for piece in whole_KRC.split(row_counts, dim=1)]
        return self._all_to_all(torch.cat(pieces), to_shards, to_owners).view(local_KRC.shape)

    def _all_to_all(self, sent: Tensor, input_sizes: list[int], output_sizes: list[int]) -> Tensor:
        received = sent.new_empty(sum(output_sizes))
        assert self._mesh is not None
        dist.all_to_all_single(received, sent, output_sizes, input_sizes, group=self._mesh.get_group("dp_shard"))
        return received


def _place(mesh: DeviceMesh | None, dim: str) -> tuple[int, int]:
    """Size of a mesh dimension, and this rank's place in it."""
    return (1, 0) if mesh is None else (mesh[dim].size(), mesh.get_local_rank(dim))


def _parts(n: int, parts: int) -> list[int]:
    """How Shard divides n rows: equal parts, rounded up, while they last."""
    most = -(-n // parts)
    return [max(0, min(most, n - part * most)) for part in range(parts)]
