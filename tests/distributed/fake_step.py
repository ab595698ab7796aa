"""The trainer's own step on fake tensors, with every allocation counted: the memory of a GPU that is not here.

Tensors are fake ones on "cpu", the process group is torch's fake one, and what runs is `parallelize`, forward,
backward, gradient norm and optimizer of the trainer, compiled up to the point where a backend would generate code.
Kernels are those of a GPU; their `register_fake` is all that is needed of them.
"""

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import torchxihe.kernels.linear_cross_entropy as loss
import torchxihe.parallelisms.dims
import torchxihe.utils.distributed
from torchxihe.config.options import Config
from torchxihe.data.loader import random_batch
from torchxihe.kernels.flash_attention_4 import fa4
from torchxihe.kernels.linear_cross_entropy import linear_cross_entropy
from torchxihe.kernels.qk_norm_rope import qk_norm_rope_triton
from torchxihe.kernels.quack_swiglu import swiglu_quack
from torchxihe.kernels.select import Kernels
from torchxihe.model.decoder import Decoder
from torchxihe.parallelisms import parallelize
from torchxihe.parallelisms.dims import build_dims
from torchxihe.trainer import Trainer

GPU_KERNELS = Kernels(fa4, qk_norm_rope_triton, swiglu_quack, linear_cross_entropy)
ROUNDED = 512  # bytes, as CUDA's caching allocator does


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that exist; `peak` is the largest number since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored = self._inside_loss = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile runs compiled code under it, rather than falling back to eager."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes back with the local tensors
        if func is torch.ops.torchxihe.linear_cross_entropy.default and not self._inside_loss:
            self._inside_loss = True  # run what it does: its chunks of logits count too
            with self:
                out = loss._chunked._init_fn(*args, **(kwargs or {}))
            self._inside_loss = False
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not self._ignored:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            self._references[key] = weakref.ref(storage, functools.partial(self._free, key))
        self._resize(storage)

    def _resize(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            size = -(-storage.nbytes() // ROUNDED) * ROUNDED
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self.peak = max(self.peak, self.live)

    def _free(self, key: int, _: object) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Context in which FSDP2's resizing of storages is seen, and DTensor's propagation of shapes is not."""
        resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            self._resize(storage)
            return out

        def propagated(*args: Any, **kwargs: Any) -> Any:
            self._ignored = True
            try:
                return propagate(*args, **kwargs)
            finally:
                self._ignored = False

        with (
            mock.patch.object(torch.UntypedStorage, "resize_", resized),
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated),
            self,
        ):
            yield


class OnCpu(Decoder):
    """Built on "cpu" at once, where fake tensors cost nothing: leaving "meta" does not work with them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            super().__init__(*args, **kwargs)
            self.cos_TD, self.sin_TD = torch.empty(self.cos_TD.shape), torch.empty(self.sin_TD.shape)

    def to_empty(self, **_: Any) -> "OnCpu":
        return self

    def init_weights(self, seed: int) -> None:
        pass


def _with_real_tensors(name: str) -> Any:
    """A patch under which a method of device meshes computes ranks outside of the fake mode."""
    method = getattr(DeviceMesh, name)

    def outside(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    static = isinstance(DeviceMesh.__dict__[name], staticmethod)
    return mock.patch.object(DeviceMesh, name, staticmethod(outside) if static else outside)


def _same(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return group  # a fake group has no timeout


@contextlib.contextmanager
def _fake_world(gpus: int) -> Iterator[None]:
    """A fake process group of `gpus` processes, of which this is the first."""
    with (
        mock.patch.dict("os.environ", {"WORLD_SIZE": str(gpus), "RANK": "0"}),
        mock.patch.object(torchxihe.utils.distributed, "use_default_timeout", _same),
        mock.patch.object(torchxihe.parallelisms.dims, "use_default_timeout", _same),
        _with_real_tensors("_concatenate"),
        _with_real_tensors("_flatten"),
    ):
        if gpus > 1:
            dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
        try:
            yield
        finally:
            if gpus > 1:
                dist.destroy_process_group()


def _in_place(*_: Any) -> None:
    """What the GPU's versions of these functions allocate."""


def fake_step(config: Config, gpus: int) -> int:
    """Peak bytes of one of `gpus` GPUs in two steps of `config`, compiled, with one document per row.

    Not for DDP, whose reducer needs real memory.
    """
    storages = Storages()
    graphs = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    torch._dynamo.reset()
    with (
        _fake_world(gpus),
        mock.patch.object(torch, "compile", graphs),
        mock.patch.object(parallelize, "Decoder", OnCpu),
        mock.patch.object(loss, "_cross_entropy_", _in_place),
        mock.patch.object(loss, "_log2_sum_exp", lambda logits: logits.new_empty(logits.shape[0], dtype=torch.float32)),
        mock.patch.object(loss, "_softmax_gradient_", _in_place),
        mock.patch.object(loss, "_add_product", _in_place),
    ):
        dims = build_dims(config.parallelism)
        if gpus > 1:  # the mesh and its groups need real tensors
            _ = dims._mesh, dims._grid, [dims.group(axis) for axis in ("data", "loss", "stage", "copy", "world")]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, storages.counting():
            bytes_per_token = np.ones(config.model.vocab_size, np.int32)
            trainer = Trainer(config, torch.device("cpu"), bytes_per_token, dims=dims, kernels=GPU_KERNELS)
            with unset_fake_temporarily():  # context parallelism reads the documents' lengths
                batch = random_batch(trainer.batch_spec, config.model.vocab_size, documents=1)
            tensors = {name: mode.from_tensor(x) for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
            batch = dataclasses.replace(batch, **tensors)
            storages.peak = storages.live  # the model was built unsharded
            for _ in range(2):
                trainer.train_step(itertools.repeat(batch))
    return storages.peak
