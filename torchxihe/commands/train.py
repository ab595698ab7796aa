"""Train a prepared run: what every process executes, usually under torchrun.

usage: torchxihe train CONFIG [--section.key=value ...]

Goes on from the run's newest valid checkpoint, if it has one. run_train.sh (torchxihe launch) prepares the data and
starts one of these per GPU; with a launcher of your own, run torchxihe prepare CONFIG once before it.

examples: torchxihe train configs/xihe_debug.toml
          torchrun --nproc-per-node=2 -m torchxihe train configs/xihe_debug.toml
"""

from torchxihe.config.load import config_from_args
from torchxihe.run import run
from torchxihe.utils.log import setup_logging


def main(args: list[str]) -> None:
    """Parse `CONFIG [--section.key=value ...]` and train."""
    setup_logging()
    run(config_from_args(args))
