"""`torchxihe train`: what every process of a run executes, usually under torchrun."""

import argparse

from torchxihe.config import load_config
from torchxihe.trainer import run
from torchxihe.utils.log import setup_logging

HELP = "train a prepared run, from its newest checkpoint if it has one"


def main(args: list[str]) -> None:
    """Parse `CONFIG [--section.key=value ...]` and train."""
    parser = argparse.ArgumentParser(prog="torchxihe train", description=HELP, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="TOML file; overrides follow as --section.key=value")
    options, overrides = parser.parse_known_args(args)
    setup_logging()
    run(load_config(options.config, overrides))
