"""The rows of a LoRA stack as they are written in JSON, by our node and by others'.

{"v": 1, "rows": [{"on": true, "name": "people/anna.safetensors", "model": 0.8}]}
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .blocks import BlockWeights, NeedsFamily
from .schedule import Schedule

# Our key of a row and the spellings of core's LoadLoraModel, rgthree's Power Lora Loader and
# Lora Manager, in the order in which they count.
_KEYS = {
    "name": ("name", "lora_name", "lora"),
    "model": ("model", "strength_model", "strength"),
    "clip": ("clip", "strength_clip", "clipStrength", "strengthTwo"),
    "on": ("on", "enabled", "active"),
}
_CORE_INPUT = re.compile(r"loras\.(\d+)\.(\w+)")

NONE = "None"  # what other packs call a row without a LoRA


@dataclass(frozen=True)
class Row:
    """One LoRA of a stack: its name in the loras folders, strengths, block weights, schedule.

    `clip` is the text encoder's strength. `index` is the row's place in the list, from 0.
    """

    index: int
    name: str
    model: float = 1.0
    clip: float = 1.0
    on: bool = True
    blocks: object = None
    schedule: Schedule | None = None

    @property
    def label(self) -> str:
        return f"row {self.index + 1} ({self.name or 'without a LoRA'})"

    def block_weights(self, family: str = "") -> BlockWeights | None:
        """Its weights by block; `family` is the LoRA's, which number vectors may need."""
        try:
            return BlockWeights.parse(self.blocks, family)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error


def parse_rows(value: object) -> list[Row]:
    """Rows of a JSON string, an object, or {"__value__": rows}; also those that are off.

    Raises ValueError with everything that can't be read, by row.
    """
    rows, problems = _list_of(value), list[str]()
    found = []
    for index, given in enumerate(rows):
        try:
            found.append(_row(index, given))
        except ValueError as error:
            problems.append(f"row {index + 1}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _list_of(value: object) -> Sequence[object]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"rows are not valid JSON: {error}") from error
    if isinstance(value, Mapping) and "__value__" in value:
        return _list_of(value["__value__"])
    if isinstance(value, Mapping) and "rows" in value:
        return _list_of(value["rows"])
    if isinstance(value, Mapping):
        value = _inputs_of_others(value)
    if not isinstance(value, Sequence):
        raise ValueError(f"rows are {value!r}; expected a list, or an object that has one")
    return value


def _inputs_of_others(inputs: Mapping[str, object]) -> Sequence[object]:
    """The rows in the inputs of other packs' nodes as a prompt has them."""
    core: dict[int, dict[str, object]] = {}  # {"loras.0.lora_name": ..., "loras.0.strength": ...}
    for name, value in inputs.items():
        if match := _CORE_INPUT.fullmatch(name):
            core.setdefault(int(match[1]), {})[match[2]] = value
    if core:
        return [row for _, row in sorted(core.items())]
    loras = inputs.get("loras")
    if isinstance(loras, Sequence) and not isinstance(loras, str):
        return loras
    rgthree = [row for name, row in inputs.items() if name.startswith("lora_")]
    if not rgthree:
        raise ValueError('rows have no "rows"; expected {"rows": [{"name": ..., "model": 1}]}')
    return rgthree


def _row(index: int, given: object) -> Row:
    if not isinstance(given, Mapping):
        raise ValueError(f"it is {given!r}; expected an object with name and model")
    name, on = _first(given, "name"), _first(given, "on")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"the name is {name!r}, not text")
    if on is not None and not isinstance(on, bool):
        raise ValueError(f"on is {on!r}, neither true nor false")
    model = _strength(given, "model", 1.0)
    schedule = given.get("schedule")
    if schedule is not None and not isinstance(schedule, str):
        raise ValueError(f"the schedule is {schedule!r}, not text")
    name = (name or "").strip()
    return Row(
        index=index,
        name=name,
        model=model,
        clip=_strength(given, "clip", model),
        on=on is not False and name != NONE,
        blocks=_blocks(given),
        schedule=Schedule.parse(schedule or ""),
    )


def _first(given: Mapping[str, object], key: str) -> object:
    """The value under the first of a key's spellings that is there and not null."""
    return next((given[name] for name in _KEYS[key] if given.get(name) is not None), None)


def _blocks(given: Mapping[str, object]) -> object:
    """Block weights as they were typed, None where they say nothing. Raises ValueError."""
    blocks = given.get("blocks")
    try:
        return None if BlockWeights.parse(blocks) is None else blocks
    except NeedsFamily:  # read when the file is
        return blocks


def _strength(given: Mapping[str, object], key: str, default: float) -> float:
    value = _first(given, key)
    return default if value is None else read_strength(value, key)


def read_strength(value: object, key: str) -> float:
    """A finite number, which Lora Manager writes as text in places; `key` names it in messages."""
    try:
        number = float(value) if isinstance(value, str | numbers.Real) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"the {key} strength is {value!r}, not a number")
    return number
