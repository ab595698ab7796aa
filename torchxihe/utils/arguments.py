"""A command's arguments: an argparse parser whose errors are UserErrors."""

import argparse
import difflib
from typing import Any, NoReturn

from torchxihe.errors import UserError


class Arguments(argparse.ArgumentParser):
    """The parser of one command. A mistake is one line and exit code 1, as in a config."""

    def __init__(self, command: str, description: str, *examples: str) -> None:
        """`description`: what `--help` prints; its first line is also the command's line in `torchxihe --help`."""
        lines = "\n".join(f"  {example}" for example in examples)
        super().__init__(
            f"torchxihe {command}",
            description=description,
            epilog=f"example{'s' * (len(examples) > 1)}:\n{lines}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.command = command
        self.takes_overrides = False

    def add_config(self, required: bool = True) -> None:
        """Add CONFIG and `--section.key=value ...`: the namespace's `config` and `overrides`."""
        text = "a TOML file, a preset (torchxihe presets lists them), or a run, whose config.toml is meant"
        needed: dict[str, Any] = {} if required else {"nargs": "?", "default": ""}
        self.add_argument("config", metavar="CONFIG", help=text, **needed)
        self.add_overrides()

    def add_model(self) -> None:
        """Add MODEL, what `open_saved` takes: the namespace's `model`."""
        text = "a run (its newest checkpoint), one of its step directories, or an export (a Hugging Face folder)"
        self.add_argument("model", metavar="MODEL", help=text)

    def add_overrides(self) -> None:
        """Add `--section.key=value ...`: the namespace's `overrides`."""
        text = "any option of docs/config.md; takes precedence over the file"
        self.add_argument("overrides", metavar="--section.key=value", nargs="*", default=[], help=text)
        self.takes_overrides = True

    def parse(self, args: list[str]) -> argparse.Namespace:
        """The namespace. Raises UserError."""
        known = [flag for action in self._actions for flag in action.option_strings]
        overrides, others = [], []
        for arg in args:
            flag, equals, _ = arg.partition("=")
            unknown = arg.startswith("--") and flag not in known
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
            if unknown and "." not in flag and close:
                self.error(f"unknown argument {flag}; did you mean {close[0]}?")
            # Sorted out first, because argparse takes what has a blank in it for a positional argument.
            override = self.takes_overrides and unknown and ("." in flag or equals != "")
            (overrides if override else others).append(arg)
        options, extra = self.parse_known_args(others)
        if flags := [arg for arg in extra if arg.startswith("-")]:
            self.error(f"unknown argument {flags[0].partition('=')[0]}")
        if self.takes_overrides:
            extra, options.overrides = [*options.overrides, *extra], overrides
        if extra and hasattr(options, "config"):
            self.error(f"more than one config file: {' '.join([options.config, *extra])}")
        if extra:
            self.error(f"unknown argument {extra[0]}")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        end = "" if message.endswith("?") else f"; see torchxihe {self.command} --help"
        raise UserError(f"{self.command}: {message}{end}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help for a terminal of 100 columns, whatever the width of this one: it is quoted in documents and tests."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=100)
