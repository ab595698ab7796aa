"""GPUs by name: memory, peak rates and links, and the rates that a training step reaches.

The reached rates are fitted to H100s and H200s (benchmarks/results/plan_h200_2026-11-27.md) and scaled by the
datasheets' figures for other GPUs. Links between hosts, and anything beyond four GPUs, are assumptions that nothing has
measured yet.
"""

from dataclasses import dataclass

from torchxihe.errors import UserError
from torchxihe.utils.device import PEAK_BF16_TFLOPS

# Memory as CUDA reports it in GiB, memory bandwidth in TB/s, link to the other GPUs of the host in GB/s and direction.
DATASHEETS = {
    "NVIDIA A100-SXM4-40GB": (39.4, 1.555, 300),
    "NVIDIA A100-SXM4-80GB": (79.2, 2.039, 300),
    "NVIDIA A100-PCIE-40GB": (39.4, 1.555, 32),
    "NVIDIA A100 80GB PCIe": (79.2, 1.935, 32),
    "NVIDIA H100 80GB HBM3": (79.1, 3.35, 450),
    "NVIDIA H100 PCIe": (79.1, 2.0, 64),
    "NVIDIA H100 NVL": (93.1, 3.9, 300),
    "NVIDIA H200": (139.8, 4.8, 450),
    "NVIDIA H200 NVL": (139.8, 4.8, 450),
    "NVIDIA GH200 480GB": (94.5, 4.0, 450),
    "NVIDIA B200": (178.4, 8.0, 900),
    "NVIDIA GeForce RTX 3090": (23.6, 0.936, 32),
    "NVIDIA GeForce RTX 4090": (23.5, 1.008, 32),
    "NVIDIA GeForce RTX 5090": (31.4, 1.792, 64),
    "NVIDIA L4": (22.0, 0.3, 32),
    "NVIDIA L40S": (44.4, 0.864, 32),
    "NVIDIA A10G": (22.0, 0.6, 32),
}
HOPPER = ("H100", "H200", "GH200")


# Fitted to 38 settings on one to four H100s and H200s, 120 M to 8 B (benchmarks/results/plan_h200_2026-11-27.md).
H100_PRODUCTS = 684e12
H100_ATTENTION = {0: 440e12, 128: 510e12}
H100_TRAFFIC = 3.2e12
H100_LINK = 290e9
HALF_WIDTH = 155
"""Width k of a product at which it reaches half of the rate of a large one: k / (k + HALF_WIDTH)."""
FLOAT8_GAIN = 1.33
"""Of the blocks' products."""
FLOAT8_HEAD_GAIN = 1.75
"""Of the head's, whose factors are quantised by kernels that run anyway."""

# Assumed: nothing here has been measured.
FLOAT32_LOSS = 15
"""Of products with training.dtype = "float32", which do not use tensor cores: an H100's datasheet."""
HOST_GPUS = 8
"""GPUs of one host."""
NETWORK = 40e9
"""Bytes/s and GPU between hosts, of an adapter of 400 Gbit/s for each GPU."""
HOST_HOP, NETWORK_HOP = 3e-6, 10e-6
"""Seconds of latency from GPU to GPU, and from host to host, of a ring."""
CONTEXT, CHANNELS = 0.5 * 2**30, 1.0 * 2**30
"""Bytes of a CUDA context, and of NCCL's buffers where there are several GPUs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, and what a training step reaches on it."""

    name: str
    memory: float
    """Bytes."""
    peak: float
    """Dense bf16 FLOP/s, to which MFU refers."""
    products: float
    """FLOP/s of a large matrix product."""
    attention: dict[int, float]
    """FLOP/s of causal attention by head dimension, the largest not above the model's."""
    traffic: float
    """Bytes/s from and to memory."""
    link: float
    """Bytes/s that each GPU sends in a collective within a host."""
    hopper: bool
    """Whether quack's SwiGLU works."""


def find_gpu(name: str) -> Gpu:
    """The GPU whose name has all words of `name`: "H100 80GB". Raises UserError."""
    words = name.lower().replace("-", " ").split()
    found = [known for known in DATASHEETS if words and all(word in known.lower() for word in words)]
    if len(found) > 1:  # "H200" is one, and part of another's name
        found = [known for known in found if known.lower().endswith(name.lower())] or found
    if len(found) != 1:
        what = "fits several GPUs" if found else "unknown GPU"
        known = ", ".join(known.removeprefix("NVIDIA ") for known in found or DATASHEETS)
        raise UserError(f"--gpu: {name}: {what}; choose one of: {known}")
    return _gpu(found[0])


def known_gpu(name: str) -> Gpu | None:
    """The GPU of exactly this name, as `torch.cuda.get_device_name()` returns it."""
    return _gpu(name) if name in DATASHEETS else None


def _gpu(name: str) -> Gpu:
    memory, bandwidth, link = DATASHEETS[name]
    peak = PEAK_BF16_TFLOPS[name] * 1e12
    flops, speed = peak / 989.4e12, bandwidth / 3.35  # relative to an H100 SXM
    return Gpu(
        name=name.removeprefix("NVIDIA "),
        memory=memory * 2**30,
        peak=peak,
        products=H100_PRODUCTS * flops,
        attention={dim: rate * flops for dim, rate in H100_ATTENTION.items()},
        traffic=H100_TRAFFIC * speed,
        link=H100_LINK * link / 450,
        hopper=any(word in name for word in HOPPER),
    )
