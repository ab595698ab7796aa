"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/), with its work divided over all ranks.

Matrices of one shape, mesh and placements are updated together. Orthogonalisation needs full matrices, and each rank
holds a rectangle of each of them: all of it in one process and under DDP, some rows under FSDP2, rows or columns of
these under tensor parallelism. So the replicas divide the matrices among themselves, and in each replica the ranks
exchange rectangles (all-to-all) until each has its share of the full matrices; the updates return the same way. No
matrix is orthogonalised twice.

Axes: K matrices of one shape, R rows, C columns.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from torchxihe.utils.distributed import all_gather_single, local_part, mesh_group

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalize(x_KRC: Tensor) -> Tensor:
    """Each matrix with singular values moved to about 1 (0.7 to 1.2), in x's dtype: five Newton-Schulz iterations.

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
    """Update the momentum with grad / grad_scale, in place unless `skip`; returns Nesterov's look-ahead in `dtype`."""
    grad = grad / grad_scale
    moved = buffer.to(grad.dtype).lerp(grad, 1 - momentum)
    buffer.copy_(torch.where(skip, buffer, moved))
    return grad.lerp(moved, momentum).to(dtype)


def apply_update(weight: Tensor, update: Tensor, keep: Tensor, rate: Tensor, skip: Tensor) -> None:
    """weight · keep - rate · update, in place unless `skip`.

    keep and rate are device scalars: as Python numbers they would be compiled in as constants.
    """
    moved = weight * keep - rate * update.to(weight.dtype)
    weight.copy_(torch.where(skip, weight, moved))


