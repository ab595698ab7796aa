"""Train a prepared run: the command that every process executes, usually under torchrun."""

from torchxihe.config.load import load_config
from torchxihe.parsers import parse
from torchxihe.run import run
from torchxihe.utils.log import setup_logging


def main(args: list[str]) -> None:
    """Parse `CONFIG [--section.key=value ...]` and train."""
    setup_logging()
    options = parse("train", args)
    run(load_config(options.config, options.overrides))
