"""Print a script that completes commands, options, config files and config keys in a shell."""

import argparse
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from torchxihe.config.options import Config, Section
from torchxihe.errors import UserError
from torchxihe.parsers import PARSERS, parse

# shtab completes `--key value`. Here `--key=value` is completed too: as these two words, with what readline has of the
# word being completed put back before the results. Bash splits words at "=", unless COMP_WORDBREAKS was changed.
BASH = """
_torchxihe() {
    local function=_shtab_torchxihe glue="" word words=() at=$COMP_CWORD i
    if [[ ${COMP_WORDS[0]##*/} == run_train.sh ]]; then function=_shtab_run_train; fi
    for i in "${!COMP_WORDS[@]}"; do
        word=${COMP_WORDS[i]}
        if [[ $word == --*=* ]]; then
            words+=("${word%%=*}" "${word#*=}")
            if ((i == COMP_CWORD)); then glue=${word%%=*}=; fi
            if ((i <= COMP_CWORD)); then ((at++)); fi
        elif [[ $word == "=" ]] && ((i == COMP_CWORD)); then words+=("")
        elif [[ $word == "=" ]]; then ((i < COMP_CWORD)) && ((at--))
        else words+=("$word")
        fi
    done
    COMP_WORDS=("${words[@]}") COMP_CWORD=$at
    "$function" "" "${COMP_WORDS[at]}" "${COMP_WORDS[at - 1]}"
    for i in "${!COMPREPLY[@]}"; do
        word=${COMPREPLY[i]}
        if [[ $word == --*.* ]]; then word+="="; fi
        COMPREPLY[i]=$glue$word
    done
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _torchxihe torchxihe run_train.sh
"""


def main(args: list[str]) -> None:
    """Print the script. Raises UserError if shtab is not installed."""
    shell = parse("completion", args).shell
    try:
        import shtab  # optional
    except ModuleNotFoundError:
        raise UserError("completion: shtab is not installed; pip install shtab") from None
    parts = []
    for parser, name in ((_all_commands(shtab), "torchxihe"), (_with_keys("launch", shtab), "run_train")):
        parser.prog = {"run_train": "run_train.sh"}.get(name, name)
        parts.append(shtab.complete(parser, shell=shell, root_prefix=name))
    if shell == "bash":
        print("\n".join(parts) + BASH, end="")
    else:  # in zsh's specifications, "--key=-[...]" has its value after the "="
        print(re.sub(r'^( +"--[\w.]+\.\w+)\[', r"\1=-[", "\n".join(parts), flags=re.MULTILINE))


def _all_commands(shtab: Any) -> argparse.ArgumentParser:
    """A parser with every command as a subcommand."""
    root = argparse.ArgumentParser("torchxihe", description="Pre-train language models.")
    commands = root.add_subparsers()
    for name in PARSERS:
        parser = _with_keys(name, shtab)
        summary = (parser.description or "").splitlines()[0]
        commands.add_parser(name, help=summary, description=summary, parents=[parser], add_help=False)
    return root


def _with_keys(command: str, shtab: Any) -> argparse.ArgumentParser:
    """A command's parser with the keys of the config as options, and what its arguments are completed to."""
    parser = PARSERS[command]()
    if parser.takes_overrides:
        for key, values in config_values():
            parser.add_argument(f"--{key}", choices=values or None, metavar="VALUE")
    # shtab's own pattern for zsh, "(*.toml)", is read as glob qualifiers
    files = {"CONFIG": shtab.glob("*.toml") | {"zsh": "_files -g '*.toml'"}, "FILE": shtab.FILE}
    files |= dict.fromkeys(("DIR", "DIR_OR_HUB_ID", "PATH", "RUN", "MODEL"), shtab.DIRECTORY)
    for action in parser._actions:
        if action.dest == "overrides":
            action.help = argparse.SUPPRESS
        elif isinstance(action.metavar, str) and action.metavar in files:
            setattr(action, "complete", files[action.metavar])  # noqa: B010 (shtab reads it; argparse has no such attribute)
    return parser


def config_values(section: type[Section] = Config, at: str = "") -> Iterator[tuple[str, list[str]]]:
    """The options of a config ("training.steps"), each with its values, where they are listed."""
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        entry = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if isinstance(entry, type) and issubclass(entry, Section):
            yield from config_values(entry, f"{at}{name}." if entry is kind else f"{at}{name}.0.")
        else:
            literals = [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
            yield f"{at}{name}", ["true", "false"] if kind is bool else [value for value in literals if value]
