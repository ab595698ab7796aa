"""Types of the options' values, with their bounds. Nothing here imports torch."""

import os
import string
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

LARGEST = 2**53
"""Of the integers that have no bound of their own: what a float64 holds exactly."""
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
DocumentFormat = Literal["auto", "text", "lines", "json", "parquet", "arrow", "csv", "dataset", "tokens", "docstrings"]
Roles = Annotated[tuple[Literal["assistant", "user", "system", "tool"], ...], Field(strict=False)]
BatchRamp = Annotated[tuple[Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)], ...], Field(strict=False)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, perhaps a URL or a hub id; "~" is the home directory, which a shell leaves alone in --section.key=~/here."""
GivenPlace = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""One that cannot be empty."""


def _names_a_column(text: str) -> str:
    """Check that a template names a column in braces. Raises ValueError."""
    try:
        fields = [field for _, *field in string.Formatter().parse(text) if field[0] is not None]
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for literal braces") from None
    if not fields:
        raise ValueError("names no column; write one in braces, such as {text}")
    if any(not name or spec or conversion for name, spec, conversion in fields):
        raise ValueError("only column names may be in braces; write {{ and }} for literal braces")
    return text


Template = Annotated[str, AfterValidator(_names_a_column)]
