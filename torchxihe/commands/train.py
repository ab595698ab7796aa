"""Train: the command that every process executes, usually under torchrun."""

from torchxihe.config.load import load_config
from torchxihe.data.store import recipe_path
from torchxihe.parsers import parse
from torchxihe.run import run
from torchxihe.utils.log import setup_logging


def main(args: list[str]) -> None:
    """Parse `CONFIG [--section.key=value ...]`, prepare the data if they never were, and train."""
    setup_logging()
    options = parse("train", args)
    config = load_config(options.config, options.overrides)
    if not recipe_path(config).exists():
        from torchxihe.data.prepare.pipeline import prepare  # training alone does not need it

        prepare(config)  # on several ranks: the first to get the cache's lock prepares, the others find it done
    run(config)