class Muon(torch.optim.Optimizer):
    """Muon for matrices and a given optimizer for all other parameters, stepped together.

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
        replicas: dist.ProcessGroup | None,
        compile: bool,
    ) -> None:
        """`matrices` are 2-D, plain or DTensors; `replicas` are the ranks that hold the plain ones too.

        `dtype` is what they are orthogonalised in, `state_dtype` what their momentum is kept in.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._rest, self._dtype = rest, dtype
        self._advance = torch.compile(advance_momentum, dynamic=False) if compile else advance_momentum
        self._apply = torch.compile(apply_update, dynamic=False) if compile else apply_update
        alike: dict[Any, list[nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            alike.setdefault((parameter.shape, _layout(parameter)), []).append(parameter)
        self._stacks = [
            (same, self._create_state(same, state_dtype), _exchange(same[0], replicas)) for same in alike.values()
        ]
        self.state.update(rest.state)
        rest.state = self.state
        self.param_groups += rest.param_groups

    def _create_state(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> Tensor:
        """The momentum of matrices laid out alike as one tensor [K, local R, local C]; each one's state is a view."""
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
        for parameters, momentum_KRC, exchange in self._stacks:
            rows, columns = parameters[0].shape
            grad_KRC = torch.stack([local_part(cast("Tensor", parameter.grad)) for parameter in parameters])
            update_KRC = self._advance(momentum_KRC, grad_KRC, self.grad_scale, group["momentum"], skip, self._dtype)
            update_KRC = exchange(orthogonalize, update_KRC)
            rate = torch.full_like(keep, 0.2 * max(rows, columns) ** 0.5 * lr)
            for parameter, update in zip(parameters, update_KRC.unbind(), strict=True):
                self._apply(local_part(parameter), update, keep, rate, skip)


Rectangle = tuple[slice, slice]
"""Rows and columns of a matrix."""


class Exchange:
    """Applies a function of full matrices to matrices of which each rank holds a rectangle."""

    def __init__(
        self, rectangles: list[Rectangle], shards: dist.ProcessGroup | None, replicas: dist.ProcessGroup | None
    ) -> None:
        """`rectangles`: what each rank of `shards` holds, which together make up the matrix; `replicas`: the ranks that
        hold the same rectangle as this one. None: this rank alone."""
        self._rectangles, self._shards, self._replicas = rectangles, shards, replicas

    def __call__(self, fn: Callable[[Tensor], Tensor], local_KRC: Tensor) -> Tensor:
        """`fn` of each matrix, of which this rank holds and gets back its rectangle: [K, local R, local C].

        Collective over shards and replicas; the host waits for nothing.
        """
        replica, replicas = _place(self._replicas)
        most = -(-len(local_KRC) // replicas)  # matrices a replica
        mine_KRC = local_KRC[replica * most : (replica + 1) * most]
        mine_KRC = fn(mine_KRC) if self._shards is None else self._in_shards(fn, mine_KRC, self._shards)
        if self._replicas is None:
            return mine_KRC
        all_KRC = local_KRC.new_empty(replicas * most, *local_KRC.shape[1:])
        padded = all_KRC[replica * most : (replica + 1) * most]
        padded[: len(mine_KRC)] = mine_KRC
        all_gather_single(all_KRC, padded, group=self._replicas)
        return all_KRC[: len(local_KRC)]

    def _in_shards(self, fn: Callable[[Tensor], Tensor], local_KRC: Tensor, shards: dist.ProcessGroup) -> Tensor:
        """The same in one replica: rank j gets the j-th part of the full matrices and sends the results back."""
        shard, ranks = _place(shards)
        counts = _parts(len(local_KRC), ranks)
        own, area = counts[shard], local_KRC[0].numel() if len(local_KRC) else 0
        shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in self._rectangles]
        to_owners = [count * area for count in counts]
        to_shards = [own * rows * columns for rows, columns in shapes]
        received = _all_to_all(local_KRC.flatten(), to_owners, to_shards, shards)
        full_KRC = local_KRC.new_empty(
            own, max(rows.stop for rows, _ in self._rectangles), max(columns.stop for _, columns in self._rectangles)
        )
        for piece, shape, (rows, columns) in zip(received.split(to_shards), shapes, self._rectangles, strict=True):
            full_KRC[:, rows, columns] = piece.view(own, *shape)
        full_KRC = fn(full_KRC)
        pieces = [full_KRC[:, rows, columns].flatten() for rows, columns in self._rectangles]
        return _all_to_all(torch.cat(pieces), to_shards, to_owners, shards).view(local_KRC.shape)


def _all_to_all(sent: Tensor, sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send parts of `sizes` to the ranks of `group`, and receive parts of `received_sizes` from them."""
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sizes, group=group)
    return received


def _layout(parameter: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """Mesh and placements of a DTensor; None for a plain tensor."""
    return (parameter.device_mesh, tuple(parameter.placements)) if isinstance(parameter, DTensor) else None


def _exchange(matrix: Tensor, replicas: dist.ProcessGroup | None) -> Exchange:
    """The exchange of matrices that are laid out like this one; `replicas` hold it too if it is no DTensor."""
    layout = _layout(matrix)
    if layout is None:
        return Exchange([], None, replicas)
    mesh, placements = layout
    assert mesh.mesh_dim_names is not None

    def group(names: list[str]) -> dist.ProcessGroup | None:
        spread = [name for name in names if mesh[name].size() > 1]
        return mesh_group(mesh, spread) if spread else None

    dims = [(name, placement) for name, placement in zip(mesh.mesh_dim_names, placements, strict=True)]
    # Not `is_shard()`: a strided shard is none (torch 2.13).
    sharding = {name: placement for name, placement in dims if not placement.is_replicate()}
    rectangles = shard_rectangles(matrix.shape, [mesh[name].size() for name in sharding], [*sharding.values()])
    return Exchange(rectangles, group([*sharding]), group([name for name, _ in dims if name not in sharding]))


def shard_rectangles(shape: torch.Size, sizes: list[int], placements: list[Placement]) -> list[Rectangle]:
    """What each rank of a mesh of `sizes`, in row-major order, holds of a matrix of `shape` by `placements` (shards).

    A dimension of the mesh cuts what those before it have left; one with a strided placement (FSDP2's over tensor
    parallelism's) what those behind it have left.
    """
    strided = [hasattr(placement, "split_factor") for placement in placements]
    order = [i for i, late in enumerate(strided) if not late]
    order += [i for i, late in reversed([*enumerate(strided)]) if late]
    rectangles = []
    for place in itertools.product(*map(range, sizes)):
        spans = [(0, size) for size in shape]
        for i in order:
            dim = cast("Shard", placements[i]).dim
            start, stop = spans[dim]
            part = -(-(stop - start) // sizes[i])
            spans[dim] = min(start + place[i] * part, stop), min(start + (place[i] + 1) * part, stop)
        rectangles.append((slice(*spans[0]), slice(*spans[1])))
    return rectangles


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's number in a group, and the group's size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _parts(n: int, parts: int) -> list[int]:
    """`n` things in equal parts, rounded up, while they last."""
    most = -(-n // parts)
    return [max(0, min(most, n - part * most)) for part in range(parts)]
