"""Which layer and tensor a name in a LoRA file means, and which family a file is made for.

A name is a module's name plus an ending: "lora_unet_..._to_q" + ".lora_up.weight". The endings
come from the registered adapter types and other writers' spellings, the modules from the KeyMap
of a model, never from replacing "_" by ".".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .adapters import ADAPTERS

MODEL, TEXT_ENCODER = "model", "text encoder"

_TEXT_ENCODER_NAME = re.compile(r"(lora|lycoris|oft)_(te\d?_|text_encoder)|te\d?[._]|text_encoder")
_FAMILY_LABELS = {
    re.sub(r"\W|_", "", label).lower(): label
    for label in "SD1.5 SD2 SDXL SD3 Flux Flux2 Chroma Lumina2 Z-Image Qwen-Image Wan".split()
}
# Families that layer names alone tell; the first that matches any name wins.
_FAMILY_NAMES = (
    ("SD3", r"joint_blocks[._]"),
    ("Flux", r"(double_blocks|single_transformer_blocks)[._]"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"),
    ("SD3", r"transformer_blocks[._]\d+[._]attn[._]add_q_proj"),
    ("Wan", r"blocks[._]\d+[._](self|cross)_attn[._][qkvo]\."),
    ("Lumina2", r"(?<!encoder.)layers[._]\d+[._](attention|feed_forward)[._]"),
)
# Width of the text that a UNet's cross attention reads.
_CONTEXT_WIDTHS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}
_CROSS_ATTENTION = re.compile(
    r"attn2.*to_[kv].*(lora_down\.weight|lora_A(\.default)?\.weight|lora\.down\.weight|hada_w1_b)$"
)

# Endings of other writers (diffusers, PEFT, Mochi) for tensors that the adapters know.
_SPELLINGS = {
    ".lora_B.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_B": "lora_up.weight",
    ".lora_A": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    "_lora.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    **{  # XLabs: the number tells image from text and stays with the module's name
        f"_lora{number}.{word}.weight": f"lora_{word}.weight"
        for number in (1, 2)
        for word in ("up", "down")
    },
}
_NUMBERED = re.compile(r"_lora[12](?=\.(?:up|down)\.weight$)")
# Tensors that belong to a type which is not registered: (type, pattern of the ending).
_FOREIGN = tuple(
    (kind, re.compile(rf"^(.+?)\.({endings})$"))
    for kind, endings in {
        "full": "diff|diff_b|w_norm|b_norm|set_weight|reshape_weight",
        "bias": r"(?:lora_B|lora_up)\.bias",
        "dora": r"dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?",
        "loha": r"hada_\w+",
        "lokr": r"lokr_\w+",
        "oft": r"oft_\w+(?:\.weight)?|rescale",
        "ia3": r"on_input|ia3_l",
        "glora": r"[ab][12]\.weight",
        "embedding": r"lora_embedding_[AB]|string_to_param(?:\..+)?",
    }.items()
)
SEPARATE = {"full", "bias", "embedding"}  # leaving them out does not change the rest of a layer


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


@dataclass(frozen=True)
class KeyMap:
    """The layers of a model ({layer path: LayerKey}) and the names they are found by.

    `family` is a name that `family_label` knows, or the host's own.
    """

    family: str
    layers: Mapping[str, LayerKey]
    _names: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for path, layer in self.layers.items():
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
        """The layer that `name` (kohya name, layer path, alias) means, or means a part of.

        The layer's own `slices` and `swapped` tell a part.
        """
        path = self._names.get(name)
        return None if path is None else self.layers[path]

    @property
    def label(self) -> str:
        """The family's name for people."""
        return family_label(self.family)

    @property
    def parts(self) -> set[str]:
        """Which of MODEL and TEXT_ENCODER it has layers of."""
        return {part_of(path) for path in self.layers}


@dataclass(frozen=True)
class NamedTensors:
    """Tensor names taken apart, whatever the model.

    `modules` is {module name: {the adapter's name of a tensor: key}}; `foreign` {key: (type,
    module name, ending)} for tensors of types that are not registered; `unknown` the other keys.
    """

    modules: dict[str, dict[str, str]]
    foreign: dict[str, tuple[str, str, str]]
    unknown: list[str]

    @classmethod
    def of(cls, keys: Iterable[str]) -> NamedTensors:
        endings = _endings()
        names = cls(defaultdict(dict), {}, [])
        for key in keys:
            ending = next((end for end in endings if key.endswith(end)), None)
            if ending is not None and len(key) > len(ending):
                module, name = key[: -len(ending)], endings[ending]
                if number := _NUMBERED.search(ending):
                    module += number[0]
                if name not in names.modules[module]:
                    names.modules[module][name] = key
                    continue
            names._keep_aside(key)
        return names

    def _keep_aside(self, key: str) -> None:
        for kind, pattern in _FOREIGN:
            if match := pattern.match(key):
                self.foreign[key] = (kind, match[1], match[2])
                return
        self.unknown.append(key)

    @property
    def is_lora(self) -> bool:
        """Whether any tensor of an adapter is there; a lone alpha does not count."""
        return bool(self.foreign) or any(
            set(found) > {"alpha"} or "alpha" not in found for found in self.modules.values()
        )


def _endings() -> dict[str, str]:
    """{ending: the adapter's name of the tensor}, longest first."""
    own = {f".{name}": name for cls in ADAPTERS.values() for name in cls.names()}
    return dict(sorted({**_SPELLINGS, **own}.items(), key=lambda item: (-len(item[0]), item[0])))


def part_of(name: str) -> str:
    """MODEL or TEXT_ENCODER, from a layer path or a name in any file."""
    return TEXT_ENCODER if _TEXT_ENCODER_NAME.match(name) else MODEL


def family_label(family: str) -> str:
    """A family's name for people: "SD1.5" for "sd15", "Qwen-Image" for the host's "QwenImage"."""
    plain = re.sub(r"\W|_", "", family).lower()
    return "Wan" if plain.startswith("wan2") else _FAMILY_LABELS.get(plain, family)


def recognise(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The family that a LoRA file's {tensor name: shape} is made for, as a label; None if unknown.

    From the names of DiT blocks, or the text width in the shapes of a UNet's cross attention.
    """
    names = "\n".join(shapes)
    for label, pattern in _FAMILY_NAMES:
        if re.search(pattern, names):
            return label
    for name, shape in shapes.items():
        if _CROSS_ATTENTION.search(name) and len(shape) > 1 and shape[1] in _CONTEXT_WIDTHS:
            return _CONTEXT_WIDTHS[shape[1]]
    return "SDXL" if re.search(r"lora_te2_|text_encoder_2\.", names) else None
