"""Print a script by which the shell completes commands, options, config files and config keys.

usage: torchxihe completion bash|zsh

For torchxihe and for run_train.sh. In ~/.bashrc, or in ~/.zshrc after compinit:

  eval "$(torchxihe completion bash)"
  eval "$(torchxihe completion zsh)"

It holds what this version knows, and asks Python nothing while you type.

example: torchxihe completion bash
"""

import ast
import shlex
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from torchxihe.__main__ import command_names, command_source
from torchxihe.config.options import Config, Section
from torchxihe.utils.arguments import Arguments

BASH = r"""
_torchxihe() {
    local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local command=${COMP_WORDS[1]} key="" glue="" words
    if [[ ${COMP_WORDS[0]##*/} == run_train.sh ]]; then command=launch; fi
    if [[ $cur == "=" ]]; then key=$previous cur="" # readline takes "=" for a word of its own
    elif [[ $previous == "=" ]]; then key=${COMP_WORDS[COMP_CWORD - 2]}
    elif [[ $cur == --*=* ]]; then key=${cur%%=*} glue=$key= cur=${cur#*=} # ... unless it was told not to
    elif [[ $previous == --* && $cur != -* ]]; then key=$previous
    elif ((COMP_CWORD == 1)) && [[ $command != launch ]]; then command="" key=command
    fi
    words=$(_torchxihe_words "$command" "$key")
    if [[ ! $key && $cur != -* ]]; then words=$(grep -v ^- <<<"$words"); fi
    mapfile -t COMPREPLY < <(compgen -P "$glue" -W "$words" -- "$cur")
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
    if [[ ${#COMPREPLY[@]} == 0 && $cur != -* && $(_torchxihe_words "$command" "") == *=* ]]; then
        mapfile -t COMPREPLY < <(compgen -f -X '!*.toml' -- "$cur"; compgen -d -- "$cur")
        compopt -o filenames
    fi
}
complete -o default -F _torchxihe torchxihe run_train.sh
"""

ZSH = r"""
_torchxihe() {
    local command=$words[2] key=""
    if [[ ${words[1]:t} == run_train.sh ]]; then command=launch; fi
    if [[ $PREFIX == --*=* ]]; then key=${PREFIX%%=*}; compset -P '*='
    elif [[ $words[CURRENT-1] == --* && $PREFIX != -* ]]; then key=$words[CURRENT-1]
    elif [[ $CURRENT == 2 && $command != launch ]]; then command="" key=command
    fi
    local -a all=(${(f)"$(_torchxihe_words "$command" "$key")"}) found
    if [[ -n $key || $PREFIX == -* ]]; then found=($all); else found=(${all:#-*}); fi
    if (( $#found )); then
        compadd -S "" -- ${(M)found:#*=}
        compadd -- ${found:#*=}
    elif [[ $(_torchxihe_words "$command" "") == *=* ]]; then _files -g "*.toml"
    else _files
    fi
}
compdef _torchxihe torchxihe run_train.sh
"""


def main(args: list[str]) -> None:
    """Print the script. Raises UserError for another shell."""
    parser = Arguments("completion")
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(words_function() + (BASH if parser.parse_args(args).shell == "bash" else ZSH), end="")


def words_function() -> str:
    """A shell function that prints what may stand after command $1, or if $2 is one of its options, after that.

    Read from the commands' own parsers and from the config's classes.
    """
    keys = dict(config_values())
    lines = ["_torchxihe_words() {", '    case "$1 $2" in', _case(" command", command_names())]
    for command in command_names():
        arguments = list(command_arguments(command))
        words = [word for name, values in arguments for word in ([name] if name.startswith("-") else values)]
        overrides = [f"{key}=" for key in keys] if takes_config(command) else []
        lines.append(_case(f"{command} ", [*words, "--help", *overrides]))
        lines += [_case(f"{command} {name}", values) for name, values in arguments if values and name.startswith("-")]
    lines += ["    esac", '    case "$2" in', *(_case(key, values) for key, values in keys.items() if values)]
    return "\n".join([*lines, "    esac", "}"])


def _case(pattern: str, words: list[str]) -> str:
    """One branch: prints `words`, one a line."""
    return f"    {shlex.quote(pattern)}) printf '%s\\n' {shlex.join(words)} ;;"


def command_arguments(command: str) -> Iterator[tuple[str, list[str]]]:
    """The arguments that a command's parser is given, each with the values that it may have, where they are listed."""
    for node in ast.walk(command_source(command)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            name = ast.literal_eval(node.args[0])
            choices = [ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == "choices"]
            yield name, list(choices[0]) if choices else []


def takes_config(command: str) -> bool:
    """Whether a command reads a config, and so knows --section.key=value."""
    names = {node.id for node in ast.walk(command_source(command)) if isinstance(node, ast.Name)}
    return bool(names & {"load_config", "config_from_args"})


def config_values(section: type[Section] = Config, at: str = "--") -> Iterator[tuple[str, list[str]]]:
    """The options of a config as flags ("--training.steps"), each with its values, where they are listed."""
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        entry = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if isinstance(entry, type) and issubclass(entry, Section):
            yield from config_values(entry, f"{at}{name}." if entry is kind else f"{at}{name}.0.")
        else:
            literals = [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
            yield f"{at}{name}", ["true", "false"] if kind is bool else [value for value in literals if value]
