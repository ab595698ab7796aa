"""From a TOML file and `--section.key=value` overrides to a checked config."""

import difflib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from torchxihe.config.checks import Key, find_conflicts
from torchxihe.config.options import Config, Section
from torchxihe.errors import UserError
from torchxihe.utils.records import DamagedError, read_bounded
from torchxihe.utils.words import counted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parents[1] / "configs"
"""The top directory's configs/: a link to it in a checkout, its files in an installed package."""
LARGEST_FILE = 2**20
"""Bytes of a config at most."""
LR: Key = ("optimizer", "lr")
FINE_TUNING_LR = 2e-5
"""Default of `optimizer.lr` for fine-tuning: usual for all weights of models of one to eight billion parameters."""
DEEPEST = 20
"""Tables and lists inside each other at most: three times what the options need."""


def load_config(path: str | Path, overrides: list[str] | None = None, world_size: int = 0) -> Config:
    """Read `path`, apply `--section.key=value` overrides and check everything.

    `path` may also be the name of a preset ("xihe_debug") or the directory of a run, whose config.toml is meant.
    With a `world_size`, the parallelism must fit that many processes too. Raises UserError with one line per mistake.
    """
    file = find_config(str(path))
    if not file:
        raise UserError("no config file; expected CONFIG [--section.key=value ...], such as configs/xihe_debug.toml")
    values, origins, inherits = _read_toml(file, ())
    was_chat = _is_chat(values)
    mistakes = [mistake for flag in overrides or [] for mistake in _apply_override(values, origins, flag)]
    inherits = (inherits or not was_chat) and not origins.get(LR, "").startswith("--")
    _set_fine_tuning_rate(values, inherits)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        run["name"] = Path(file).stem
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = [_explain(dict(finding)) for finding in error.errors()]
    else:
        found = find_conflicts(config, world_size)
        if not found and not mistakes:
            return config
    raise UserError("\n".join(mistakes + [_line(key, why, origins, file) for key, why in found]))


def find_config(name: str) -> str:
    """The file that `name` means: that of a preset, or of a run's directory; else `name` itself."""
    path = Path(name)
    if name and (path / "config.toml").is_file():
        return str(path / "config.toml")
    return str(PRESETS / f"{name}.toml") if name in presets() and not path.exists() else name


def presets() -> list[str]:
    """The names of the presets."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def join_values(args: list[str]) -> list[str]:
    """`args` with `--section.key value` written as `--section.key=value`, and a boolean `--section.key` as `=true`."""
    joined: list[str] = []
    left = args[::-1]
    while left:
        flag = left.pop()
        key = tuple(flag[2:].replace("-", "_").split(".")) if flag.startswith("--") and "=" not in flag else ()
        if len(key) > 1:
            field = _field_at(key) if len(key) <= DEEPEST else None
            if field and field.annotation is bool and not (left and left[-1].lower() in BOOLEANS):
                flag += "=true"
            elif left and not left[-1].startswith("--") and not left[-1].endswith(".toml"):  # that is CONFIG
                flag += f"={left.pop()}"
        joined.append(flag)
    return joined


def dump_config(config: Config) -> str:
    """The resolved config as TOML; `load_config` of it gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def _read_toml(file: str, extended_by: Key) -> tuple[dict[str, Any], dict[Key, str], bool]:
    """The merged values of `file` and what it extends, and for each table and leaf the file it was last written in.

    And whether it is of conversations and inherits the learning rate, if any, of a file that is not.
    """
    where = f"{extended_by[-1]}: extends: {file}" if extended_by else file
    if os.path.realpath(file) in map(os.path.realpath, extended_by):
        raise UserError(f"{where}: the files extend each other in a circle; remove one `extends`")
    text = ""
    try:
        text = read_bounded(file, LARGEST_FILE).decode("utf-8-sig")  # some editors write a byte-order mark
        values = _parse_toml(text)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file{_other_files(file)}") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except DamagedError as error:
        raise UserError(f"{where}: {error}; a config is a small TOML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: {_explain_syntax(str(error), file, text)}") from None
    parent = values.pop("extends", "")
    if not isinstance(parent, str):
        raise UserError(f"{where}: extends: must be the path of one TOML file, relative to this one")
    merged, origins, inherits = {}, {}, False
    if parent:
        beside = os.path.normpath(Path(file).parent / os.path.expanduser(parent))
        parent = find_config(parent) if parent in presets() and not os.path.exists(beside) else beside
        merged, origins, inherits = _read_toml(parent, (*extended_by, file))
    inherits = inherits or (_is_chat(values) and not _is_chat(merged))
    _merge(merged, values, origins, file, ())
    return merged, origins, inherits and origins.get(LR) != file


