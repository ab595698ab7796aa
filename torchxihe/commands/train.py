"""Train a prepared run: the command that every process executes, usually under torchrun."""

import sys

from torchxihe.config.load import load_config
from torchxihe.parsers import parse
from torchxihe.run import run
from torchxihe.utils.log import setup_logging
from torchxihe.utils.processes import STOPPED, elastic_job


def main(args: list[str]) -> None:
    """Parse `CONFIG [--section.key=value ...]` and train."""
    setup_logging()
    options = parse("train", args)
    finished = run(load_config(options.config, options.overrides))
    if elastic_job() and not finished:
        sys.exit(STOPPED)  # 0 would end the run on the other hosts, too
