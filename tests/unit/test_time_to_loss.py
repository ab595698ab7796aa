"""The time-to-loss track: its corpus, and an entry from a list of packages to a line of JSON."""

import base64
import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tests.unit.tiny_model import TINY_MODEL
from torchxihe.errors import UserError

TRACK = Path(__file__).parents[2] / "benchmarks" / "time_to_loss"
TINY = (
    """
extends = "base.toml"
run.dir = "runs"
data.seq_len = 64
data.cache_dir = "cache"
tokenizer.vocab_size = 300
validation = {fraction = 0.2, every = 4}
training = {steps = 12, global_batch_size = 4, micro_batch_size = 4, dtype = "float32", compile = false}
checkpoint.every = 4
metrics = {log_every = 3, sample_tokens = 0}
[[data.sources]]
path = "corpus"
glob = "**/*.py"
"""
    + TINY_MODEL
)

SETTINGS = """
jobs = [["adamw", 0], ["muon", 1]]
code = {target = 0.0, data_key = ""}
english = {target = 0.0, data_key = ""}
"""
MODULES = {
    "one-package": ["argparse.py", "ast.py", "bisect.py", "calendar.py", "cmd.py"],
    "another": ["codeop.py", "copy.py", "csv.py", "decimal.py", "difflib.py", "dis.py"],
}
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def files_of(name: str) -> dict[str, bytes]:
    """What of a wheel belongs to the corpus."""
    stem = name.replace("-", "_")
    files = {f"{stem}/{module}": (LIBRARY / module).read_bytes() for module in MODULES[name]}
    return files | {f"{stem}_more.py": b"name = 1\n" * 200}


