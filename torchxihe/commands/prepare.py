"""Tokenise and pack the data of a config: everything that training with it reads."""

from torchxihe.config.load import load_config
from torchxihe.data.prepare.pipeline import prepare, prepare_part
from torchxihe.data.prepare.upload import upload
from torchxihe.errors import UserError
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Run the command with its arguments. Raises UserError."""
    options = parse("prepare", args)
    config = load_config(options.config, options.overrides)
    if options.upload:
        upload(config)
        return
    if not options.shard:
        prepare(config)
        return
    part, _, parts = options.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--shard={options.shard}: must be I/N with I from 0 to N - 1, such as 0/4")
    prepare_part(config, int(part), int(parts))
