"""`torchxihe COMMAND ...`, also `python -m torchxihe COMMAND ...`.

The commands are the files of `torchxihe/commands`. Each has a docstring, which is its help page (the first line also
stands in the list), and `main(args)`. Only the one that is called is imported, so that no command pays for another's
libraries: the docstrings are read from the source.
"""

import ast
import difflib
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import torchxihe
from torchxihe.errors import UserError

COMMANDS = Path(__file__).parent / "commands"


def main() -> None:
    """Run the command that `sys.argv` names. A user's mistake is one line on stderr and exit code 1."""
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough; nor shall Python try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        sys.exit(_for_all_ranks(str(error)))


def run(args: list[str]) -> None:
    """Run the command `args[0]` with the rest of `args`, or print help or the version."""
    names = command_names()
    command = args[0] if args else "--help"
    if command in ("-h", "--help", "help"):
        width = max(map(len, names))
        print("usage: torchxihe COMMAND ...      (torchxihe COMMAND --help says more)\n")
        print("\n".join(f"  {name:{width}}  {_docstring(name).splitlines()[0]}" for name in names))
    elif command == "--version":
        print(torchxihe.__version__)
    elif command not in names:
        close = difflib.get_close_matches(command, names, n=1)
        raise UserError(f"{command}: no such command; " + (f"did you mean {close[0]}?" if close else ", ".join(names)))
    elif {"-h", "--help"} & set(args[1:]):
        print(_docstring(command))
    else:
        _read_dotenv()
        importlib.import_module(f"torchxihe.commands.{command}").main(args[1:])


def command_names() -> list[str]:
    """Every command."""
    return sorted(path.stem for path in COMMANDS.glob("*.py") if path.stem != "__init__")


def command_source(command: str) -> ast.Module:
    """A command's module, parsed: reading it is quicker than importing what it imports."""
    return ast.parse((COMMANDS / f"{command}.py").read_text(encoding="utf-8"))


def _docstring(command: str) -> str:
    """The command's docstring, without importing it."""
    return ast.get_docstring(command_source(command)) or ""


def _read_dotenv() -> None:
    """Put the variables of `.env` (WANDB_API_KEY, HF_TOKEN, ...) into the environment, which wins where it has them.

    The file is that of the working directory, else that of this checkout. Before the command is imported: libraries
    read their tokens when they are.
    """
    for file in (Path(".env"), Path(__file__).parents[1] / ".env"):
        if file.is_file():
            import dotenv  # most machines have no such file, and need not wait for the library

            try:
                dotenv.load_dotenv(file)
            except ValueError:
                raise UserError(f"{file}: not UTF-8; save it as that") from None
            return


def _for_all_ranks(message: str) -> str:
    """What this process says of a mistake that all ranks may have found: rank 0's word is enough.

    When rank 0 fails, torchrun ends the others at once. What is still alive after a moment was alone with it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        return message
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2)
    return "\n".join(f"[rank {rank}] {line}" for line in message.splitlines())


if __name__ == "__main__":
    main()
