"""Runs that a benchmark makes and reads: what their files say of them."""

from pathlib import Path

from torchxihe.components.checkpoint.history import KINDS, newest_train_state
from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.errors import UserError


def taken(config: Config) -> int:
    """Steps that the run's newest checkpoint has behind it."""
    saved = newest_train_state(config)
    return saved["step"] if saved else 0


def check_same(config: Config) -> None:
    """Raise UserError if the run's directory has a run with other results."""
    file = config.run_dir / "config.toml"
    if not file.exists():
        return
    before = load_config(file)
    for section, options in config:
        free = KINDS["free"].get(section, "").split()
        for name, value in options:
            if name not in free and value != (then := getattr(getattr(before, section), name)):
                what = f"{section}.{name} was {then!r} there, and is {value!r} now"
                raise UserError(f"{config.run_dir}: {what}; move the directory away, or choose another")


def lines_of(run_dir: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Training's and validation's lines of a run, none if it has not begun."""
    file = run_dir / METRICS
    return read_metrics(file) if file.exists() else ([], [])
