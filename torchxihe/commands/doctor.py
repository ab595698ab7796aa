"""Compare every kernel that a run would use on this machine with its reference, and time both.

Kernels differ between GPUs, and so does what is installed: this is the test of a user's own card. The reference
computes in float32 from the same inputs; a kernel is right if its output and gradients are about as near to that as the
reference's own in the run's dtype.

Axes: B batch, T position in the row, N = B·T tokens, C hidden size, H query heads, K key-value heads, D head dimension.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError
from torchxihe.kernels.float8_cross_entropy import float8_cross_entropy
from torchxihe.kernels.float8_swiglu import swiglu_float8
from torchxihe.kernels.select import LABELS, REFERENCE, Kernels, not_chosen, select_kernels
from torchxihe.model.decoder import MLP, SelfAttention
from torchxihe.model.norm import rms_norm
from torchxihe.model.rope import rope_tables
from torchxihe.parallelisms.compile import compiles
from torchxihe.parsers import parse
from torchxihe.utils.device import compile_obstacle, compute_capability, default_device, device_name

ROWS, LONGEST, DOCUMENTS = 2, 2048, 5
REPEATS = 10
FLOAT8_ERROR = 0.1
"""Relative error of a product of float8 values: they have three bits of mantissa, gradients two."""


def main(args: list[str]) -> None:
    """Print the machine, the choices and a table. Raises UserError naming the kernels that are wrong here."""
    options = parse("doctor", args)
    config, device = load_config(options.config, options.overrides), default_device()
    kernels = select_kernels(config, device)
    print("\n".join(describe_machine(config, device, kernels)), flush=True)
    print(f"\n{'operation':24} {'kernel':18} {'error':>8} {'reference':>10} {'ms':>9} {'reference':>10}  verdict")
    wrong = []
    for finding in findings(config, device, kernels):
        print(finding.line(), flush=True)
        wrong += [] if finding.right else [f"{finding.operation} by {finding.kernel}"]
    if wrong:
        remedy = 'use model.attention = "sdpa" and model.mlp = "torch" where they are named, and report it'
        raise UserError(f"doctor: wrong results on this machine: {', '.join(wrong)}; {remedy}")


def describe_machine(config: Config, device: torch.device, kernels: Kernels) -> list[str]:
    """What is here, what a run would use of it, and why nothing faster."""
    versions = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        capability = ".".join(map(str, compute_capability(device)))
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        versions = [f"compute capability {capability}", f"{memory:.1f} GiB", *versions, f"CUDA {torch.version.cuda}"]
    compiler = compile_obstacle() or ("on" if compiles(config.training) else "off (training.compile)")
    return [
        f"machine    {', '.join([device_name(device), *versions])}",
        f"compiler   {compiler}",
        f"kernels    {kernels.describe()}",
        *(f"           not {line}" for line in not_chosen(config, device, kernels)),
    ]


@dataclass(frozen=True)
class Finding:
    """How a kernel compares with its reference."""

    operation: str
    kernel: str
    error: float
    """Largest relative difference of output and gradients from the reference in float32."""
    expected_error: float
    """The same of the reference in the run's dtype."""
    seconds: float
    """Of forward and backward."""
    reference_seconds: float
    bound: float
    """Of `error`."""

    @property
    def right(self) -> bool:
        """Also False if the error is not a number."""
        return self.error <= self.bound

    def line(self) -> str:
        """A row of the table."""
        speed = self.reference_seconds / self.seconds
        verdict = f"right, {speed:.2f} × as fast" if self.right else f"WRONG (at most {self.bound:.1e})"
        times = f"{self.seconds * 1e3:9.3f} {self.reference_seconds * 1e3:10.3f}"
        return f"{self.operation:24} {self.kernel:18} {self.error:8.1e} {self.expected_error:10.1e} {times}  {verdict}"


Operation = Callable[[Kernels, nn.Module], Callable[..., Any]]
"""From kernels and modules to a function of the inputs."""


