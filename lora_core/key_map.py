"""Which layer of a model a module's name in a LoRA file means.

The names come from the KeyMap of a model, never from replacing "_" by ".".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

MODEL, TEXT_ENCODER = "model", "text encoder"
BIAS = ".bias"  # after a layer's path: the path of its bias
SCALE = ".scale"  # ends the path of a norm whose weight the host calls so, as it does itself
MODULATION = ".modulation"  # ends the path of a parameter of its own, in Wan's blocks and head

_TEXT_ENCODER_NAME = re.compile(
    r"(lora|lycoris|oft)_(te\d?_|text_encoder)|te\d?[._]|text_encoder"
    r"|base_model\.model\.(text_model\.|encoder\.block\.)"  # PEFT folders of CLIP and T5
)
_FAMILY_LABELS = {
    re.sub(r"\W|_", "", label).lower(): label
    for label in "SD1.5 SD2 SDXL SD3 Flux Flux2 Chroma Lumina2 Z-Image Qwen-Image Wan".split()
}

Slice = tuple[int, int, int]  # (axis, start, length) of a part of a weight


@dataclass(frozen=True)
class LayerKey:
    """A layer and the names that files give it, all without the tensor's own ending.

    `shape` is its weight's. `slices` are names of a part of the weight, such as q of a fused
    q/k/v. `swapped` are names of the whole layer whose two halves of rows stand in the other
    order (scale and shift of a modulation). `diffusers` are the names that diffusers writes: one,
    or those slices that make up the layer.
    """

    path: str
    shape: tuple[int, ...]
    kohya: str
    aliases: tuple[str, ...] = ()
    slices: Mapping[str, Slice] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    diffusers: tuple[str, ...] = ()

    def name_of_rows(self, start: int, stop: int) -> str | None:
        """The best known of the `slices` that mean these rows; None without one.

        A live model's names begin with the host's own, which all have one of these prefixes.
        """
        rows = (0, start, stop - start)
        names = [name for name, part in self.slices.items() if part == rows]
        known = [name for name in names if name.startswith(("transformer.", "diffusion_model."))]
        return next(iter([*known, *names]), None)


@dataclass(frozen=True)
class KeyMap:
    """The layers of a model ({layer path: LayerKey}) and the names they are found by.

    `norms` are the same of norms with a weight of one axis, and `biases` the paths of those layers
    and norms that have a bias. `parameters` are those that are no module's weight: MODULATION.
    `embeddings` are tables of vectors, which files change and nothing here trains.
    `family` is a name that `family_label` knows, or the host's own.
    """

    family: str
    layers: Mapping[str, LayerKey]
    norms: Mapping[str, LayerKey] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    parameters: Mapping[str, LayerKey] = field(default_factory=dict)
    embeddings: Mapping[str, LayerKey] = field(default_factory=dict)
    _names: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for path, layer in chain.from_iterable(kind.items() for kind in self._kinds):
            if path != layer.path:
                problems.append(f"{path!r} holds the layer {layer.path!r}")
            whole = (layer.kohya, layer.path, *layer.aliases, *layer.swapped)
            for name in (*whole, *layer.slices):
                other = self._names.setdefault(name, path)
                if other != path:
                    problems.append(f"{name!r} means both {other!r} and {path!r}")
        if problems:
            raise ValueError("ambiguous layer names: " + "; ".join(problems))

    def find(self, name: str) -> LayerKey | None:
        """The layer or norm that `name` (kohya name, path, alias) means, or means a part of.

        The layer's own `slices` and `swapped` tell a part.
        """
        path = self._names.get(name)
        return None if path is None else self.at(path)

    def at(self, path: str) -> LayerKey | None:
        """The layer, norm, parameter or embedding at `path`."""
        return next((kind[path] for kind in self._kinds if path in kind), None)

    @property
    def _kinds(self) -> tuple[Mapping[str, LayerKey], ...]:
        return self.layers, self.norms, self.parameters, self.embeddings

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of the weight at a layer's path, or of its bias at `<path>.bias`."""
        if (layer := self.at(path)) is not None:
            return tuple(layer.shape)
        owner = path.removesuffix(BIAS)
        owning = self.at(owner) if owner in self.biases else None
        return None if owning is None else tuple(owning.shape[:1])

    @property
    def label(self) -> str:
        """The family's name for people."""
        return family_label(self.family)

    @property
    def parts(self) -> set[str]:
        """Which of MODEL and TEXT_ENCODER it has layers of."""
        return {part_of(path) for path in self.layers}


def part_of(name: str) -> str:
    """MODEL or TEXT_ENCODER, from a layer path or a name in any file."""
    return TEXT_ENCODER if _TEXT_ENCODER_NAME.match(name) else MODEL


def family_label(family: str) -> str:
    """A family's name for people: "SD1.5" for "sd15", "Qwen-Image" for the host's "QwenImage"."""
    plain = re.sub(r"\W|_", "", family).lower()
    return "Wan" if plain.startswith("wan2") else _FAMILY_LABELS.get(plain, family)
