"""A LoRA of any type as plain LoRA, of as few directions as a rule wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..adapters import Adapter
from ..similarity import Weight
from ..stack import Entry
from .combine import Merged, merge
from .rank_rule import RankRule


def resize(
    adapters: Mapping[str, Adapter],
    rule: RankRule,
    weight: Weight | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Every weight's change as a LoRA; those of norms and biases stay. It is `merge` of one."""
    return merge([Entry(adapters, 1.0, 1.0)], rule, weight, progress)
