"""The closed form of memory against the trainer's own step on fake tensors, so that it cannot drift from the code."""

from pathlib import Path

import pytest

from tests.distributed.fake_step import fake_step
from torchxihe.config.load import load_config
from torchxihe.plan.hardware import find_gpu
from torchxihe.plan.layout import layout_of
from torchxihe.plan.search import plan_of

CONFIGS = Path(__file__).parents[2] / "configs"
FEW_LAYERS = ["--model.num_hidden_layers=4", "--data.document_mask=false"]
LONG_ROWS = ["--data.seq_len=131072", "--model.num_hidden_layers=16"]
LLAMA, QWEN = "llama_1b", "xihe_120m"
"""Real widths, so that every term counts. LLAMA: a unit per block, untied, AdamW. QWEN: blocks share a unit, tied,
QK-norm, Muon."""


def flags(batch: int, checkpointing: str = "none", **degrees: object) -> list[str]:
    options = degrees | {"activation_checkpointing": checkpointing}
    parallelism = [f"--parallelism.{name}={str(value).lower()}" for name, value in options.items()]
    return [f"--training.global_batch_size={batch}", *parallelism]


SETTINGS = {
    "one process": (LLAMA, 1, flags(8)),
    "accumulation": (LLAMA, 1, flags(16)),
    "selective": (LLAMA, 1, flags(8, "selective")),
    "full": (LLAMA, 1, flags(8, "full")),
    "FSDP2 over 2": (LLAMA, 2, flags(16)),
    "FSDP2 over 4, accumulation": (LLAMA, 4, flags(64)),
    "FSDP2 over 4, selective": (LLAMA, 4, flags(32, "selective")),
    "FSDP2 over 4, full": (LLAMA, 4, flags(32, "full")),
    "FSDP2, not resharded, accumulation": (LLAMA, 2, flags(32, reshard_after_forward=False)),
    "HSDP": (LLAMA, 4, flags(16, dp_replicate=2)),
    "tp": (LLAMA, 2, flags(8, tp=2)),
    "tp, selective": (LLAMA, 2, flags(8, "selective", tp=2)),
    "tp, full": (LLAMA, 2, flags(8, "full", tp=2)),
    "cp": (LLAMA, 2, flags(8, cp=2)),
    "cp, selective": (LLAMA, 2, flags(8, "selective", cp=2)),
    "cp, full, long rows": (LLAMA, 4, [*flags(1, "full", cp=4), *LONG_ROWS]),
    "cp beyond the key-value heads": (LLAMA, 4, [*flags(8, cp=4), "--model.num_key_value_heads=2"]),
    "tp and cp": (LLAMA, 8, flags(16, tp=2, cp=2)),
    "moments in bfloat16": (LLAMA, 2, [*flags(4), "--optimizer.state_dtype=bfloat16"]),
    "float32": (LLAMA, 2, [*flags(16), "--training.dtype=float32"]),
    "a tiny micro-batch": (LLAMA, 2, flags(2, "full")),
    "Muon, one process": (QWEN, 1, flags(64)),
    "Muon, FSDP2 over 4": (QWEN, 4, flags(256)),
    "Muon, tp": (QWEN, 2, flags(64, tp=2)),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_the_closed_form_is_what_a_step_allocates(name: str) -> None:
    """Within 5 %. Seen to fail: 10 settings when the loss kept two chunks of logits, 6 when the closed form had none,
    accumulation under FSDP2 when it lacked the kept input of a reduction; with torch 2.11, long rows when
    the checkpoint was inside of what is compiled."""
    preset, gpus, overrides = SETTINGS[name]
    config = load_config(CONFIGS / f"{preset}.toml", [*FEW_LAYERS, *overrides])
    planned = plan_of(config, layout_of(config.parallelism, gpus), find_gpu("H100 80GB"))
    assert planned.memory.total == pytest.approx(fake_step(config, gpus), rel=0.05)
