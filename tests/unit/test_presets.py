"""Presets, by name from any directory: in a checkout and in an installed wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchxihe.__main__ import run
from torchxihe.config.load import load_config, presets
from torchxihe.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = ["--training.steps=2", "--training.compile=false", "--training.global_batch_size=2", "--data.seq_len=64"]


def test_every_file_of_configs_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == sorted(file.stem for file in (ROOT / "configs").glob("*.toml"))
    assert all(len(line) <= 120 and len(line.split()) > 4 and line.endswith(".") for line in lines[:-2])
    assert lines[-1] == f"in {ROOT / 'configs'}"


def test_a_name_is_the_preset_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is a file of that name. A config extends one by its name, too."""
    by_path = {name: load_config(ROOT / "configs" / f"{name}.toml") for name in presets()}
    monkeypatch.chdir(tmp_path)
    for name, config in by_path.items():
        assert load_config(name) == config and config.run.name == name
    Path("own.toml").write_text('extends = "xihe_120m_llama"\n[training]\nsteps = 3\n')
    own = load_config("own.toml")
    assert own.model == by_path["xihe_120m_llama"].model and (own.training.steps, own.run.name) == (3, "own")
    for name, line in (
        ("xihe_debg", "did you mean xihe_debug?"),
        ("other", "there are llama_1b, llama_70b, "),
    ):
        with pytest.raises(UserError, match=f"^{name}: no such file; {line}"):
            load_config(name)
    Path("xihe_debug").write_text("[model]")
    with pytest.raises(UserError, match="xihe_debug: data: required"):
        load_config("xihe_debug")


def test_a_run_is_its_config(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    run_dir.mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "xihe_debug.toml", run_dir / "config.toml")
    assert load_config(run_dir) == load_config(run_dir / "config.toml")
    with pytest.raises(UserError, match=f"^{tmp_path}: Is a directory$"):
        load_config(tmp_path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package, built as a wheel and installed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("torchxihe", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("__pyc*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(folder / "source")]
    subprocess.run([*pip, *build], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder / "site"


def test_an_installed_wheel_trains_a_preset_in_an_empty_directory(site: Path, tmp_path: Path) -> None:
    """Seen to fail without the package data."""
    assert not (site / "configs").exists() and not (site / "torchxihe" / "configs").is_symlink()

    def torchxihe(*args: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "torchxihe", *args]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert torchxihe("presets").splitlines()[-1] == f"in {site / 'torchxihe' / 'configs'}"
    narrow = ["--data.sources.0.glob=email/*.py", "--tokenizer.vocab_size=400", *SHORT]
    torchxihe("prepare", "xihe_debug", *narrow)
    assert "step 2/2" in torchxihe("train", "xihe_debug", *narrow)
    assert (tmp_path / "runs" / "xihe_debug" / "checkpoints" / "step-00000002").is_dir()
    assert torchxihe("generate", "runs/xihe_debug", "--prompt", "import", "--max-tokens", "2").startswith("import")
    assert torchxihe("report", "runs/xihe_debug") == "report.html\n"  # its style is package data, too
