"""List the presets, which come with the package."""

from torchxihe.config.load import PRESETS, presets
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Print a line for each, and where they are."""
    parse("presets", args)
    names = presets()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {_summary(name)}")
    print(f"\nin {PRESETS.resolve()}")


def _summary(name: str) -> str:
    """The first sentence of the comment that a preset begins with."""
    lines = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    return f"{comment.partition('. ')[0].rstrip('.')}."
