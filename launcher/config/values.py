"""What a single value of a configuration may be: counts, figures, durations, names.

Each check gives the value back, and raises ValueError in words that follow the name of the key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

Number = TypeVar("Number", int, float)

STEPS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
DOCUMENT = re.compile(r"[^:]+:[0-9]+")
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d)")
MOST = 10**12
"""Of anything that is counted or measured: beyond what can be, and a plan is made at once up to there."""
MOST_TOKENS = 10**18
MOST_STEPS = 100_000  # in one range of data.skip.steps: a loss spike is a few hundred
SECONDS: Mapping[str, float] = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(duration: str) -> float:
    """Seconds in a duration such as `90s`, `15min`, `1.5h` or `2d`. Raises ValueError."""
    match = DURATION.fullmatch(duration.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError("expected a duration above zero such as 90s, 15min, 1.5h or 2d")
    return float(match[1]) * SECONDS[match[2]]


def integral(value: Any) -> Any:
    """`10e9` is how people write ten billion: a float that is a whole number is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def at_most(most: int) -> Callable[[Number], Number]:
    """A check that gives back what is no larger. Raises ValueError for what is."""

    def check(value: Number) -> Number:
        if value > most:
            raise ValueError(f"expected at most {most:,}")
        return value

    return check


def _every(value: int | str) -> int | str:
    at_most(MOST)(seconds(value) if isinstance(value, str) else value)
    if isinstance(value, int) and value < 1:
        raise ValueError("expected at least 1 step")
    return value


def steps_in(entry: str) -> range:
    """The steps that `120` or `130-135` names, both ends included. Raises ValueError."""
    match = STEPS.fullmatch(entry)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError("expected a step from 1 on, or a range of steps such as 130-135")
    if last - first >= MOST_STEPS:
        raise ValueError(f"expected a range of at most {MOST_STEPS:,} steps")
    return range(first, last + 1)


def number_as_text(value: Any) -> Any:
    return str(integral(value)) if isinstance(value, int | float) and not isinstance(value, bool) else value


def step_range(entry: str) -> str:
    steps_in(entry)
    return entry


def document_name(name: str) -> str:
    if DOCUMENT.fullmatch(name) is None:
        raise ValueError("expected SHARD:DOCUMENT, such as train-00003:1542")
    return name


def one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("expected one line of text, without control characters")
    return value


def local_folder(value: str) -> str:
    if "://" in value:
        raise ValueError("expected a local or shared folder, not a URL")
    return one_line(value)


def run_name(value: str) -> str:
    if value in {"", ".", ".."} or "/" in value or value[0] == "-" or not value.isprintable():
        raise ValueError("expected a folder name: no slash, no control character, no leading dash")
    return value


Count = Annotated[int, BeforeValidator(integral), Field(ge=1), AfterValidator(at_most(MOST))]
Tokens = Annotated[int, BeforeValidator(integral), Field(ge=1), AfterValidator(at_most(MOST_TOKENS))]
Figure = Annotated[float, Field(gt=0), AfterValidator(at_most(MOST))]
Every = Annotated[int | str, BeforeValidator(integral), AfterValidator(_every)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(local_folder)]
Measure = Annotated[float, Field(ge=0.001), AfterValidator(at_most(MOST))]
"""What hardware holds or does, in its datasheet's units: nothing there is less, and no quotient overflows."""
