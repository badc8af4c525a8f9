"""Adapters under the names and settings by which diffusers and PEFT read them.

A LoRA is `lora_A.weight`, `lora_B.weight` and for DoRA `lora_magnitude_vector`. Alpha is no tensor
there: diffusers reads it from the metadata `lora_adapter_metadata` and refuses files that have
both, PEFT from adapter_config.json (diffusers loaders/peft.py `load_lora_adapter`, PEFT
tuners/lora/config.py). Other types, which neither reads as such, keep LyCORIS' names and alphas.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .adapters import Adapter
from .adapters.lora import LoRA
from .fused import cut, swapped
from .key_map import BIAS, KeyMap, LayerKey
from .lora_reading import LoraFileError, some
from .peft_config import CONFIG, METADATA

_WRAPPER = "base_model.model."


@dataclass
class Written:
    """Tensors by name, and {part of the pipeline: {module's name there: its LoRA}}."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    loras: dict[str, dict[str, LoRA]] = field(default_factory=lambda: defaultdict(dict))

    def metadata(self) -> dict[str, str]:
        """`lora_adapter_metadata`, each setting with its part's name before it."""
        settings = {
            f"{part}.{name}": value
            for part, loras in sorted(self.loras.items())
            for name, value in _settings(loras).items()
        }
        return {METADATA: json.dumps(settings, sort_keys=True)} if settings else {}


def diffusers_names(adapters: Mapping[str, Adapter], keymap: KeyMap) -> Written:
    """Everything for one file of a pipeline's LoRAs; fused layers are cut into diffusers' own.

    Raises LoraFileError listing every layer that can't be named or cut, and DoRAs that PEFT
    can't read: of columns, or on some of a part's layers only.
    """
    written, problems = Written(), []
    for path, adapter in adapters.items():
        layer = keymap.at(path.removesuffix(BIAS))
        try:
            for name, piece in _pieces(path, adapter, layer):
                _write(written, name, piece)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    for part, loras in written.loras.items():
        plain = [name for name, lora in loras.items() if lora.magnitude is None]
        if 0 < len(plain) < len(loras):
            problems.append(f"DoRA is on some layers of {part} only, not on {some(plain)}")
    if problems:
        raise LoraFileError("the LoRA can't be written for diffusers", problems)
    return written


def peft_folder(
    adapters: Mapping[str, Adapter], keymap: KeyMap
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of adapter_model.safetensors, and {adapter_config.json: its text}.

    Raises LoraFileError as `diffusers_names`, and for other types or more than one part.
    """
    written = diffusers_names(adapters, keymap)
    kinds = {
        "Tucker forms" if getattr(it, "mid", None) is not None else it.name
        for it in adapters.values()
    } or {"nothing"}
    others = sorted(kinds - {LoRA.name})
    problems = [f"a PEFT folder holds LoRAs only, not {', '.join(others)}"] if others else []
    if len(written.loras) > 1:
        problems.append(f"a PEFT folder is for one model, not for {', '.join(written.loras)}")
    if problems:
        raise LoraFileError("the LoRA can't be written for PEFT", problems)
    ((part, loras),) = written.loras.items()
    named = {
        _WRAPPER + key.removeprefix(f"{part}."): tensor for key, tensor in written.tensors.items()
    }
    return named, {CONFIG: json.dumps(_settings(loras), indent=2, sort_keys=True)}


def _pieces(path: str, adapter: Adapter, layer: LayerKey | None) -> Iterator[tuple[str, Adapter]]:
    """(diffusers' name, adapter) of a layer or of each of its parts."""
    if layer is None or not layer.diffusers:
        raise ValueError("diffusers' name for it is not known")
    first = layer.diffusers[0]
    if first not in layer.slices:
        yield first, swapped(adapter) if first in layer.swapped else adapter
        return
    try:
        yield from cut(adapter, {name: layer.slices[name] for name in layer.diffusers}).items()
    except ValueError as error:
        raise ValueError(
            f"diffusers has it in {len(layer.diffusers)} parts, but {error}; the formats kohya and"
            " comfyui keep it whole"
        ) from error


def _write(written: Written, name: str, adapter: Adapter) -> None:
    if not isinstance(adapter, LoRA) or adapter.mid is not None:
        written.tensors |= {f"{name}.{key}": tensor for key, tensor in adapter.tensors().items()}
        return
    written.tensors[f"{name}.lora_A.weight"] = adapter.down.detach()
    written.tensors[f"{name}.lora_B.weight"] = adapter.up.detach()
    part, _, module = name.partition(".")
    written.loras[part][module] = adapter
    magnitude = adapter.magnitude
    if magnitude is not None:
        if magnitude.shape[0] != adapter.shape[0] or magnitude[0].numel() != 1:
            raise ValueError("its DoRA is of the weight's columns, which PEFT can't read")
        is_linear = len(adapter.shape) == 2
        flat = magnitude.detach().flatten()  # PEFT keeps a convolution's as (1, O, 1, ...)
        shape = (-1,) if is_linear else (1, -1, *[1] * (len(adapter.shape) - 2))
        written.tensors[f"{name}.lora_magnitude_vector"] = flat.reshape(shape)


def _settings(loras: Mapping[str, LoRA]) -> dict[str, object]:
    """The LoraConfig of a part: the commonest rank and alpha, and patterns for all others."""
    rank, alpha = (
        Counter(numbers).most_common(1)[0][0]
        for numbers in ([it.rank for it in loras.values()], [it.alpha for it in loras.values()])
    )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns({name: it.rank for name, it in loras.items()}, rank),
        "alpha_pattern": _patterns({name: it.alpha for name, it in loras.items()}, alpha),
        "target_modules": sorted(loras),
        "use_dora": any(lora.magnitude is not None for lora in loras.values()),
        "use_rslora": False,
        "lora_bias": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
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
