"""Stacks of LoRAs from what nodes are given: rows, the community's LORA_STACK, LORA_MODELs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor

from ..lora_model import LoraModel
from ..stack import StackEntry
from ..stack_rows import Row, read_strength
from .files import find_lora, lora_name

LoraStack = list[tuple[str, float, float]]


def of_rows(rows: Iterable[Row]) -> list[StackEntry]:
    """The rows that are on. ValueError naming every row whose file is not there."""
    found, problems = [], []
    for row in rows:
        if row.on:
            try:
                known = lora_name(row.name)
                found.append(StackEntry.of_row(replace(row, name=known), find_lora(known)))
            except ValueError as error:
                problems.append(f"{row.label}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def of_lora_stack(stack: Sequence[Sequence[Any]] | None) -> list[StackEntry]:
    """Entries of other packs' (name, model strength, clip strength); those called None are none.

    Names may have the separators of any system, or be whole paths of files in a loras folder.
    Raises ValueError naming every entry that is something else, whose strengths are no finite
    numbers or whose file is not there.
    """
    found, problems = [], []
    for number, entry in enumerate(stack or [], start=1):
        label = f"entry {number} of lora_stack"
        try:
            name, model, clip = entry
            if name is None or name == "None":
                continue
            known = lora_name(str(name))
            label = f"{label} ({known})"
            strengths = read_strength(model, "model"), read_strength(clip, "clip")
            found.append(StackEntry(label, *strengths, known, find_lora(known)))
        except (TypeError, ValueError) as error:
            problems.append(f"{label}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def of_models(models: Mapping[str, Mapping[str, Tensor] | None]) -> list[StackEntry]:
    """LORA_MODELs by the name of their input, at strength 1."""
    found = []
    for name, tensors in models.items():
        if tensors is not None:
            lora = LoraModel.of(tensors)
            source = lora.info.provenance
            label = f"{name} ({source})" if source else name
            found.append(StackEntry(label, 1.0, 1.0, lora=lora))
    return found


class Unusable(list[Any]):
    """A LORA_STACK that could not be made; whoever reads it or adds to it gets the reason.

    The host keeps a node's outputs, and gives them to a node that was linked to them later.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def _refuse(self, *_: object) -> NoReturn:
        raise ValueError(self.reason)

    __iter__ = __reversed__ = __len__ = __getitem__ = __contains__ = _refuse
    __add__ = __radd__ = __iadd__ = append = extend = insert = copy = _refuse


def as_lora_stack(stack: Iterable[StackEntry], *, now: bool = True) -> LoraStack:
    """(name, model strength, clip strength) of each, for other packs' nodes.

    Raises ValueError naming every entry that such a tuple can't hold: `now`, or when it is read.
    """
    made, problems = [], []
    for entry in stack:
        lost = {
            "no file": entry.path is None,
            "block weights": bool(entry.blocks),
            "a schedule": entry.schedule is not None,
        }
        if any(lost.values()):
            told = " and ".join(what for what, is_there in lost.items() if is_there)
            problems.append(f"{entry.label} has {told}")
        made.append((entry.name, entry.model, entry.clip))
    if not problems:
        return made
    reason = (
        f"a LORA_STACK holds only names and strengths: {'; '.join(problems)}. "
        "Use the output stack, or model and clip, in its place"
    )
    if now:
        raise ValueError(reason)
    return Unusable(reason)


def is_linked(prompt: Mapping[str, Any] | None, node_id: str | None, output: int) -> bool:
    """Whether some node of the prompt takes the output of that number."""
    return any(
        isinstance(value, list) and len(value) == 2 and value[0] == node_id and value[1] == output
        for node in (prompt or {}).values()
        for value in node.get("inputs", {}).values()
    )
