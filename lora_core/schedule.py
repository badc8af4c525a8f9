"""Strengths that change while an image is sampled: "0:0, 0.3:1, 1:0.5"."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

STEPS = 50  # keyframes that stand for a whole sampling range where a host needs steps


@dataclass(frozen=True)
class Schedule:
    """(position, factor) points; a position is the part of the sampling range done, 0 to 1.

    The factor multiplies a LoRA's strength: linear between the points, constant outside of them.
    Of two points at one position the later one counts from there on: a step.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> Schedule | None:
        """A schedule from "position:factor, ..."; None for an empty text.

        Raises ValueError naming every part that is not such a point, or goes back.
        """
        parts = [part.strip() for part in text.replace(";", ",").replace("\n", ",").split(",")]
        points, problems = [], []
        for part in filter(None, parts):
            point = _point(part)
            if isinstance(point, str):
                problems.append(point)
            else:
                points.append(point)
        problems += [
            f"{later[0]:g} comes after {earlier[0]:g}"
            for earlier, later in pairwise(points)
            if later[0] < earlier[0]
        ]
        if problems:
            raise ValueError(
                f"schedule {text!r}: {'; '.join(problems)}; expected points like "
                '"0:0, 0.3:1, 1:0.5", positions from 0 to 1 in their order'
            )
        return cls(tuple(points)) if points else None

    def at(self, position: float) -> float:
        """The factor at a position, clamped to the first and last point."""
        positions = [place for place, _ in self.points]
        index = bisect.bisect_right(positions, position)
        if index == 0 or index == len(self.points):
            return self.points[max(index - 1, 0)][1]
        (left, before), (right, after) = self.points[index - 1 : index + 1]
        return before + (after - before) * (position - left) / (right - left)

    def __str__(self) -> str:
        return ", ".join(f"{place:g}:{factor:g}" for place, factor in self.points)


def keyframes(schedules: Sequence[Schedule]) -> list[tuple[float, float]]:
    """(start, factor) of each of `STEPS` equal parts of the range: the product at its start.

    Neighbours of the same factor are one.
    """
    frames: list[tuple[float, float]] = []
    for step in range(STEPS + 1):
        factor = math.prod(schedule.at(step / STEPS) for schedule in schedules)
        if not frames or frames[-1][1] != factor:
            frames.append((step / STEPS, factor))
    return frames


def _point(text: str) -> tuple[float, float] | str:
    """The point, or what is wrong with it."""
    place, colon, factor = text.partition(":")
    try:
        point = float(place), float(factor)
    except ValueError:
        return f"{text!r} is no point"
    if not colon or not math.isfinite(point[1]):
        return f"{text!r} is no point"
    if not 0 <= point[0] <= 1:
        return f"the position {point[0]:g} is not from 0 to 1"
    return point
