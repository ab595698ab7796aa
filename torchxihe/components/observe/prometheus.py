"""The latest metrics as a text file in Prometheus' format, for node_exporter's textfile collector."""

import os
import re
from pathlib import Path

from torchxihe.utils.files import draft

PROMETHEUS = "metrics.prom"


def write_prometheus(run_dir: Path, metrics: dict[str, float]) -> None:
    """Replace `run_dir`/metrics.prom atomically; a reader sees the old or the new file. Raises OSError."""
    path = run_dir / PROMETHEUS
    temporary = draft(path)
    temporary.write_text(prometheus_text(run_dir.name, metrics), encoding="utf-8")
    os.replace(temporary, path)


def prometheus_text(run: str, metrics: dict[str, float]) -> str:
    """One gauge per metric, labelled with the run, and with the rank, source or validation set where there are several.

    `metrics` has the keys of metrics.jsonl, and finite values.
    """
    samples: dict[str, list[str]] = {}
    for key, value in metrics.items():
        name, labels = _name(key), {"run": run} | _labels(key)
        text = ",".join(f'{label}="{_escape(content)}"' for label, content in labels.items())
        samples.setdefault(name, []).append(f"{name}{{{text}}} {value!r}")
    lines = [line for name, found in samples.items() for line in (f"# TYPE {name} gauge", *found)]
    return "\n".join(lines) + "\n"


def _parts(key: str) -> tuple[str, str, str]:
    """Name of a metric, and the label by which there are several of it with its value; empty if there is one."""
    first, _, rest = key.partition("/")
    if not rest:
        return first, "", ""
    if first == "validation":
        what, last = rest.rpartition("/")[::2]
        return f"validation_{last}", "set" if what else "", what
    return first, "rank" if rest.isdecimal() else "source", rest


def _name(key: str) -> str:
    return "torchxihe_" + re.sub(r"[^a-zA-Z0-9_]", "_", _parts(key)[0])


def _labels(key: str) -> dict[str, str]:
    _, label, value = _parts(key)
    return {label: value} if label else {}


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