def _is_chat(values: dict[str, Any]) -> bool:
    data = values.get("data")
    return isinstance(data, dict) and data.get("format") == "chat"


def _set_fine_tuning_rate(values: dict[str, Any], inherits: bool) -> None:
    """Give conversations that are trained on from a checkpoint their own default rate, not one that they inherit."""
    checkpoint, optimizer = values.get("checkpoint"), values.get("optimizer", {})
    if _is_chat(values) and isinstance(checkpoint, dict) and checkpoint.get("load") and isinstance(optimizer, dict):
        default = {"lr": FINE_TUNING_LR}
        values["optimizer"] = optimizer | default if inherits else default | optimizer


def _parse_toml(text: str) -> dict[str, Any]:
    """The values in a TOML text. Raises TOMLDecodeError, also for deep nesting and integers of thousands of digits."""
    try:
        # tomllib takes memory quadratic in the parts of a dotted key.
        values = tomllib.loads(text) if max(line.count(".") for line in text.split("\n")) < 500 else None
    except RecursionError:
        values = None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # more digits than Python converts
        raise tomllib.TOMLDecodeError(str(error)) from None
    if values is None or _depth(values) > DEEPEST:
        raise tomllib.TOMLDecodeError("nested too deeply")
    return values


def _depth(value: Any) -> int:
    """Tables and lists inside each other, counted without recursion, to one more than `DEEPEST`."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        tables = [entry for entry in level if isinstance(entry, (dict, list))]
        level = [inner for table in tables for inner in (table.values() if isinstance(table, dict) else table)]
        depth += bool(tables)
    return depth


def _explain_syntax(error: str, file: str, text: str) -> str:
    """A readable message for an error of the TOML parser."""
    lines = [line.strip() for line in text.splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if file.endswith((".yaml", ".yml", ".json")) or re.match(r"(---|\{|[\w.-]+:(\s|$))", first):
        return "not TOML but YAML or JSON; write it as TOML, such as configs/xihe_debug.toml (docs/config.md)"
    place = re.search(r"line (\d+)", error)
    if place and (twice := re.match(r"Cannot (overwrite|declare)|Duplicate", error)):
        line = lines[int(place[1]) - 1]
        what = "a table" if twice[1] == "declare" else "a key"
        return f"line {place[1]}: {_cut(line)} gives {what} a second time; keep one of the two"
    return f"not valid TOML: {error}"


def _cut(text: str) -> str:
    """`text`, or its beginning, for a message."""
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _other_files(missing: str) -> str:
    """A hint for a config file that is not there."""
    folder = Path(missing).parent
    there = sorted(map(str, folder.glob("*.toml"))) if missing.endswith(".toml") else []
    there = there or sorted(map(str, Path("configs").glob("*.toml"))) or presets()
    close = difflib.get_close_matches(missing, there, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(there)}" if there else ""


def _merge(into: dict[str, Any], values: dict[str, Any], origins: dict[Key, str], origin: str, at: Key) -> None:
    """Merge `values` into `into`: tables are merged, everything else is replaced."""
    for name, value in values.items():
        key = (*at, name)
        if isinstance(value, dict):
            if not isinstance(into.get(name), dict):
                into[name] = {}
            _merge(into[name], value, origins, origin, key)
        else:
            into[name] = value
        origins[key] = origin


_SURROGATE = re.compile("[\ud800-\udfff]")


def _apply_override(values: dict[str, Any], origins: dict[Key, str], flag: str) -> list[str]:
    """Set one `--section.key=value` in `values`. Returns the mistakes in it."""
    match = re.fullmatch(r"--([\w-]+(?:\.[\w-]+)*)=(.*)", flag, re.DOTALL)
    if not match and "." in flag and "=" not in flag:
        return [f"{flag}: has no value; write {flag}=VALUE"]
    if not match or match[1].count(".") >= DEEPEST:
        return [f"{_cut(flag)}: not understood; overrides look like --section.key=value"]
    key = tuple(match[1].replace("-", "_").split("."))
    name = "--" + ".".join(key)
    if _SURROGATE.search(match[2]):  # bytes of the command line that Python could not decode
        return [f"{name}: not UTF-8"]
    place: Any = values
    for i, part in enumerate(key[:-1]):
        above = ".".join(key[:i])
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                return [f"{name}: {above} has {counted(len(place), 'entry')}, counted from 0; there is no {part}"]
            place = place[int(part)]
        else:
            if part not in place:
                origins[key[: i + 1]] = name
            place = place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            return [f"{name}: {'.'.join(key[: i + 1])} is a single value and has no keys"]
    if isinstance(place, list):
        return [f"{name}: an entry of a list cannot be replaced as such; name a key of it"]
    try:
        place[key[-1]] = _override_value(key, match[2])
    except tomllib.TOMLDecodeError:
        shell = "put strings in \"quotes\", and the value in 'quotes' for the shell"
        return [f"{name}: {_cut(match[2])} is not valid TOML; {shell}"]
    origins[key] = name
    return []


def _override_value(key: Key, text: str) -> Any:
    """What a flag's text means: a TOML value, else (a bare word, or anything that a text option gets) the text.

    Raises TOMLDecodeError for what begins like a list, a table or a quoted text and is none.
    """
    field = _field_at(key)
    kind = field.annotation if field else None
    if kind is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    try:
        value = _parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if kind is not str and text.startswith(("[", "{", '"', "'")):
            raise
        return text
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # 1e6
        return int(value)
    return value if isinstance(value, str if kind is str else (bool, int, float, str, list, dict)) else text  # no date


BOOLEANS = {"true": True, "false": False}


def _section_at(key: Key) -> type[Section] | None:
    """The section class that a dotted path leads to."""
    section: Any = Config
    for name in key:
        if name.isdecimal():  # an entry of a list: the path so far has led to the entries' class
            continue
        field = section.model_fields.get(name)
        section = field.annotation if field else None
        if get_origin(section) is tuple:
            section = get_args(section)[0]
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
    return section


def _field_at(key: Key) -> FieldInfo | None:
    """The option that a dotted path leads to."""
    section = _section_at(key[:-1])
    return section.model_fields.get(key[-1]) if section else None


def _line(key: Key, why: str, origins: dict[Key, str], file: str) -> str:
    """One mistake as a line that names the file or flag in which `key`, or the nearest table above it, was set."""
    dotted = ".".join(key)
    origin = next((origins[key[:end]] for end in range(len(key), 0, -1) if key[:end] in origins), file)
    return f"{origin}: {why}" if origin == "--" + dotted else f"{origin}: {dotted}: {why}"


# pydantic's error types and our messages; other types keep pydantic's message.
MEANINGS = {
    "missing": "required, but missing",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "model_type": "must be a table",
    "tuple_type": "must be a list",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "must not be empty",
    "value_error": "{error}",
    "string_pattern_mismatch": "must consist of letters, digits, '.', '_' and '-', and begin with a letter or digit; "
    "it is the file's stem unless --run.name=NAME is given",
}


def _explain(finding: dict[str, Any]) -> tuple[Key, str]:
    """The key and the message of one of pydantic's errors."""
    key = tuple(str(part) for part in finding["loc"])
    kind: str = finding["type"]
    if kind == "extra_forbidden":
        return key, f"unknown key{_meant(key)}"
    why = MEANINGS[kind].format(**finding.get("ctx", {})) if kind in MEANINGS else str(finding["msg"])
    if kind == "tuple_type" and (field := _field_at(key)):
        entry = get_args(field.annotation)[0]
        why += f" such as {json.dumps(get_args(entry))}" if get_origin(entry) is Literal else ""
    return key, why if kind in ("missing", "string_too_short") else f"{why}, got {_cut(repr(finding['input']))}"


def _meant(key: Key) -> str:
    """A hint for an unknown key: a similar one beside it, or the same in another section."""
    section = _section_at(key[:-1])
    close = difflib.get_close_matches(key[-1], section.model_fields, n=1, cutoff=0.6) if section else []
    if close:
        return f"; did you mean {'.'.join((*key[:-1], close[0]))}?"
    for name in Config.model_fields:
        inner = _section_at((name,))
        if inner and key[-1] in inner.model_fields:
            return f"; did you mean {name}.{key[-1]}?"
    return "; docs/config.md lists all of them"
