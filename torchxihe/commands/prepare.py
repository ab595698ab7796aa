"""Tokenise and pack the data of a config, once: everything that training with it reads.

usage: torchxihe prepare CONFIG [--section.key=value ...] [--shard I/N]

  --shard I/N   only part I (from 0) of N, on one of N machines that share data.cache_dir; when all parts are done, run
                it once without --shard

What is there already is not made again, and what was interrupted goes on.

examples: torchxihe prepare configs/xihe_debug.toml
          torchxihe prepare configs/xihe_debug.toml --shard 0/4
"""

from torchxihe.config.load import config_from_args
from torchxihe.data.prepare.pipeline import prepare, prepare_part
from torchxihe.errors import UserError
from torchxihe.utils.arguments import Arguments


def main(args: list[str]) -> None:
    """Run the command with its arguments. Raises UserError."""
    parser = Arguments("prepare")
    parser.add_argument("--shard", metavar="I/N", default="")
    known, rest = parser.parse_known_args(args)
    config = config_from_args(rest)
    if not known.shard:
        prepare(config)
        return
    part, _, parts = known.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--shard={known.shard}: must be I/N with I from 0 to N - 1, such as 0/4")
    prepare_part(config, int(part), int(parts))
