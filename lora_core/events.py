"""What a training run tells the outside. The loop yields these; it knows no browser and no disk."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """A base: every event names the step (optimizer steps done) that it belongs to."""

    step: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name; numbers that are not finite become null, for JSON has none."""
        fields = {name: _finite(value) for name, value in dataclasses.asdict(self).items()}
        return {"event": type(self).__name__.lower(), **fields}


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    total_steps: int
    num_layers: int
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Stepped(Event):
    """One optimizer step, told one step late. A skipped one may have a loss that is not finite."""

    total_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool  # not finite: the step was not taken


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    path: str


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
