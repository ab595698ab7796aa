"""Numbers as people read them."""


def counted(number: int, noun: str) -> str:
    """The number with its noun: "1 step", "1,200 steps", "1 entry", "2 entries"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
