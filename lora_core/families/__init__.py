"""Key maps of model families whose models are not loaded, from files made of the host's models.

docs/families.md tells what is in the files and how they are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..key_map import MODULATION, KeyMap, LayerKey, family_label
from ..layer_names import DIFFUSERS_KOHYA, key_map_of
from ..network import UNET_PREFIX, Meaning, Network
from ..recognition import Shapes, layer_sizes, recognise
from .lines import Line, expanded

FOLDER = Path(__file__).parent
FAMILIES = ("SD1.5", "SDXL", "SD3", "Flux", "Lumina2", "Z-Image", "Qwen-Image", "Wan")


def key_map_for(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> KeyMap:
    """The key map of the family that a LoRA's {tensor name: shape} and metadata are made for.

    ValueError where the family is not recognised, or is none of FAMILIES.
    """
    family = recognise(shapes, metadata)
    if family is None:
        raise ValueError(f"its family is not known by its layers; known are {_known()}")
    return family_key_map(family, shapes)


def family_key_map(family: str, shapes: Shapes | None = None) -> KeyMap:
    """The key map of a family ("SDXL", also as `sdxl`), text encoders included.

    Of its variants, such as Wan's sizes, the one that most modules of a LoRA's {tensor name:
    shape} fit; the first where they fit alike. ValueError for none of FAMILIES.
    """
    sizes = layer_sizes(shapes or {})
    found = [variant_key_map(family, variant) for variant in variants(family)]
    return max(found, key=lambda keymap: _num_fitting(keymap, sizes)) if sizes else found[0]


def variants(family: str) -> tuple[str, ...]:
    """The names of a family's variants, the most usual first. ValueError for none of FAMILIES."""
    return tuple(_content(_label(family))["variants"])


def variant_key_map(family: str, variant: str) -> KeyMap:
    """The key map of one of `variants(family)`."""
    return _key_map(_label(family), variant)


def family_file(family: str) -> Path:
    """The file of a family's layers."""
    return FOLDER / f"{family.lower()}.json"


def with_kohya(network: Network, family: str) -> Network:
    """A diffusion model's network with the names of kohya's that every host knows."""
    own = {
        path.removeprefix(UNET_PREFIX): Meaning(path)
        for path in network.shapes
        if path not in network.parameters  # of these the host knows the path alone
    }
    known = {**own, **network.table} if family in DIFFUSERS_KOHYA else own
    kohya = {"lora_unet_" + name.replace(".", "_"): meaning for name, meaning in known.items()}
    return replace(network, hosts=kohya | dict(network.hosts))


@cache
def _content(label: str) -> dict[str, Any]:
    return json.loads(family_file(label).read_text(encoding="utf-8"))


@cache
def _key_map(label: str, variant: str) -> KeyMap:
    content = _content(label)
    model = _network([*content["common"], *content["variants"][variant]])
    model = with_kohya(replace(model, style=content["style"]), label)
    return key_map_of(label, [model, _network(content["encoders"])])


def _network(lines: list[Line]) -> Network:
    found = list(expanded(lines))
    shapes = {line["at"]: tuple(line["shape"]) for line in found}
    parameters = {path: shape for path, shape in shapes.items() if path.endswith(MODULATION)}
    embeddings = {line["at"]: shapes[line["at"]] for line in found if line.get("embedding")}
    return Network(
        layers={
            path: shape
            for path, shape in shapes.items()
            if len(shape) > 1 and path not in parameters and path not in embeddings
        },
        norms={path: shape for path, shape in shapes.items() if len(shape) == 1},
        biases=frozenset(line["at"] for line in found if line.get("bias")),
        hosts=_meanings(found, "hosts"),
        table=_meanings(found, "table"),
        parameters=parameters,
        embeddings=embeddings,
    )


def _meanings(lines: list[Line], key: str) -> dict[str, Meaning]:
    """{name: Meaning} of what lines have under `key`: one name of the layer, or {name: part}."""
    told = ((line["at"], line.get(key, {})) for line in lines)
    return {
        name: Meaning(path, *_part(part))
        for path, names in told
        for name, part in ({names: "whole"} if isinstance(names, str) else names).items()
    }


def _part(part: Any) -> tuple[Any, bool]:
    """(rows, swapped) as a file has them: a list of rows, "swapped", or "whole"."""
    return (tuple(part), False) if isinstance(part, list) else (None, part == "swapped")


def _label(family: str) -> str:
    label = family_label(family)
    if label not in FAMILIES:
        raise ValueError(f"the layers of {label} are not known; known are {_known()}")
    return label


def _known() -> str:
    return f"{', '.join(FAMILIES[:-1])} and {FAMILIES[-1]}"


def _num_fitting(keymap: KeyMap, sizes: Mapping[str, tuple[int, int]]) -> int:
    found = ((name, keymap.find(name), size) for name, size in sizes.items())
    return sum(layer is not None and _fits(layer, name, size) for name, layer, size in found)


def _fits(layer: LayerKey, name: str, size: tuple[int, int]) -> bool:
    """Whether (rows, columns) are those that `name` means of the layer, where they are told."""
    rows = layer.slices[name][2] if name in layer.slices else layer.shape[0]
    wanted = (rows, layer.shape[1] if len(layer.shape) > 1 else 0)
    return all(told in (0, side) for told, side in zip(size, wanted, strict=True))
