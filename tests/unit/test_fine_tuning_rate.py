"""Fine-tuning has a learning rate of its own, whatever pre-training's config says, and the log says why."""

from pathlib import Path

import pytest
import tomli_w

from tests.unit.test_config import SMALL
from torchxihe.components.observe import report
from torchxihe.config.load import FINE_TUNING_LR, dump_config, load_config

CHAT = '[data]\nformat = "chat"\n'
LOAD = '[checkpoint]\nload = "runs/a"\n'


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{name}.toml")


@pytest.mark.parametrize(
    ("files", "flags", "expected"),
    [
        (["[optimizer]\nlr = 0.1\n"], [], 0.1),
        ([""], [], 3e-4),
        (["[optimizer]\nlr = 0.1\n", CHAT], [], 0.1),  # pre-training on conversations
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD], [], FINE_TUNING_LR),
        (["[optimizer]\nlr = 0.1\n" + LOAD, CHAT], [], FINE_TUNING_LR),
        (["[optimizer]\nlr = 0.1\n", LOAD], [], 0.1),  # a branch of pre-training
        (["", CHAT + LOAD], [], FINE_TUNING_LR),
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD + "[optimizer]\nlr = 0.2\n"], [], 0.2),
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD, "[optimizer]\nlr = 0.3\n"], [], 0.3),
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD, "[optimizer]\nlr = 0.3\n", CHAT], [], 0.3),
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD + "[optimizer]\nlr = 0.2\n", CHAT], [], 0.2),
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD, "[optimizer]\neps = 1e-9\n"], [], FINE_TUNING_LR),
        (["[optimizer]\nlr = 0.1\n", CHAT + LOAD], ["--optimizer.lr=0.4"], 0.4),
        (["[optimizer]\nlr = 0.1\n"], ["--data.format=chat", "--checkpoint.load=runs/a"], FINE_TUNING_LR),
        (["[optimizer]\nlr = 0.1\n", CHAT], ["--checkpoint.load=runs/a"], FINE_TUNING_LR),
        (
            ["[optimizer]\nlr = 0.1\n"],
            ["--data.format=chat", "--checkpoint.load=runs/a", "--optimizer.lr=0.4"],
            0.4,
        ),
    ],
)
def test_the_rate(tmp_path: Path, files: list[str], flags: list[str], expected: float) -> None:
    """Each file extends the one before. Seen to fail with an inherited rate kept."""
    last = write(tmp_path, "start", tomli_w.dumps(SMALL))
    for i, text in enumerate(files):
        last = write(tmp_path, str(i), f'extends = "{last}"\n{text}')
    config = load_config(last, flags)
    assert config.optimizer.lr == expected
    assert load_config(write(tmp_path, "again", dump_config(config))) == config


def test_the_reason_is_logged(tmp_path: Path) -> None:
    file = write(tmp_path, "a", f'extends = "{write(tmp_path, "start", tomli_w.dumps(SMALL))}"\n{CHAT}{LOAD}')
    assert "fine-tuning's default" in report._why_this_rate(load_config(file))
    assert not report._why_this_rate(load_config(file, ["--optimizer.lr=1e-3"]))
    assert not report._why_this_rate(load_config(file, ["--data.format=text", "--optimizer.lr=2e-5"]))
