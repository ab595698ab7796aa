"""`--help` lists what the parser accepts, with an example, and at once; the shells complete the same."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchxihe.__main__ import run
from torchxihe.config.options import Config
from torchxihe.parsers import PARSERS

ROOT = Path(__file__).parents[2]


def test_every_command_has_a_parser() -> None:
    assert set(PARSERS) == {path.stem for path in (ROOT / "torchxihe" / "commands").glob("[a-z]*.py")}


@pytest.mark.parametrize("command", PARSERS)
def test_help_is_the_parsers_and_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: torchxihe {command} ") and max(map(len, text.splitlines())) <= 120
    examples = text.partition("\nexample")[2].partition(":\n")[2]
    assert re.match(rf" +(\w+=\S+ )*(torchxihe {command}|torchrun .* {command})\b", examples)
    assert text.index("\n\n") < text.index("\n\n", text.index("\n\n") + 2) < text.index("\nexample")
    assert all(action.help for action in PARSERS[command]()._actions if action.option_strings)


def test_help_needs_nothing_but_the_standard_library() -> None:
    """`run_train.sh --help` runs before anything is installed."""
    for args in (["--help"], ["launch", "--help"]):
        command = [sys.executable, "-S", "-m", "torchxihe", *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
        assert (done.returncode, done.stderr) == (0, "") and "usage: torchxihe" in done.stdout


@pytest.mark.parametrize("args", ["--help", "train --help", "config configs/xihe_120m.toml", "config no.toml"])
def test_what_needs_no_torch_does_not_import_it(args: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "torchxihe", *args.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "torchxihe.errors" in imported
    assert not imported & {"torch", "numpy", "datasets", "transformers", "tokenizers", "fsspec"}


# Completion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the scripts, a config, and other files."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        script = subprocess.run(
            [sys.executable, "-m", "torchxihe", "completion", shell], cwd=ROOT, capture_output=True, check=True
        ).stdout
        (folder / f"completion.{shell}").write_bytes(script)
    (folder / "my config.toml").touch()
    (folder / "notes.txt").touch()
    (folder / "runs").mkdir()
    return folder


def bash(folder: Path, *words: str) -> list[str]:
    """What bash's completion offers for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = f"source completion.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _torchxihe; "
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1] if done.stdout != "\n" else []


needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
needs_zsh = pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["torchxihe", "ex"], ["export"]),
        (["torchxihe", ""], [*PARSERS]),
        (["torchxihe", "export", "runs/a", "--d"], ["--dtype"]),
        (["torchxihe", "export", "runs/a", "--dtype", ""], ["float32", "bfloat16"]),
        (["torchxihe", "eval", "runs/a", "--json", "--lim"], ["--limit"]),
        (["torchxihe", "export", "runs/a", "--optimizer"], []),
        (["torchxihe", "train", "a.toml", "--optimizer.na"], ["--optimizer.name="]),
        (["torchxihe", "train", "a.toml", "--optimizer.name", "=", "ad"], ["adamw"]),
        (["torchxihe", "train", "a.toml", "--training.compile", "="], ["true", "false"]),
        (["torchxihe", "train", "a.toml", "--training.compile=f"], ["--training.compile=false"]),
        (["./run_train.sh", "a.toml", "--lr_scheduler.n"], ["--lr_scheduler.name="]),
        (["torchxihe", "train", ""], ["my config.toml", "runs"]),
        (["torchxihe", "eval", "runs/a", "--on", "my"], ["my config.toml"]),
        (["torchxihe", "export", ""], ["runs"]),
        (["torchxihe", "completion", ""], ["bash", "zsh"]),
    ],
)
def test_bash(folder: Path, words: list[str], offered: list[str]) -> None:
    assert bash(folder, *words) == offered


@needs_bash
def test_every_option_of_the_config_is_offered(folder: Path) -> None:
    offered = bash(folder, "torchxihe", "launch", "a.toml", "--")
    for section, field in Config.model_fields.items():
        for option in field.annotation.model_fields:  # pyright: ignore[reportOptionalMemberAccess]
            assert any(word.startswith(f"--{section}.{option}") and word.endswith("=") for word in offered)
    assert "--data.sources.0.path=" in offered and "--validation.sets.0.path=" in offered


def typed(shell: list[str], setup: str, line: str, folder: Path, ends: str) -> str:
    """What an interactive shell shows after `line` and a tab, until it shows `ends` or 10 seconds have gone."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(shell[0], shell, {**os.environ, "TERM": "dumb", "PS1": "$ ", "HOME": str(folder)})
    try:
        os.write(terminal, f"{setup}; echo rea''dy\n".encode())
        _read(terminal, "ready")
        time.sleep(0.5)  # the prompt
        os.write(terminal, f"{line}\t".encode())
        return _read(terminal, ends)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def _read(terminal: int, ends: str) -> str:
    shown, deadline = "", time.monotonic() + 10
    while ends not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace").replace("\a", "")
    return shown


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("torchxihe expo", "export "),
        ("torchxihe train my", "my\\ config.toml "),
        ("torchxihe train a.toml --optimizer.na", "--optimizer.name="),
        ("torchxihe train a.toml --optimizer.name=mu", "--optimizer.name=muon "),
        ("./run_train.sh a.toml --training.compile=f", "--training.compile=false "),
        ("torchxihe export a --dtype b", "--dtype bfloat16 "),
        ("torchxihe export ru", "runs/"),
    ],
)
@pytest.mark.parametrize(
    ("shell", "setup"),
    [
        pytest.param(["bash", "--norc", "-i"], "source completion.bash", marks=needs_bash),
        pytest.param(
            ["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -D -u; eval "$(<completion.zsh)"', marks=needs_zsh
        ),
    ],
)
def test_a_tab_in_a_terminal(folder: Path, shell: list[str], setup: str, line: str, becomes: str) -> None:
    assert becomes in typed(shell, setup, line, folder, becomes)
