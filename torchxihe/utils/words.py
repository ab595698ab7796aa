"""Numbers with nouns and units, for logs and errors."""

from collections.abc import Sequence

COUNTS = ("", "K", "M", "B", "T")
FLOPS = ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def counted(number: int, noun: str) -> str:
    """The number with its noun: "1 step", "1,200 steps", "2 entries", "2 processes"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"
    return f"{number:,} {noun if number == 1 else plural}"


def scaled(number: float, units: Sequence[str] = COUNTS) -> str:
    """The number in the first of `units`, each a thousand (of `BYTES` 1024) of the last, in which it is short."""
    step = 1024 if units is BYTES else 1000
    power = 0
    while number >= 999.95 and power + 1 < len(units):
        number, power = number / step, power + 1
    return f"{number:,.1f} {units[power]}".rstrip() if power else f"{number:,.0f} {units[0]}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as text: "42 s", "3 min 20 s", "5 h 04 min", "2 d 3 h"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
