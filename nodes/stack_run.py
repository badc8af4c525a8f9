"""What LoRA Stack does, one step a function: gather, read, blend, apply, tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..lora_core import blend
from ..lora_core.host import apply, live, models, stacks
from ..lora_core.key_map import MODEL, TEXT_ENCODER, KeyMap
from ..lora_core.recent import Recent
from ..lora_core.similarity import NeedsWeight, Weight, cosines
from ..lora_core.stack import Entry, StackEntry, blended, gram_of, read_stack
from ..lora_core.stack_rows import parse_rows


@dataclass(frozen=True)
class Done:
    """What came of a stack. `shown` is what the node's rows show of it."""

    model: Any
    clip: Any
    stack: tuple[StackEntry, ...]
    trigger_words: str
    report: str
    shown: dict[str, Any]


def gather(rows: Any, lora_inputs: Sequence[str], sockets: Mapping[str, Any]) -> list[StackEntry]:
    """All entries in their order: lora_stack, stack, LORA_MODELs, the node's rows.

    ValueError naming everything that can't be found or read.
    """
    return [
        *stacks.of_lora_stack(sockets.get("lora_stack")),
        *(entry.from_outside() for entry in sockets.get("stack") or ()),
        *stacks.of_models({name: sockets.get(name) for name in lora_inputs}),
        *stacks.of_rows(parse_rows(rows)),
    ]


def apply_stack(
    entries: Sequence[StackEntry], model: Any, clip: Any, rule: str, master: float, mode: str
) -> Done:
    """Blend the strengths of all entries and apply them at once to what is there of MODEL and CLIP.

    Raises ValueError for files that do not fit, unknown choices, and schedules in mode patch.
    """
    check(entries, model, mode)
    keymap = None if model is None and clip is None else models.shared_key_map(model, clip)
    read, unread = read_for(entries, keymap, must=rule == blend.EQUAL_ENERGY)
    grams = Grams(entries, read, keymap, models.unpatched_weights(model, clip))
    try:
        stack = blended(entries, rule, master, grams.norms)
    except NeedsWeight as error:
        raise ValueError(f"{error}: link the model, or choose another blending") from error
    effective = [entry.at(new.model, new.clip) for entry, new in zip(read, stack, strict=False)]
    apply_by_mode = live.apply_live if mode == "live" else apply.apply
    new_model, new_clip = apply_by_mode(model, clip, effective)
    words = dict.fromkeys(filter(None, (entry.trigger_words for entry in entries)))
    similar, unknown = grams.cosines()
    return Done(
        model=new_model,
        clip=new_clip,
        stack=tuple(stack),
        trigger_words=", ".join(words),
        report=report(entries, stack, similar, unread or unknown),
        shown=shown(stack, similar),
    )


def check(entries: Sequence[StackEntry], model: Any, mode: str) -> None:
    """Raises ValueError for an unknown mode, and for schedules, which patches can't follow."""
    if mode not in ("patch", "live"):
        raise ValueError(f"mode is {mode!r}, known are patch, live")
    scheduled = [entry.label for entry in entries if entry.schedule is not None]
    if mode == "patch" and model is not None and scheduled:
        raise ValueError(
            f"{', '.join(scheduled)}: a schedule needs mode live, or the node LoRA Stack to Hooks "
            "on the output stack with no model linked here"
        )


def read_for(
    entries: Sequence[StackEntry], keymap: KeyMap | None, *, must: bool
) -> tuple[list[Entry], str]:
    """The entries read, and why they could not be where nothing needs them but the report.

    Without a key map each is read by its family's. Raises ValueError if they `must` be read.
    """
    try:
        return read_stack(entries, keymap), ""
    except ValueError as error:
        if must or keymap is not None:
            raise
        return [], str(error)


class Grams:
    """The Gram matrices of a stack's changes, of MODEL and TEXT_ENCODER.

    They do not depend on strengths, so that the last ones are kept.
    """

    _known: Recent[tuple[Any, dict[str, Tensor]]] = Recent(16)

    def __init__(
        self,
        entries: Sequence[StackEntry],
        read: Sequence[Entry],
        keymap: KeyMap | None,
        weight: Weight | None,
    ) -> None:
        self._read, self._weight = read, weight
        self._key = (tuple(entry.source for entry in entries), id(keymap))
        self._kept_alive = (keymap, [entry.lora for entry in entries])  # so are their ids

    def of(self, part: str) -> Tensor:
        """Raises NeedsWeight."""
        known = self._known.get(self._key)
        if known is None:
            found = {one: gram_of(self._read, one, self._weight) for one in (MODEL, TEXT_ENCODER)}
            known = (self._kept_alive, found)
            self._known.put(self._key, known, 1)
        return known[1][part]

    def norms(self, part: str) -> list[float]:
        """||ΔW|| of each entry at strength 1."""
        products: list[float] = self.of(part).diagonal().clamp(min=0).sqrt().tolist()
        return products

    def cosines(self) -> tuple[dict[str, list[list[float]]], str]:
        """Pairwise, for each part that two entries change; and why there are none."""
        try:
            products = {part: self.of(part) for part in (MODEL, TEXT_ENCODER)}
        except NeedsWeight as error:
            return {}, str(error)
        found = {
            part: cosines(of_part).tolist()
            for part, of_part in products.items()
            if (of_part.diagonal() > 0).sum() > 1
        }
        return found, ""


def shown(
    stack: Sequence[StackEntry], similar: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """The node's own rows as JSON: effective strengths, share, cosines to the others."""
    shares = blend.shares([entry.model for entry in stack])
    rows = []
    for index, (entry, share) in enumerate(zip(stack, shares, strict=True)):
        if entry.row is not None:
            row = {"row": entry.row, "model": entry.model, "clip": entry.clip, "share": share}
            if MODEL in similar:
                others = enumerate(similar[MODEL][index])
                row["cosines"] = {stack[other].label: c for other, c in others if other != index}
            rows.append(row)
    return {"rows": rows}


def report(
    typed: Sequence[StackEntry],
    stack: Sequence[StackEntry],
    similar: Mapping[str, Sequence[Sequence[float]]],
    unknown: str,
) -> str:
    """Strengths and cosines as text, a line each; `unknown` is why there are no cosines."""
    shares = blend.shares([entry.model for entry in stack])
    lines = [
        f"{entry.label}: model {entry.model:.3g} (typed {before.model:g}), clip {entry.clip:.3g} "
        f"(typed {before.clip:g}), {share:.0%} of the blend"
        for before, entry, share in zip(typed, stack, shares, strict=True)
    ]
    if unknown:
        lines += ["", f"Cosines are not known without the model: {unknown}"]
    for part, table in similar.items():
        lines += ["", f"Cosines of the changes of the {part}; 0: apart, 1: the same, -1: opposed"]
        for one in range(len(table)):
            for other in range(one):
                lines.append(
                    f"{table[one][other]:+.2f}  {stack[other].label} and {stack[one].label}"
                )
    return "\n".join(lines)
