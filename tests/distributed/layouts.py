"""The layouts that the tests compare with one process, and what they are trained on.

One list: the parity tests, the chains of checkpoints and the table in docs/parallelism.md are made from it
(`python -m tests.distributed.layouts` writes the table).
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.test_parity import BATCH, NAMES, VOCAB, config, rows_of
from torchxihe.data.loader import Batch
from torchxihe.parallelisms import data_parallel
from torchxihe.trainer import Trainer

STEPS, SEQ_LEN = 10, 24

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "num_key_value_heads": 4, "vocab_size": VOCAB},  # QK-norm, tied
    "llama": {"num_hidden_layers": 4, "qk_norm": False, "tie_word_embeddings": False, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 4, "rms_norm_eps": 1e-5},
}  # fmt: skip

# At higher rates FSDP2 alone differs by more than the tolerance after ten steps: rounding grows with the rate.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"name": "adamw", "lr": 2e-3}},
    # benchmarks/time_to_loss/entries/muon.toml at that rate: no warmup, a long decay.
    "muon": {
        "optimizer": {"name": "muon", "lr": 2e-3, "momentum": 0.9, "weight_decay": 0.28},
        "lr_scheduler": {"warmup_steps": 0, "decay_fraction": 0.7},
    },
}

INTERLEAVED = {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2": {"tp": 2},
    "tp 4": {"tp": 4},
    "FSDP2 2 × tp 2": {"dp_shard": 2, "tp": 2},
    "dp_replicate 2 × tp 2": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
    "HSDP 2 × 2 × tp 2": {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
    "cp 2": {"cp": 2},
    "cp 4": {"cp": 4},
    "cp 2, gather": {"cp": 2, "cp_method": "gather"},
    "cp 4, gather": {"cp": 4, "cp_method": "gather"},
    "FSDP2 2 × cp 2": {"dp_shard": 2, "cp": 2},
    "FSDP2 2 × cp 2, gather": {"dp_shard": 2, "cp": 2, "cp_method": "gather"},
    "pp 2": {"pp": 2},
    "pp 4": {"pp": 4},
    "pp 2, interleaved": INTERLEAVED,
    "pp 2 × FSDP2 2": {"pp": 2, "dp_shard": 2},
    "pp 2 × tp 2": {"pp": 2, "tp": 2},
    "pp 2 × cp 2 × tp 2": {"pp": 2, "cp": 2, "tp": 2},
    "tp 2 × cp 2": {"cp": 2, "tp": 2},
    "tp 2 × cp 2, gather": {"cp": 2, "tp": 2, "cp_method": "gather"},
    "dp_replicate 2 × cp 2, gather": {"dp_replicate": 2, "dp_shard": 1, "cp": 2, "cp_method": "gather"},
    "pp 2 × cp 2, gather": {"pp": 2, "cp": 2, "cp_method": "gather"},
    "pp 2 × dp_replicate 2": {"pp": 2, "dp_replicate": 2, "dp_shard": 1},
    "pp 2, interleaved, × HSDP 2 × 2": INTERLEAVED | {"dp_replicate": 2, "dp_shard": 2},
    "pp 2, interleaved, × tp 2": INTERLEAVED | {"tp": 2},
    "pp 2, interleaved, × cp 2": INTERLEAVED | {"cp": 2},
    "pp 2, interleaved, × cp 2, gather": INTERLEAVED | {"cp": 2, "cp_method": "gather"},
    "dp_replicate 2 × cp 2 × tp 2": {"dp_replicate": 2, "dp_shard": 1, "cp": 2, "tp": 2},
}


def processes(layout: dict[str, Any]) -> int:
    """How many processes a layout is of."""
    return math.prod(layout.get(axis, 1) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))


def micro_batch(layout: dict[str, Any]) -> int:
    """Rows of a micro-batch, for two of them a step, or as many as a pipeline needs."""
    return BATCH // (max(2, layout.get("pp", 1)) * layout.get("dp_replicate", 1) * layout.get("dp_shard", 1))


def batch_of(step: int, rows: list[int]) -> Batch:
    """These rows of the global batch, their targets masked unevenly, with documents whose borders lie anywhere."""
    tokens, targets = rows_of(step)
    tokens, targets = (np.tile(x, (1, 2))[:, :SEQ_LEN].copy() for x in (tokens, targets))
    generator = np.random.default_rng(100 + step)
    cuts = [sorted({0, *generator.integers(1, SEQ_LEN, 3).tolist()}) for _ in range(BATCH)]
    starts = [b * SEQ_LEN + at for b, row in enumerate(rows) for at in cuts[row]]
    cu_seqlens = torch.tensor([*starts, len(rows) * SEQ_LEN], dtype=torch.int32)
    chosen = torch.from_numpy(targets[rows])
    sources = torch.tensor([int(row >= 5) for row in rows])
    return Batch(torch.from_numpy(tokens[rows]), chosen, cu_seqlens, (), sources, int((chosen >= 0).sum()))


def train(options: dict[str, Any], micro_batch: int) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Loss, gradient norm and each source's loss of every step, and the parameters after the last."""
    data_parallel.UNIT_PARAMETERS = 1  # every block a unit of its own
    values = {name: dict(section) for name, section in options.items()}
    values["training"] = {"micro_batch_size": micro_batch} | values.get("training", {})
    values["data"] = {"seq_len": SEQ_LEN}
    trainer = Trainer(config(**values), torch.device("cpu"), np.ones(VOCAB, np.int32))
    spec = trainer.batch_spec
    history = []
    for step in range(STEPS):
        starts = [(i * spec.data_ranks + spec.data_rank) * spec.rows for i in range(trainer.accumulation)]
        trainer.train_step(iter([spec.cut(batch_of(step, [*range(g, g + spec.rows)])) for g in starts]))
        sums = trainer.sums.read(NAMES)
        history.append([sums[key] for key in ("loss", "grad_norm", "loss/a", "loss/b")])
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }
    return np.array(history), parameters


TECHNIQUES = {
    "FSDP2": lambda layout: layout.get("dp_shard", 1) > 1,
    "replicas": lambda layout: layout.get("dp_replicate", 1) > 1,
    "tp": lambda layout: "tp" in layout,
    "cp, Ulysses": lambda layout: "cp" in layout and "cp_method" not in layout,
    "cp, gather": lambda layout: "cp" in layout and "cp_method" in layout,
    "pp, 1F1B": lambda layout: "pp" in layout and "pp_schedule" not in layout,
    "pp, interleaved": lambda layout: "pp" in layout and "pp_schedule" in layout,
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
MARKS = "<!-- layouts: made by python -m tests.distributed.layouts -->", "<!-- end of layouts -->"


def table() -> str:
    """Which two techniques are tested together, on how many processes: Markdown."""
    lines = [f"| | {' | '.join(TECHNIQUES)} |", f"| --- |{' --- |' * len(TECHNIQUES)}"]
    for row, has in TECHNIQUES.items():
        cells = []
        for other in TECHNIQUES.values():
            both = sorted({processes(layout) for layout in LAYOUTS.values() if has(layout) and other(layout)})
            cells.append(", ".join(map(str, both)) or "–")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document() -> str:
    """docs/parallelism.md with the table as it should be."""
    text = DOCUMENT.read_text(encoding="utf-8")
    pattern = f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}"
    return re.sub(pattern, lambda _: f"{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
