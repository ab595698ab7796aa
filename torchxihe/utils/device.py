"""The device: its name, capabilities and memory."""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import torch

# Dense bf16 TFLOP/s by the vendors' datasheets, by the exact name that `torch.cuda.get_device_name()` returns.
PEAK_BF16_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA A10G": 70.0,
}


def default_device(local_rank: int = 0) -> torch.device:
    """This process's GPU, or the CPU on a machine without one."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The device's exact name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def compute_capability(device: torch.device) -> tuple[int, int]:
    """CUDA's number of the GPU's generation: (8, 0) Ampere, (9, 0) Hopper; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def peak_flops(device: torch.device) -> float:
    """Peak dense bf16 FLOP/s of `device`; 0.0 where the table has no such device."""
    return PEAK_BF16_TFLOPS.get(device_name(device), 0.0) * 1e12


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Peak GiB allocated and reserved on `device` since `reset_peak_memory`; zeros on a CPU."""
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30


def host_memory_gib() -> float:
    """GiB of the host's memory that this process has resident; 0.0 where there is no /proc."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30 if file.exists() else 0.0


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container (cgroup) that this process runs in if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.exists() and (text := file.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


@functools.cache
def compile_obstacle() -> str:
    """Why torch.compile and Triton cannot work on this machine ("" if they can): they build C++ or C at run time."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++")):
        return "there is no C++ compiler (g++ or clang++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are missing (Debian: python3-dev)"
    return ""