def findings(config: Config, device: torch.device, kernels: Kernels) -> Iterator[Finding]:
    """Every operation of the config's model, with rows and documents of its length (at most 2048)."""
    model, dtype = config.model, getattr(torch, config.training.dtype)
    compiled = compiles(config.training)
    seq_len = min(config.data.seq_len, LONGEST)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    def weighted(module: nn.Module) -> nn.Module:
        module = module.to_empty(device=device)
        for weight in module.parameters():
            std = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
            nn.init.normal_(weight, 0.0 if weight.ndim > 1 else 1.0, std, generator=generator)
        return module

    with torch.device("meta"):
        attention, mlp = SelfAttention(model, REFERENCE), MLP(model, REFERENCE)
        table = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
    heads = [(ROWS, seq_len, n, model.head_dim) for n in (model.num_attention_heads, *[model.num_key_value_heads] * 2)]
    qkv = [random(*shape) for shape in heads]
    x_BTC = random(ROWS, seq_len, model.hidden_size)
    edges = sorted({*range(0, ROWS * seq_len, seq_len), *(seq_len * i * 2 // DOCUMENTS - 3 for i in (1, 2, 3, 4))})
    cu_seqlens = torch.tensor([*edges, ROWS * seq_len], dtype=torch.int32, device=device)
    cos_TD, sin_TD = (x.to(device) for x in rope_tables(seq_len, model.head_dim, model.rope_theta, device))
    targets_N = torch.randint(0, model.vocab_size, (ROWS * seq_len,), device=device, generator=generator)

    def attended(documents: Tensor | None) -> Operation:
        return lambda k, m: lambda q, key, value: k.attention(q, key, value, documents)

    def rotated(k: Kernels, m: nn.Module) -> Callable[..., Any]:
        layer: Any = m
        projections = layer.q_proj, layer.k_proj, layer.q_norm, layer.k_norm
        return lambda x: k.qk_norm_rope(x, *projections, cos_TD, sin_TD)

    def fed(k: Kernels, m: nn.Module) -> Callable[..., Any]:
        layer: Any = m
        return lambda x: k.swiglu(x, layer.gate_proj, layer.up_proj, layer.down_proj)

    def headed(k: Kernels, m: nn.Module) -> Callable[..., Any]:
        layer: Any = m
        return lambda x: k.cross_entropy(rms_norm(x, torch.ones_like(x[0]), 1e-6), layer.weight, targets_N)

    del attention.v_proj, attention.o_proj  # no part of what is compared
    nothing = nn.Module()
    cases: list[tuple[str, str, Operation, nn.Module, list[Tensor]]] = [
        ("attention", "attention", attended(None), nothing, qkv),
        ("attention in documents", "attention", attended(cu_seqlens), nothing, qkv),
        ("QK-norm and RoPE", "qk_norm_rope", rotated, weighted(attention), [x_BTC]),
        ("SwiGLU", "swiglu", fed, weighted(mlp), [x_BTC]),
        ("head and loss", "cross_entropy", headed, weighted(table), [x_BTC.flatten(0, 1)]),
    ]
    for operation, field, function, modules, inputs in cases:
        yield compare(operation, field, function, kernels, modules, inputs, compiled)


def compare(
    operation: str,
    field: str,
    function: Operation,
    kernels: Kernels,
    modules: nn.Module,
    inputs: list[Tensor],
    compiled: bool,
) -> Finding:
    """Run an operation by `kernels` and by the references, in the inputs' dtype, and by these in float32.

    `field`: of `Kernels`.
    """
    exactly = copy.deepcopy(modules).float()
    exact = results(function(REFERENCE, exactly), exactly, [x.float() for x in inputs])

    def measured(chosen: Kernels) -> tuple[float, float]:
        run = function(chosen, modules)
        run = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
        found = results(run, modules, inputs)
        return max(map(difference, found, exact)), seconds_of(lambda: results(run, modules, inputs))

    expected_error, reference_seconds = measured(REFERENCE)
    kernel: Any = getattr(kernels, field)
    error, seconds = expected_error, reference_seconds
    if kernel is not getattr(REFERENCE, field):
        error, seconds = measured(kernels)
    torch._dynamo.reset()
    bound = FLOAT8_ERROR if kernel in (swiglu_float8, float8_cross_entropy) else 2 * expected_error + 1e-4
    name = str(LABELS.get(kernel, kernel.__name__))
    return Finding(operation, name, error, expected_error, seconds, reference_seconds, bound)


def results(run: Callable[..., Any], modules: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed weighting of them by inputs and weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    total = torch.stack([(x.float() * _weights(x)).sum() for x in outs]).sum()
    return [*outs, *torch.autograd.grad(total, [*leaves, *modules.parameters()])]


def _weights(x: Tensor) -> Tensor:
    """Values between -1 and 1 that differ from element to element."""
    return torch.arange(1, x.numel() + 1, device=x.device).mul(0.7391).sin().view(x.shape)


def difference(found: Tensor, exact: Tensor) -> float:
    """Relative, of the norms; not a number if the result has any."""
    found, exact = found.detach(), exact.detach().float()
    return float((found.float() - exact).norm() / exact.norm().clamp(min=1e-30))


def seconds_of(action: Callable[[], object]) -> float:
    """Median of several runs, the device's work included."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = []
    for _ in range(REPEATS + 2):
        wait()
        start = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
