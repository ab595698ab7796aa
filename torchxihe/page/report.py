"""The report of a run: one HTML file that needs no other, made from the run directory alone."""

import base64
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from torchxihe.components.checkpoint.manifest import CORRUPT, MANIFEST, Manifest, read_manifest, step_of
from torchxihe.components.checkpoint.storage import CorruptError, Location
from torchxihe.components.observe.curves import Lines, set_of, value_of
from torchxihe.data.tokenizer import encodable
from torchxihe.errors import UserError
from torchxihe.page.charts import draw_panels
from torchxihe.page.run_files import Incident, Message, RunFiles, incidents, samples, start_table
from torchxihe.utils.records import DamagedError, read_bounded
from torchxihe.utils.version import __version__
from torchxihe.utils.words import BYTES, duration, scaled

STATIC = Path(__file__).parent / "static"
LOG_BYTES = 64 * 2**20
"""The end of each log that is read."""
MOST_ROWS = 200
"""Rows of a table: the newest ones."""
MOST_SAMPLES = 20


def report_html(name: str, files: RunFiles) -> str:
    """The report of a run as a document of HTML; every value in it is escaped."""
    train, valid = files.metrics()
    messages = files.messages(LOG_BYTES)
    saved, corrupt = _checkpoints(files)
    status = files.status(train)
    style, script = ((STATIC / file).read_text(encoding="utf-8") for file in ("style.css", "hover.js"))
    title = f"{files.directory.resolve().name}"
    of = f" of {status.total:,}" if status.total else ""
    updated = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.updated)) if status.updated else "unknown"
    return encodable(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{content_policy(script)}">
<style>{style}</style></head><body><main class="report">
<h1>{escape(title)}</h1>
<p class="soft"><span class="state {status.state}">{status.state}</span> at step {status.step:,}{of},
last change {updated} · {escape(name)} · torchxihe {__version__}, {time.strftime("%Y-%m-%d %H:%M")}</p>
{_tiles(train, valid)}
{_section("Setup", _setup(messages))}
{_section("Curves", '<div class="panels">' + "".join(_panels(train, valid)) + "</div>" if train or valid else "")}
{_section("Data", _data(messages, train))}
{_section("Validation", _validation(valid))}
{_section("Samples", _samples(samples(messages)))}
{_section("Incidents", _incidents(incidents(messages, train, corrupt)))}
{_section("Checkpoints", saved)}
{_section("Config", _config(files.config_text()))}
</main><script>{script}</script></body></html>
""")


def content_policy(script: str) -> str:
    """A policy that lets a browser run this script, and load nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: Callable[[int], bool]) -> str:
    """Rows of HTML cells. numbers: whether a column is aligned to the right."""

    def row(tag: str, cells: Iterable[str]) -> str:
        kinds = (f'<{tag} class="n">' if numbers(i) else f"<{tag}>" for i in range(1000))
        return "<tr>" + "".join(f"{kind}{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=False)) + "</tr>"

    return f'<div class="scroll"><table>{row("th", head)}{"".join(row("td", cells) for cells in rows)}</table></div>'


def _finite(lines: Lines, key: str) -> list[float]:
    return [value for line in lines if math.isfinite(value := value_of(line, key))]


def _tiles(train: Lines, valid: Lines) -> str:
    """The most important numbers."""
    facts: list[tuple[str, str]] = []
    if train:
        facts.append((f"{train[-1]['step']:,}", "steps"))
        facts.append((scaled(train[-1].get("tokens", 0)), "tokens"))
    for key, what in (("loss", "training loss"), ("bpb", "bits per byte, training")):
        if values := _finite(train, key):
            facts.append((f"{values[-1]:.4f}", what))
    if scores := _finite(valid, "validation/loss"):
        facts.append((f"{scores[-1]:.4f}", f"validation loss (best {min(scores):.4f})"))
    if speeds := _finite(train, "tokens_per_second"):
        facts.append((scaled(statistics.median(speeds)), "tokens/s, median"))
    if used := _finite(train, "mfu"):
        facts.append((f"{100 * statistics.median(used):.1f} %", "MFU, median"))
    if held := _finite(train, "memory"):
        facts.append((f"{max(held):.1f} GiB", "peak memory of a process"))
    if len(times := _finite(train, "time")) > 1:
        facts.append((duration(max(times) - min(times)), "first to last logged step"))
    return (
        f'<div class="tiles">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in facts)}</div>'
    )


def _panels(train: Lines, valid: Lines) -> list[str]:
    return draw_panels({"": (train, valid)}, "step", 1)


def _setup(messages: list[Message]) -> str:
    rows = [(name, value) for name, value in start_table(messages) if name != "data"]
    cells = "".join(f'<tr><td class="key">{escape(name)}</td><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table>{cells}</table></div>' if rows else ""


def _data(messages: list[Message], train: Lines) -> str:
    """The sources and sets as logged at the start, with the last loss and the epochs of each."""
    rows = []
    for name, value in start_table(messages):
        if name == "data":
            source, _, what = value.partition(": ")
            loss, epochs = (_finite(train, f"{key}/{source}") for key in ("loss", "epoch"))
            numbers = f"{loss[-1]:.4f}" if loss else "", f"{epochs[-1]:.2f}" if epochs else ""
            rows.append((escape(source), escape(what), *numbers))
    columns = 4 if any(row[2] for row in rows) else 2
    head = ("source", "as planned at the last start", "last loss", "epochs read")[:columns]
    return table(head, (row[:columns] for row in rows), lambda i: i > 1) if rows else ""


def _validation(valid: Lines) -> str:
    """Last and best loss of the sources together, and of each source and set."""
    keys = dict.fromkeys(key for line in valid for key in line if key == "validation/loss" or set_of(key))
    rows = []
    for key in keys:
        measured = [line for line in valid if math.isfinite(line.get(key, math.nan))]
        if not measured:
            continue
        last, best = measured[-1], min(measured, key=lambda line: line[key])
        others = (last.get(key.removesuffix("loss") + measure, math.nan) for measure in ("perplexity", "bpb"))
        values = [f"{last['step']:,}", f"{last[key]:.4f}", *(f"{value:,.4g}" for value in others)]
        rows.append((escape(set_of(key)) or "all", *values, f"{best[key]:.4f}", f"{best['step']:,}"))
    head = ("held-out documents", "step", "loss", "perplexity", "bits/byte", "best loss", "at step")
    return table(head, rows, lambda i: i > 0) if rows else ""


def _samples(found: list[tuple[int, str]]) -> str:
    """The newest one, and those before it in order."""
    parts = [f"<h3>Step {step:,}</h3><pre>{escape(text)}</pre>" for step, text in reversed(found[-MOST_SAMPLES:])]
    earlier = f"<details><summary>earlier samples</summary>{''.join(parts[1:])}</details>" if parts[1:] else ""
    return "".join(parts[:1]) + earlier


def _incidents(found: list[Incident]) -> str:
    if not found:
        return '<p class="soft">None: no warning, no skipped step, no restart.</p>'
    rows = (
        (
            f'<span class="mono when">{escape(i.when)}</span>',
            f'<span class="kind {i.kind}">{i.kind}</span>',
            escape(i.text),
        )
        for i in found[-MOST_ROWS:]
    )
    more = f'<p class="soft">The newest {MOST_ROWS} of {len(found):,}.</p>' if len(found) > MOST_ROWS else ""
    return more + table(("time", "", ""), rows, lambda i: False)


def _checkpoints(files: RunFiles) -> tuple[str, dict[str, str]]:
    """A table of the checkpoints in the run directory, and the reasons of those that are marked corrupt."""
    folder, rows, corrupt = files.directory / "checkpoints", [], {}
    if not folder.is_dir() or not files.may_read(folder):
        return "", {}
    names = sorted((path.name for path in folder.iterdir() if step_of(path.name) >= 0), key=step_of)
    for name in names[-MOST_ROWS:]:
        manifest: Manifest | None = None
        try:
            reason = read_bounded(folder / name / CORRUPT, 10_000) if files.may_read(folder / name / CORRUPT) else b""
            corrupt[name] = " ".join(reason.decode(errors="replace").split())[:300]
        except (OSError, DamagedError):
            try:
                manifest = (
                    read_manifest(Location((folder / name).absolute()))
                    if files.may_read(folder / name / MANIFEST)
                    else None
                )
            except (CorruptError, OSError, UserError):
                continue
        rows.append((name, *_checkpoint(manifest)))
    head = ("checkpoint", "size", "validation loss", "content")
    return table(head, rows, lambda i: i in (1, 2)) if rows else "", corrupt


def _checkpoint(manifest: Manifest | None) -> tuple[str, str, str]:
    if manifest is None:
        return "", "", '<span class="kind error">corrupt</span>'
    loss: Any = manifest.validation_loss
    size = scaled(sum(size for size, _ in manifest.files.values()), BYTES)
    return size, "" if loss is None else f"{loss:.4f}", escape(", ".join(manifest.parts))


def _config(text: str) -> str:
    return f"<details><summary>config.toml, resolved</summary><pre>{escape(text)}</pre></details>" if text else ""
