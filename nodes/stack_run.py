"""What LoRA Stack does, one step a function: gather, read, blend, apply, tell."""

from __future__ import annotations

import math
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
    entries: Sequence[StackEntry],
    model: Any,
    clip: Any,
    rule: str,
    master: float,
    mode: str,
    rows: Any = None,
) -> Done:
    """Blend the strengths of all entries and apply them at once to what is there of MODEL and CLIP.

    Raises ValueError for files that do not fit, unknown choices, and schedules in mode patch.
    """
    check(entries, model, mode)
    keymap = None if model is None and clip is None else models.shared_key_map(model, clip)
    read, unread = read_for(entries, keymap, must=rule == blend.EQUAL_ENERGY)
    grams = Grams(entries, read, keymap, models.unpatched_weights(model, clip))

    def norms(part: str) -> list[float]:
        return (grams if has_part(entries, part, keymap) else by_family(entries, part)).norms(part)

    try:
        stack = blended(entries, rule, master, norms)
    except NeedsWeight as error:
        raise ValueError(f"{error}: link the model, or choose another blending") from error
    effective = [entry.at(new.model, new.clip) for entry, new in zip(read, stack, strict=False)]
    apply_by_mode = live.apply_live if mode == "live" else apply.apply
    new_model, new_clip = apply_by_mode(model, clip, effective)
    words = dict.fromkeys(filter(None, (entry.trigger_words for entry in entries)))
    similar, unknown = grams.cosines()
    similar = signed(similar, stack)
    return Done(
        model=new_model,
        clip=new_clip,
        stack=tuple(stack),
        trigger_words=", ".join(words),
        report=report(entries, stack, similar, unread or unknown),
        shown=shown(stack, similar, rows),
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


def has_part(entries: Sequence[StackEntry], part: str, keymap: KeyMap | None) -> bool:
    """Whether what was read has all that the entries change of MODEL or TEXT_ENCODER."""
    if keymap is None or part in keymap.parts:
        return True
    return not any(part in entry.parts for entry in entries)


def by_family(entries: Sequence[StackEntry], part: str) -> Grams:
    """Those of a part that is not linked; ValueError where a file's family is not known."""
    try:
        return Grams(entries, read_stack(entries, None), None, None)
    except ValueError as error:
        raise ValueError(
            f"equal energy needs the changes of the {part}, too, since the stack goes on with "
            f"them: link it. {error}"
        ) from error


class Grams:
    """The Gram matrices of a stack's changes, of MODEL and TEXT_ENCODER.

    They do not depend on strengths, so that the last ones of files are kept.
    """

    _known: Recent[tuple[KeyMap | None, dict[str, Tensor]]] = Recent(16)

    def __init__(
        self,
        entries: Sequence[StackEntry],
        read: Sequence[Entry],
        keymap: KeyMap | None,
        weight: Weight | None,
    ) -> None:
        self._read, self._weight = read, weight
        self._keymap = keymap  # kept with what is known by its id, which then stays taken
        self._key = (tuple(entry.source for entry in entries), id(keymap))
        self._is_kept = all(entry.path is not None for entry in entries)
        self._own: dict[str, Tensor] | None = None

    def of(self, part: str) -> Tensor:
        """Raises NeedsWeight."""
        if self._own is None:
            known = self._known.get(self._key) if self._is_kept else None
            self._own = known[1] if known is not None else self._made()
        return self._own[part]

    def _made(self) -> dict[str, Tensor]:
        parts = (MODEL, TEXT_ENCODER)
        made = {part: gram_of(self._read, part, self._weight) for part in parts}
        if self._is_kept:
            self._known.put(self._key, (self._keymap, made), 1)
        return made

    @classmethod
    def forget(cls) -> None:
        """Drop those of every stack."""
        cls._known.clear()

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


def signed(
    similar: Mapping[str, Sequence[Sequence[float]]], stack: Sequence[StackEntry]
) -> dict[str, list[list[float]]]:
    """Cosines of the changes as they are applied: a negative strength turns one around."""
    found = {}
    for part, table in similar.items():
        strengths = [entry.model if part == MODEL else entry.clip for entry in stack]
        signs = [math.copysign(1.0, strength) for strength in strengths]
        found[part] = [
            [cosine * sign * other for cosine, other in zip(line, signs, strict=True)]
            for line, sign in zip(table, signs, strict=True)
        ]
    return found


def shown(
    stack: Sequence[StackEntry], similar: Mapping[str, Sequence[Sequence[float]]], rows: Any
) -> dict[str, Any]:
    """The node's own rows as JSON: effective strengths, share, cosines to the others.

    `source` are the rows that they are of, as the node got them.
    """
    shares = blend.shares([entry.model for entry in stack])
    found = []
    for index, (entry, share) in enumerate(zip(stack, shares, strict=True)):
        if entry.row is not None:
            row = {"row": entry.row, "model": entry.model, "clip": entry.clip, "share": share}
            if MODEL in similar:
                row["cosines"] = [
                    {"with": stack[other].label, "cosine": cosine}
                    for other, cosine in enumerate(similar[MODEL][index])
                    if other != index
                ]
            found.append(row)
    return {"rows": found} | ({"source": rows} if isinstance(rows, str) else {})


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
