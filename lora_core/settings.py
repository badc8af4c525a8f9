"""Dataclass fields that carry their own range and help.

The text is written once, here at the field: node tooltips, the tables of the help pages and the
check of ranges all come from it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    step: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its help text and limits in the metadata."""
    facts = {"help": help, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata={**facts, "step": step, "choices": choices})


def problems_of(config: Any) -> list[str]:
    """What is wrong with the values of a dataclass made of `setting` fields, a line each."""
    problems = []
    for field in dataclasses.fields(config):
        value, facts = getattr(config, field.name), field.metadata
        if facts.get("choices") and value not in facts["choices"]:
            problems.append(f"{field.name} is {value!r}, known are {', '.join(facts['choices'])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = facts.get("minimum"), facts.get("maximum")
            if not math.isfinite(value):
                problems.append(f"{field.name} is {value}, expected a finite number")
            elif (low is not None and value < low) or (high is not None and value > high):
                problems.append(f"{field.name} is {value}, expected {_range(low, high)}")
    return problems


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"{low} to {high}"


class Checked:
    """A base for config dataclasses: raises one ValueError with every problem at once."""

    def __post_init__(self) -> None:
        problems = problems_of(self)
        if problems:
            raise ValueError("settings out of range:\n" + "\n".join(problems))