def package(name: str) -> dict[str, Any]:
    """Its entry in the list."""
    files = files_of(name)
    lines = "".join(f"{path} {hashlib.sha256(files[path]).hexdigest()}\n" for path in sorted(files))
    return {
        "name": name,
        "version": "1.0",
        "files": len(files),
        "bytes": sum(map(len, files.values())),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def write_list(track: Path, *packages: dict[str, Any]) -> None:
    (track / "code.json").write_text(json.dumps({"python": "3.12", "packages": packages}))


def write_wheel(folder: Path, name: str) -> None:
    """A wheel of modules of the standard library, with a test and data, neither of which belongs to the corpus."""
    folder.mkdir(exist_ok=True)
    stem = name.replace("-", "_")
    with zipfile.ZipFile(folder / f"{stem}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files_of(name).items():
            archive.writestr(path if "/" in path else f"{stem}-1.0.data/purelib/{path}", content)
        for other in (f"{stem}/tests/test_it.py", f"{stem}/data.json", f"{stem}-1.0.data/scripts/run.py"):
            archive.writestr(other, "not_in_the_corpus = 1\n")


@pytest.fixture
def track(tmp_path: Path) -> Path:
    """A track in `tmp_path`: two packages in wheels, a model of a layer, two entries."""
    for name in MODULES:
        write_wheel(tmp_path / "wheels", name)
    shutil.copy(TRACK / "code.toml", tmp_path / "base.toml")
    text = (tmp_path / "base.toml").read_text().replace("../../configs", str(TRACK.parents[1] / "configs"))
    (tmp_path / "base.toml").write_text(text)
    (tmp_path / "code.toml").write_text(TINY)
    (tmp_path / "entries").mkdir()
    for name in ("adamw", "muon"):
        (tmp_path / "entries" / f"{name}.toml").write_text(
            f'extends = "../code.toml"\noptimizer = {{name = "{name}", lr = 1e-2}}\n'
            "lr_scheduler = {warmup_steps = 0, decay_fraction = 0.2}\n"
        )
    (tmp_path / "track.toml").write_text(SETTINGS)
    write_list(tmp_path, package("one-package"), package("another"))
    return tmp_path


def run(track: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TRACK / "run.py"), f"--track={track}", "--wheels=wheels", *args]
    return subprocess.run(command, cwd=track, capture_output=True, text=True, timeout=240)


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of the track, whose folder is no package."""
    monkeypatch.syspath_prepend(TRACK)
    return importlib.import_module(name)


def test_the_jobs_of_the_track_run_and_are_reported(track: Path) -> None:
    done = run(track)
    assert done.returncode == 0, done.stderr
    corpus = sorted(path.relative_to(track / "corpus").as_posix() for path in (track / "corpus").rglob("*.py"))
    assert [path.partition("/")[2] for path in corpus] == [
        path for name in ("another", "one-package") for path in sorted(files_of(name))
    ]
    adamw, muon = map(json.loads, (track / "runs" / "results.jsonl").read_text().splitlines())
    assert (adamw["entry"], adamw["seed"], muon["entry"], muon["seed"]) == ("adamw", 0, "muon", 1)
    assert [step for step, _, _ in muon["validation"]] == [4, 8, 12]
    target = adamw["validation"][-1][1]  # the first entry sets it, unless the track has one
    assert adamw["target"] == muon["target"] == target and adamw["steps_to_target"] == 12
    assert adamw["seconds_to_target"] == adamw["seconds"] == pytest.approx(adamw["validation"][-1][2])
    row = f"| [adamw](entries/adamw.toml) | 1 | 12 | {target:.4f} | 12 | {adamw['seconds']:.1f} |"
    assert row in done.stdout and "| reached by 0 of 1 |" in done.stdout
    assert muon["optimizer"]["name"] == "muon" and adamw["data_key"] in done.stdout

    again = run(track, "muon", "--seeds", "1", f"--target={muon['validation'][1][1]}")
    assert again.returncode == 0 and "is finished" in again.stdout, again.stderr
    last = json.loads((track / "runs" / "results.jsonl").read_text().splitlines()[-1])
    assert last["steps_to_target"] == 8 and last["losses"] == muon["losses"]

    (track / "track.toml").write_text(SETTINGS.replace('data_key = ""', 'data_key = "other"'))
    refused = run(track)
    assert refused.returncode == 1 and f"data_key is other, but what was prepared here is {adamw['data_key']}" in (
        refused.stderr
    )
    (track / "track.toml").write_text(SETTINGS)
    changed = run(track, "--lr_scheduler.decay_fraction=0.5")
    assert changed.returncode == 1 and "lr_scheduler.decay_fraction was 0.2 there, and is 0.5 now" in changed.stderr


def test_a_deadline_leaves_out_what_would_not_end(track: Path) -> None:
    done = run(track, "--deadline=91", "--step-seconds=1000")
    assert done.returncode == 0 and done.stdout.count("not started") == 2, done.stderr
    assert not (track / "runs").exists()


def test_the_row_of_several_seeds_has_mean_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(monkeypatch, "run")
    seeds = [
        {
            "entry": "e",
            "steps": 910,
            "validation": [[910, loss, 9.0]],
            "steps_to_target": at,
            "seconds_to_target": 0.2 * at,
        }
        for loss, at in ((1.42, 800.0), (1.44, 850.0), (1.43, 810.0))
    ]
    row = "| [e](entries/e.toml) | 3 | 910 | 1.4300 (1.4200 to 1.4400) | 820 (800 to 850) | 164.0 (160.0 to 170.0) |"
    assert module.markdown_row(seeds) == row
    assert module.markdown_row([*seeds, seeds[0] | {"steps_to_target": None}]).split(" | ")[4] == "reached by 3 of 4"


def test_steps_to_the_target_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(monkeypatch, "run")
    result = {"validation": [(10, 3.0, 1.0), (20, 2.0, 3.0), (30, 1.0, 4.0)]}
    found = module.reached(result, 1.75)
    assert (found["steps_to_target"], found["seconds_to_target"]) == (22.5, 3.25)
    assert module.reached(result, 0.5)["steps_to_target"] is None is module.reached(result, 0.0)["steps_to_target"]


def test_an_entry_that_changes_the_data_is_refused(track: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(monkeypatch, "run")
    (track / "entries" / "easy.toml").write_text('extends = "../code.toml"\nvalidation.fraction = 0.5\n')
    with pytest.raises(UserError, match=r"easy.toml: validation.fraction: is the same for all entries"):
        module.entry_config(track, "code", "easy", 0, [])
    with pytest.raises(UserError, match=r"hard.toml: no such entry; there are adamw, easy, muon"):
        module.entry_config(track, "code", "hard", 0, [])


def test_the_entries_of_the_track_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(monkeypatch, "run")
    jobs = module.read_track(TRACK / "track.toml").jobs
    names = {path.stem for path in (TRACK / "entries").glob("*.toml")}
    assert {entry for entry, _ in jobs} == names
    for corpus in ("code", "english"):
        configs = [module.entry_config(TRACK, corpus, entry, seed, []) for entry, seed in jobs]
        assert len({config.run.name for config in configs}) == len(jobs)
        assert {config.tokens_per_step for config in configs} == {65_536, 131_072}
        assert {config.data.sources[0].path for config in configs} == {f".cache/time_to_loss/{corpus}"}


def test_a_package_that_is_missing_or_different_is_named(track: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect, into = load(monkeypatch, "corpus").collect, track / "corpus"
    with pytest.raises(UserError, match=r"not installed here as listed: one-package==1.0, another==1.0; run `pip"):
        collect(track / "code.json", into)
    different = package("one-package") | {"sha256": "0" * 64}
    write_list(track, different, package("another"))
    with pytest.raises(UserError, match=r"one-package==1.0 has 6 Python files, SHA-256 \w+, and not the 6, 000"):
        collect(track / "code.json", into, track / "wheels")
    write_list(track, package("another"))
    collect(track / "code.json", into, track / "wheels")
    assert [folder.name[:11] for folder in into.iterdir()] == ["another-1.0"]
    with pytest.raises(UserError, match=r"none.json: no such file"):
        collect(track / "none.json", into)


def test_what_is_installed_is_listed_as_wheels_give_it(track: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load(monkeypatch, "corpus")
    site = track / "site"
    for name in MODULES:
        stem = name.replace("-", "_")
        information = site / f"{stem}-1.0.dist-info"
        information.mkdir(parents=True)
        record = ""
        for path, content in files_of(name).items():
            (site / path).parent.mkdir(exist_ok=True)
            (site / path).write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(content)}\n"
        (information / "RECORD").write_text(record)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {stem}\nVersion: 1.0\n")
    monkeypatch.setattr(corpus, "_site_packages", lambda: site)
    monkeypatch.setattr(corpus, "SMALLEST", 1000)
    corpus.write_list(track / "new.json")
    assert json.loads((track / "new.json").read_text())["packages"] == [package("another"), package("one-package")]
    corpus.collect(track / "new.json", track / "corpus")
    (site / "another" / "csv.py").write_text("edited = 1\n")
    with pytest.raises(UserError, match=r"not installed here as listed: another==1.0; run `pip"):
        corpus.collect(track / "new.json", track / "corpus-2")
    corpus.write_list(track / "new.json")
    assert [p["name"] for p in json.loads((track / "new.json").read_text())["packages"]] == ["one-package"]


def test_files_of_the_hub_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load(monkeypatch, "corpus")
    (tmp_path / "a.parquet").write_bytes(b"rows")
    digest = hashlib.sha256(b"rows").hexdigest()
    sibling = SimpleNamespace(rfilename="sample/a.parquet", lfs=SimpleNamespace(size=4, sha256=digest))
    info = SimpleNamespace(sha="c0ffee", siblings=[sibling])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, files_metadata: info)
    asked = []

    def download(*args: str, **options: str) -> str:
        asked.append((*args, options["revision"]))
        return str(tmp_path / "a.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    listed, into = tmp_path / "english.json", tmp_path / "into"
    corpus.write_hub_list(listed, "owner/set", ["sample/a.parquet"])
    corpus.collect(listed, into)
    assert asked == [("owner/set", "sample/a.parquet", "c0ffee")]
    assert (into / "sample" / "a.parquet").read_bytes() == b"rows"
    (into / "sample" / "a.parquet").unlink()
    (tmp_path / "a.parquet").write_bytes(b"r0ws")
    with pytest.raises(UserError, match=f"not {digest}; delete"):
        corpus.collect(listed, into)
    with pytest.raises(UserError, match="has no file sample/b"):
        corpus.write_hub_list(listed, "owner/set", ["sample/b.parquet"])
