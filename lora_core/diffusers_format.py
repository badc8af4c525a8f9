"""Adapters under the names and settings by which diffusers reads them.

A LoRA is `lora_A.weight`, `lora_B.weight` and for DoRA `lora_magnitude_vector`. Alpha is no tensor
there: diffusers reads it from the metadata `lora_adapter_metadata` and refuses files that have
both (diffusers loaders/peft.py `load_lora_adapter`, PEFT tuners/lora/config.py). Other types, which
it does not read, keep their own names and alphas.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from .adapters import Adapter
from .adapters.lora import LoRA
from .adapters.pieces import Pieces
from .fused import cut, swapped
from .key_map import BIAS, KeyMap, LayerKey
from .lora_reading import LoraFileError, some
from .peft_config import METADATA

Loras = Mapping[str, LoRA]  # {module's name in its part of the pipeline: its LoRA}


def diffusers_names(
    parts: Iterable[tuple[Mapping[str, Adapter], KeyMap]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata for one file of a pipeline's LoRAs, each with the key map that names
    them; fused layers are cut into diffusers' own.

    Raises LoraFileError listing every layer that can't be named or cut, and DoRAs that PEFT
    can't read: of columns, or on some of a part's layers only.
    """
    tensors: dict[str, Tensor] = {}
    loras: dict[str, dict[str, LoRA]] = defaultdict(dict)
    named: list[tuple[str, Adapter]] = []
    problems: list[str] = []
    for adapters, keymap in parts:
        pieces, unnamed = named_pieces(adapters, keymap)
        named += pieces
        problems += unnamed
    for name, adapter in named:
        if not isinstance(adapter, LoRA) or adapter.mid is not None:
            tensors |= {f"{name}.{key}": tensor for key, tensor in adapter.tensors().items()}
            continue
        part, _, module = name.partition(".")
        loras[part][module] = adapter
        try:
            tensors |= lora_tensors(name, adapter)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    problems += [text for part, its in loras.items() for text in partly_dora(part, its)]
    if problems:
        raise LoraFileError("the LoRA can't be written for diffusers", problems)
    settings = {
        f"{part}.{name}": value
        for part, its in sorted(loras.items())
        for name, value in lora_settings(its).items()
    }
    return tensors, {METADATA: json.dumps(settings, sort_keys=True)} if settings else {}


def named_pieces(
    adapters: Mapping[str, Adapter], keymap: KeyMap
) -> tuple[list[tuple[str, Adapter]], list[str]]:
    """(diffusers' name, adapter) of every layer or of each of its parts, of biases the same; and
    every layer that can't be named or cut, with the reason.
    """
    named: list[tuple[str, Adapter]] = []
    problems = []
    for path, adapter in adapters.items():
        try:
            named += _pieces(adapter, keymap.at(path.removesuffix(BIAS)))
        except ValueError as error:
            problems.append(f"{path}: {error}")
    return named, problems


def partly_dora(part: str, loras: Loras) -> list[str]:
    """A problem, where some of a part's LoRAs have a magnitude and some have none."""
    plain = [name for name, lora in loras.items() if lora.magnitude is None]
    if 0 < len(plain) < len(loras):
        return [f"DoRA is on some layers of {part} only, not on {some(plain)}"]
    return []


def _pieces(adapter: Adapter, layer: LayerKey | None) -> Iterator[tuple[str, Adapter]]:
    """(diffusers' name, adapter) of a layer or of each of its parts."""
    if layer is None or not layer.diffusers:
        raise ValueError("diffusers' name for it is not known")
    first = layer.diffusers[0]
    if first not in layer.slices and isinstance(adapter, Pieces):
        raise ValueError(
            "diffusers has it whole, but here some rows have adapters of their own; the formats"
            " kohya and comfyui keep these apart"
        )
    if first not in layer.slices:
        yield first, swapped(adapter) if first in layer.swapped else adapter
        return
    try:
        yield from cut(adapter, {name: layer.slices[name] for name in layer.diffusers}).items()
    except ValueError as error:
        raise ValueError(
            f"diffusers has it in {len(layer.diffusers)} parts, but {error}; the formats kohya and"
            " comfyui keep it as it is"
        ) from error


def lora_tensors(name: str, lora: LoRA) -> dict[str, Tensor]:
    """Raises ValueError for DoRA of columns."""
    named = {
        f"{name}.lora_A.weight": lora.down.detach(),
        f"{name}.lora_B.weight": lora.up.detach(),
    }
    magnitude = lora.magnitude
    if magnitude is not None:
        if magnitude.shape[0] != lora.shape[0] or magnitude[0].numel() != 1:
            raise ValueError("its DoRA is of the weight's columns, which PEFT can't read")
        is_linear = len(lora.shape) == 2
        flat = magnitude.detach().flatten()  # PEFT keeps a convolution's as (1, O, 1, ...)
        shape = (-1,) if is_linear else (1, -1, *[1] * (len(lora.shape) - 2))
        named[f"{name}.lora_magnitude_vector"] = flat.reshape(shape)
    return named


def lora_settings(loras: Loras) -> dict[str, object]:
    """The LoraConfig of a part."""
    return {
        "peft_type": "LORA",
        **scale_settings(loras, "lora_alpha"),
        "target_modules": sorted(loras),
        "use_dora": any(lora.magnitude is not None for lora in loras.values()),
        "use_rslora": False,
        "lora_bias": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def scale_settings(adapters: Mapping[str, Adapter], alpha_name: str) -> dict[str, object]:
    """The commonest rank and alpha, and patterns for all others."""
    ranks = {name: it.rank for name, it in adapters.items()}
    alphas = {name: it.alpha for name, it in adapters.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    return {
        "r": rank,
        alpha_name: alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
    }


def _patterns(numbers: Mapping[str, float], common: float) -> dict[str, float]:
    """{name: number} of the layers with another one than `common`.

    PEFT takes the first pattern that a name ends with: longer names stand first, and layers whose
    name ends with a pattern of another are named, too.
    """
    other = {name for name, number in numbers.items() if number != common}
    ends = [f".{name}" for name in other]
    other |= {name for name in numbers if any(name.endswith(end) for end in ends)}
    return {name: numbers[name] for name in sorted(other, key=lambda name: (-len(name), name))}
