"""`torchxihe COMMAND ...`, also `python -m torchxihe COMMAND ...`.

The commands are the files of `torchxihe/commands`, each with `main(args)`; only the one that is called is imported, so
that no command loads another's libraries. Their parsers are in `torchxihe/parsers.py`.
"""

# ruff: noqa: E402
import os
import signal
from types import FrameType


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT while a command is imported, and in `train` until `Stop` does: there is nothing to clean up."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":  # before all other imports: KeyboardInterrupt inside one is a traceback
    signal.signal(signal.SIGINT, _interrupted)

import difflib
import importlib
import sys
import time
from pathlib import Path

from torchxihe.errors import LostPeerError, UserError
from torchxihe.parsers import PARSERS
from torchxihe.utils.processes import SIGNALS, USER_MISTAKE, elastic_job, end_with_launcher
from torchxihe.utils.streams import guard_streams
from torchxihe.utils.version import __version__

TRAINING = ("launch", "prepare", "train")
"""Commands that continue when their output cannot be written any more."""


def main() -> None:
    """Run the command that `sys.argv` names. A user's mistake is one line on stderr and exit code 1."""
    signal.signal(signal.SIGINT, _interrupted)  # also for the installed script, which imports this file
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `launch` blocks them while this process starts
    guard_streams(lasting=sys.argv[1:2] != [] and sys.argv[1] in TRAINING)
    end_with_launcher()
    try:
        run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        _interrupted(signal.SIGINT, None)
    except UserError as error:
        message = _for_all_ranks(str(error))
        if not elastic_job() or isinstance(error, LostPeerError):
            sys.exit(message)
        print(message, file=sys.stderr)
        sys.exit(USER_MISTAKE)


def run(args: list[str]) -> None:
    """Run the command `args[0]` with the rest of `args`, or print help or the version."""
    command = args[0] if args else "--help"
    if command in ("-h", "--help", "help"):
        width = max(map(len, PARSERS))
        print("usage: torchxihe COMMAND ...      (torchxihe COMMAND --help describes a command)\n")
        print("\n".join(f"  {name:{width}}  {summary(name)}" for name in PARSERS))
        print("\ntorchxihe --version names the versions of torch and CUDA, the GPUs, and the kernels that are used.")
    elif command == "--version":
        print(f"torchxihe {__version__}")
        # These import torch.
        from torchxihe.components.observe.report import versions
        from torchxihe.config.load import load_config

        print(versions(load_config("xihe_120m")))
    elif command not in PARSERS:
        close = difflib.get_close_matches(command, PARSERS, n=1)
        hint = f"did you mean {close[0]}?" if close else ", ".join(PARSERS)
        raise UserError(f"{command}: no such command; {hint}")
    elif {"-h", "--help"} & set(args[1:]):
        print(PARSERS[command]().format_help(), end="")
    else:
        _read_dotenv()
        module = importlib.import_module(f"torchxihe.commands.{command}")
        if signal.getsignal(signal.SIGINT) is _interrupted and command != "train":  # which has its own: see Stop
            signal.signal(signal.SIGINT, signal.default_int_handler)
        module.main(args[1:])


def summary(command: str) -> str:
    """The first line of a command's help."""
    return (PARSERS[command]().description or "").splitlines()[0]


def _read_dotenv() -> None:
    """Put the variables of `.env` (WANDB_API_KEY, HF_TOKEN, ...) into the environment, which takes precedence.

    The file is that of the working directory, else that of this checkout. It is read before the command is imported:
    libraries read their tokens at import.
    """
    for file in (Path(".env"), Path(__file__).parents[1] / ".env"):
        if file.is_file():
            import dotenv  # not needed where there is no such file

            try:
                dotenv.load_dotenv(file)
            except ValueError:
                raise UserError(f"{file}: not UTF-8; save it as UTF-8") from None
            return


def _for_all_ranks(message: str) -> str:
    """What this process prints of a mistake that all ranks may have found: only rank 0 prints it, if it has it too.

    When rank 0 exits, torchrun ends the others at once. A rank that is still running after 2 s prints its own.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        return message
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2)
    return "\n".join(f"[rank {rank}] {line}" for line in message.splitlines())


if __name__ == "__main__":
    main()
