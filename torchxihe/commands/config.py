"""Print a config as a run would see it, or write the reference of all options."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from torchxihe.config.load import dump_config, load_config
from torchxihe.config.options import Config, Section
from torchxihe.config.types import LARGEST
from torchxihe.parsers import parse

DOCS = Path(__file__).parents[2] / "docs" / "config.md"

INTRODUCTION = """\
# Configuration

<!-- Written by `torchxihe config --docs` from torchxihe/config/options.py: change the docstrings there. -->

A run is one TOML file: `./run_train.sh configs/xihe_debug.toml`. Instead of a file, every command takes the name of a
preset (`xihe_debug`; `torchxihe presets` lists them), or the directory of a run, whose `config.toml` is meant. A file
may extend another one with `extends = "other.toml"`, a path relative to itself or the name of a preset: tables are
merged, lists are replaced.
`--section.key=value` (or `--section.key value`) on the command line takes precedence over both. The value is read as
TOML, a bare word as a string; a boolean option without a value is true; an entry of a list is addressed by its index:

    --training.steps=100 --run.name=short --data.sources.0.weight=2 --optimizer.betas=[0.9,0.99]

An unknown key or a value of the wrong type is an error, and all errors are reported at once. `torchxihe config CONFIG`
prints the result; a run keeps it as `config.toml` in its directory, which is itself a complete config.
All other paths are relative to the working directory. TOML has no null: 0, -1 or "" means "off".
"""


def main(args: list[str]) -> None:
    """Print the config that `args` name, or write the reference."""
    options = parse("config", args)
    if options.docs:
        DOCS.write_text(reference(), encoding="utf-8")
        print(DOCS)
    else:
        print(dump_config(load_config(options.config, options.overrides)), end="")


def reference() -> str:
    """docs/config.md: one table a section, in the order of the source."""
    parts = [INTRODUCTION]
    shown: list[type[Section]] = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        parts.append(_table(f"[{name}]", section))
        for key, inner in section.model_fields.items():
            entries = [arg for arg in get_args(inner.annotation) if isinstance(arg, type) and issubclass(arg, Section)]
            for entry in entries:
                known = any(issubclass(other, entry) for other in shown)
                parts.append(_heading(f"[[{name}.{key}]]", entry) if known else _table(f"[[{name}.{key}]]", entry))
                shown.append(entry)
    return "\n".join(parts)


def _table(title: str, section: type[Section]) -> str:
    """One section: its docstring and a row an option."""
    rows = [
        f"| `{key}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"
        for key, field in section.model_fields.items()
    ]
    head = "| Key | Type | Default | Meaning |\n| --- | --- | --- | --- |"
    return f"{_heading(title, section)}\n{head}\n" + "\n".join(rows) + "\n"


def _heading(title: str, section: type[Section]) -> str:
    """A section's name and docstring."""
    return f"## `{title}`\n\n{(section.__doc__ or '').strip()}\n"


def _type(field: FieldInfo) -> str:
    """The type's name, with its bounds."""
    signs = {
        Ge: ("≥", "ge"),
        Gt: (">", "gt"),
        Le: ("≤", "le"),
        Lt: ("<", "lt"),
        MultipleOf: ("multiple of", "multiple_of"),
    }
    known = [(signs[type(bound)], bound) for bound in field.metadata if type(bound) in signs]
    bounds = [f"{sign} {limit}" for (sign, name), bound in known if (limit := getattr(bound, name)) != LARGEST]
    return _cell(" ".join([_name(field.annotation), ", ".join(bounds)]).strip())


def _name(annotation: Any) -> str:
    """The type's name as a TOML file knows it."""
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        entries = [arg for arg in get_args(annotation) if arg is not ...]
        if isinstance(entries[0], type) and issubclass(entries[0], Section):
            return "tables"
        entry = get_args(entries[0])[0] if get_origin(entries[0]) is Annotated else entries[0]
        if get_origin(entry) is Literal:
            return f"list of {_name(entry)}"
        return "list of pairs" if get_origin(entry) is tuple else "list of numbers"
    return {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}[annotation.__name__]


def _default(field: FieldInfo) -> str:
    """The default as TOML writes it."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, str):
        return f'`"{field.default}"`'
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower()}`"


def _cell(text: str) -> str:
    """`text` as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
