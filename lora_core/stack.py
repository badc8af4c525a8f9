"""LORA_WEAVE_STACK: LoRAs in their order, each with strengths, block weights and a schedule.

A StackEntry is a file or a LORA_MODEL of the graph; it becomes an Entry, with adapters, where a
model's layers are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from .adapters import Adapter
from .blend import EQUAL_ENERGY, blend
from .blocks import BlockWeights, block_of
from .key_map import MODEL, TEXT_ENCODER, KeyMap, part_of
from .lora_file import LoraFile
from .lora_model import LoraModel
from .metadata import trigger_words
from .peft_config import stamps_of
from .safetensors_file import shared_header
from .schedule import Schedule
from .similarity import Weight, gram
from .stack_rows import Row


@dataclass(frozen=True)
class Entry:
    """One LoRA of a stack: its adapters by layer path, and how strongly they apply.

    `blocks` multiply the strengths of the layers in a block. `schedule` multiplies the model's
    while an image is sampled; only the live mode and hooks know it.
    """

    adapters: Mapping[str, Adapter]
    strength_model: float
    strength_clip: float
    blocks: BlockWeights | None = None
    schedule: Schedule | None = None

    def strength(self, path: str) -> float:
        """Of one layer, block weight included."""
        whole = self.strength_clip if part_of(path) == TEXT_ENCODER else self.strength_model
        return whole * self.weight(path)

    def weight(self, path: str) -> float:
        """The block weight of one layer."""
        return 1.0 if self.blocks is None else self.blocks.for_path(path)

    def at(self, strength_model: float, strength_clip: float) -> Entry:
        """The same at other strengths."""
        return replace(self, strength_model=strength_model, strength_clip=strength_clip)

    def content(self) -> dict[str, str | Tensor]:
        """All that the entry is, flat: its settings as text, and every tensor by its name."""
        blocks = {} if self.blocks is None else dict(self.blocks.weights)
        settings = f"{self.strength_model} {self.strength_clip} {blocks} {self.schedule}"
        tensors = {
            f"{path}.{name}": tensor
            for path, adapter in self.adapters.items()
            for name, tensor in adapter.tensors().items()
        }
        return {"settings": settings, **tensors}


@dataclass(frozen=True)
class StackEntry:
    """A LoRA not yet read: a file, or a LORA_MODEL where `path` is None.

    `name` is what the loras folders call it, "" for a LORA_MODEL. `label` names it in messages.
    `blocks` are as they were typed: see `BlockWeights.parse`. `row` is its row in the node, None
    for what came in by a socket.
    """

    label: str
    model: float
    clip: float
    name: str = ""
    path: Path | None = None
    lora: LoraModel | None = field(default=None, repr=False)
    blocks: object = None
    schedule: Schedule | None = None
    row: int | None = None

    @classmethod
    def of_row(cls, row: Row, path: Path) -> StackEntry:
        return cls(
            label=row.label,
            model=row.model,
            clip=row.clip,
            name=row.name,
            path=path,
            blocks=row.blocks,
            schedule=row.schedule,
            row=row.index,
        )

    def from_outside(self) -> StackEntry:
        """As an entry of another node, which is in none of the own rows."""
        label = self.label if self.row is None else f"{self.label} of the incoming stack"
        return replace(self, label=label, row=None)

    @property
    def source(self) -> tuple[object, ...]:
        """What tells its LoRA and block weights from others', as long as `lora` is kept alive."""
        found = id(self.lora) if self.path is None else stamps_of(self.path)
        return found, repr(self.blocks)

    @property
    def parts(self) -> set[str]:
        """Which of MODEL and TEXT_ENCODER it changes, by its tensors' names."""
        names = self.lora or {} if self.path is None else shared_header(self.path).entries
        return {part_of(name) for name in names}

    @property
    def short(self) -> str:
        """Its name without folders and ending, for labels."""
        return self.path.stem if self.path is not None else self.label

    @property
    def trigger_words(self) -> str:
        """Those of its metadata; of a file only the header is read."""
        if self.path is None:
            return "" if self.lora is None else self.lora.info.trigger_words
        return trigger_words(shared_header(self.path).metadata)

    def read(self, keymap: KeyMap | None) -> Entry:
        """With its adapters for the layers of `keymap`, without one for those of its own family.

        Raises LoraFileError with all that does not fit, ValueError for block weights that can't be
        read or name no block of the model.
        """
        if self.path is not None:
            file = LoraFile.read_shared(self.path, keymap)
        else:
            assert self.lora is not None, "an entry is a file or a LORA_MODEL"
            file = self.lora.to_file(keymap)
        try:
            family = file.family or ("" if keymap is None else keymap.label)
            blocks = BlockWeights.parse(self.blocks, family)
            if blocks is not None and keymap is not None and MODEL in keymap.parts:
                problems = blocks.check(map(block_of, keymap.layers))
                if problems:
                    raise ValueError("; ".join(problems))
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error
        return Entry(file.adapters, self.model, self.clip, blocks, self.schedule)


def read_stack(stack: Sequence[StackEntry], keymap: KeyMap | None) -> list[Entry]:
    """Every entry read: see `StackEntry.read`. ValueError with what is wrong with any of them."""
    found, problems = [], []
    for entry in stack:
        try:
            found.append(entry.read(keymap))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return found


def blended(
    stack: Sequence[StackEntry],
    rule: str,
    master: float,
    norms: Callable[[str], Sequence[float]],
) -> list[StackEntry]:
    """The stack with effective strengths: blended together by a rule, times master.

    The model's strengths and the text encoder's are blended apart. `norms` gives those of all
    changes of MODEL or TEXT_ENCODER, block weights included; it is asked for "equal energy" only.
    """
    needed = rule == EQUAL_ENERGY
    of_model = norms(MODEL) if needed else None
    of_clip = norms(TEXT_ENCODER) if needed else None
    model = blend([entry.model for entry in stack], rule, master, of_model)
    clip = blend([entry.clip for entry in stack], rule, master, of_clip)
    return [
        replace(entry, model=new_model, clip=new_clip)
        for entry, new_model, new_clip in zip(stack, model, clip, strict=True)
    ]


def gram_of(read: Sequence[Entry], part: str, weight: Weight | None = None) -> Tensor:
    """The Gram matrix of the entries' changes of MODEL or TEXT_ENCODER at strength 1."""
    parts = [{p: a for p, a in entry.adapters.items() if part_of(p) == part} for entry in read]
    return gram(parts, [entry.weight for entry in read], weight)
