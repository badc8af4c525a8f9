"""Values of a sweep: "0..1 | 5", "0..1 : 0.25", or a list."""

from __future__ import annotations

import math
import re

MAX_VALUES = 1000
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_RANGE = re.compile(rf"\s*{_NUMBER}\s*\.\.\s*{_NUMBER}\s*([|:])\s*{_NUMBER}\s*")


def parse_values(text: str) -> list[float]:
    """Numbers of "a..b | n" (n values, both ends), "a..b : step" (both ends where they meet), or of
    a list split by commas or lines. Parts may be mixed: "0, 0.5..1 | 3".

    Raises ValueError naming every part that is none of these, and for too many values.
    """
    values: list[float] = []
    problems = []
    for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        try:
            values += _part(part)
        except ValueError as error:
            problems.append(str(error))
    if not values and not problems:
        problems.append("there is no value")
    if len(values) > MAX_VALUES:
        problems.append(f"there are {len(values)} values, {MAX_VALUES} are the most")
    if problems:
        raise ValueError(
            f'values {text!r}: {"; ".join(problems)}; expected "0..1 | 5", "0..1 : 0.25" or a list'
        )
    return values


def _part(part: str) -> list[float]:
    match = _RANGE.fullmatch(part)
    if match is None:
        if not re.fullmatch(_NUMBER, part):
            raise ValueError(f"{part!r} is no number and no range")
        return [_finite(part)]
    first, last, how = (_finite(match[group]) for group in (1, 2, 4))
    if match[3] == "|":
        if how != int(how) or not 2 <= how <= MAX_VALUES:
            raise ValueError(f"{part!r} asks for {match[4]} values, not for 2 to {MAX_VALUES}")
        gaps = int(how) - 1
        return [first + (last - first) * gap / gaps for gap in range(gaps + 1)]
    if how <= 0:
        raise ValueError(f"{part!r} has the step {match[4]}, which is not above 0")
    steps = abs(last - first) / how
    if steps > MAX_VALUES:
        raise ValueError(f"{part!r} has {steps:g} values, {MAX_VALUES} are the most")
    count = math.floor(steps + 1e-9)
    return [first + math.copysign(how, last - first) * step for step in range(count + 1)]


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
