"""A command's arguments."""

import argparse
from typing import NoReturn

from torchxihe.errors import UserError


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are those of a config: one line, exit code 1. `--help` is the command's docstring."""

    def __init__(self, command: str) -> None:
        super().__init__(command, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message}; torchxihe {self.prog} --help says more")
