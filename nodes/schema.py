"""Host inputs from config dataclasses, and the pack's own socket types."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

CATEGORY = "LoRA Weave"

Dataset = io.Custom("LORA_WEAVE_DATASET")
Options = io.Custom("LORA_WEAVE_OPTIONS")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
LoraStack = io.Custom("LORA_STACK")
Stack = io.Custom("LORA_WEAVE_STACK")
Rows = io.Custom("LORA_WEAVE_ROWS")

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """The host's Schema; fields that this host does not know (0.3.75 lacks some) are left out."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


def config_inputs(config: type) -> list[Any]:
    """An input for each `setting` field of a config dataclass, in the fields' order."""
    return [config_input(field) for field in dataclasses.fields(config)]


def config_input(field: dataclasses.Field[Any]) -> Any:
    """The host's input for one `setting`: default, range, step, choices and tooltip."""
    facts, default = field.metadata, field.default
    common = {"default": default, "tooltip": facts["help"]}
    limits = {"min": facts["minimum"], "max": facts["maximum"]}
    limits = {name: value for name, value in limits.items() if value is not None}
    if facts["choices"]:
        return io.Combo.Input(field.name, options=list(facts["choices"]), **common)
    if isinstance(default, bool):
        return io.Boolean.Input(field.name, **common)
    if isinstance(default, int):
        whole = {name: int(value) for name, value in limits.items()}
        return io.Int.Input(field.name, step=int(facts["step"] or 1), **whole, **common)
    if isinstance(default, float):
        step = facts["step"] or 0.01
        return io.Float.Input(field.name, step=step, round=step / 100, **limits, **common)
    return io.String.Input(field.name, **common)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a combo's value that is not offered; 0.3.75 does not look itself."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, known are {', '.join(known)}")
