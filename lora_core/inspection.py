"""What a LoRA file is, from its header alone: no tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import peft_config
from .adapters import UNREGISTERED, type_of_tensors
from .blocks import block_of, in_order
from .families import FAMILIES, family_key_map
from .key_map import part_of
from .recognition import Shapes, dialect_of, recognise
from .safetensors_file import TensorEntry, read_header
from .tensor_names import NamedTensors

# The tensor whose first axis is the rank, for the types that have one.
_RANK_TENSORS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2.weight")


@dataclass(frozen=True)
class Inspection:
    """A LoRA file's header and what it tells.

    `tensors` are {name: dtype, shape and place in the file}. `family` is a label or None,
    `dialect` "" where no tensor is a LoRA's. `types` counts the modules of each adapter type, "?"
    those of none; `ranks` the modules of each rank. `blocks` are those that it changes, of the
    `family_blocks`, both in the model's order and empty where the family's layers are not known.
    `num_bytes` are those of all tensors.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    family: str | None
    dialect: str
    types: Mapping[str, int]
    ranks: Mapping[int, int]
    blocks: tuple[str, ...]
    family_blocks: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.end - entry.begin for entry in self.tensors.values())

    @property
    def dtypes(self) -> Mapping[str, int]:
        """How many tensors there are of each dtype, as safetensors calls it."""
        return Counter(entry.dtype for entry in self.tensors.values())


def inspect_file(path: Path | str) -> Inspection:
    """Look at a file or PEFT folder. Raises as `read_tensors` does; a file need not be a LoRA."""
    path, config = peft_config.find_files(Path(path))
    header = read_header(path)
    shapes = {name: entry.shape for name, entry in header.entries.items()}
    types: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    for found in NamedTensors.of(shapes).modules.values():
        of = {name: shapes[key] for name, key in found.items()}
        types[_type_name(of)] += 1
        ranked = next((of[name] for name in _RANK_TENSORS if of.get(name)), None)
        if ranked is not None:
            ranks[ranked[0]] += 1
    family = recognise(shapes, header.metadata)
    changed, of_family = _blocks(shapes, family)
    return Inspection(
        path=path,
        metadata={**header.metadata, **config},
        tensors=header.entries,
        family=family,
        dialect=dialect_of(shapes),
        types=types,
        ranks=ranks,
        blocks=changed,
        family_blocks=of_family,
    )


def _type_name(shapes: Shapes) -> str:
    """The type of a module's tensors: a registered one, one that only files have, or "?"."""
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    others = (cls for cls in UNREGISTERED.values() if cls.accepts(sizes))
    kind = type_of_tensors(sizes) or next(others, None)
    return "?" if kind is None else kind.name


def _blocks(shapes: Shapes, family: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The blocks that a LoRA changes, and all of its family."""
    if family not in FAMILIES:
        return (), ()
    keymap = family_key_map(family, shapes)
    layers = (keymap.find(module) for module in NamedTensors.of(shapes).modules)
    changed = {block_of(layer.path) for layer in layers if layer is not None}
    paths = sorted(keymap.layers, key=part_of)  # the diffusion model's come first
    known = in_order(map(block_of, paths))
    return tuple(block for block in known if block in changed), known
