"""One pass over a LoRA's tensors: every adapter that fits, and everything that does not."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .adapters import ADAPTERS, Adapter, type_of_tensors
from .key_map import SEPARATE, TEXT_ENCODER, KeyMap, LayerKey, NamedTensors, part_of, recognise


class LoraFileError(ValueError):
    """A LoRA that can't be used as it is; `problems` has all that is wrong, one line each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"- {problem}" for problem in problems[:20]]
        if len(problems) > 20:
            shown.append(f"- and {len(problems) - 20} more")
        text = f": {problems[0]}" if len(problems) == 1 else ":\n" + "\n".join(shown)
        super().__init__(source + text)


class Reading:
    """One pass over a LoRA's tensors: what fits becomes `adapters`, the rest `problems`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], keymap: KeyMap, metadata: Mapping[str, str]
    ) -> None:
        self.tensors, self.keymap = tensors, keymap
        self.adapters: dict[str, Adapter] = {}
        self.problems: list[str] = []
        self.left_out: dict[str, Tensor] = {}
        names = NamedTensors.of(tensors)
        if not names.is_lora:
            self.problems.append(not_a_lora(tensors))
            return
        parts = keymap.parts
        layers = {
            module: layer
            for module in names.modules
            if (layer := keymap.find(module)) is not None or part_of(module) in parts
        }
        if names.modules and not layers:
            self._nothing_here(list(names.modules))
        self._leave_out(names)
        self._strangers([module for module, layer in layers.items() if layer is None])
        unusable = self._kept_aside(names)
        self._peft_scales(metadata)
        owners: dict[str, str] = {}
        for module, layer in layers.items():
            if layer is None:
                continue
            if layer.path in owners:
                self.problems.append(f"{layer.path} is there twice: {owners[layer.path]}, {module}")
                continue
            owners[layer.path] = module
            if module not in unusable:
                self._build(module, layer, names.modules[module])
        self._other_family(len(layers))

    def _nothing_here(self, modules: list[str]) -> None:
        part = part_of(modules[0])
        wanted = "CLIP" if part == TEXT_ENCODER else "MODEL"
        self.problems.append(
            f"all {len(modules)} layers are for the {part}; connect a {wanted} to use them"
        )

    def _leave_out(self, names: NamedTensors) -> None:
        """Keep the tensors of a part that is not connected, so that a save does not lose them."""
        by_module = [
            *((module, key) for module, found in names.modules.items() for key in found.values()),
            *((module, key) for key, (_, module, _) in names.foreign.items()),
        ]
        parts = self.keymap.parts
        self.left_out = {
            key: self.tensors[key].detach().clone()
            for module, key in by_module
            if part_of(module) not in parts and self.keymap.find(module) is None
        }

    def _strangers(self, strangers: list[str]) -> None:
        fused = [name for name in strangers if self.keymap.find_fused(name) is not None]
        if fused:
            self.problems.append(
                f"{len(fused)} modules mean a part of a fused layer (such as q of q/k/v), which is"
                f" not supported yet by this version: {some(fused)}"
            )
        missing = [name for name in strangers if name not in set(fused)]
        if missing:
            label = self.keymap.label
            self.problems.append(
                f"{len(missing)} layers are not in the model ({label}): {some(missing)}"
            )

    def _other_family(self, total: int) -> None:
        """Says first, when most layers do not fit, what model the file seems to be made for."""
        if len(self.adapters) * 2 >= total:
            return
        looks = recognise({key: tensor.shape for key, tensor in self.tensors.items()})
        if looks is not None and looks != self.keymap.label:
            self.problems.insert(
                0,
                f"{len(self.adapters)} of {total} layers match: the file looks like {looks}, the"
                f" model is {self.keymap.label}",
            )

    def _kept_aside(self, names: NamedTensors) -> set[str]:
        """Tells of the other types' tensors; gives the modules that are not usable without them."""
        by_kind: dict[str, list[str]] = defaultdict(list)
        for key, (kind, module, _) in names.foreign.items():
            if part_of(module) in self.keymap.parts:
                by_kind[kind].append(key)
        for kind, keys in by_kind.items():
            self.problems.append(
                f"{len(keys)} tensors look like the type {kind}, which is not supported yet by"
                f" this version: {some(keys)}"
            )
        if names.unknown:
            self.problems.append(
                f"{len(names.unknown)} tensors have names of no known kind: {some(names.unknown)}"
            )
        others = (entry for entry in names.foreign.values() if entry[0] not in SEPARATE)
        return {module for _, module, _ in others}

    def _peft_scales(self, metadata: Mapping[str, str]) -> None:
        """diffusers keeps alpha out of the tensors; ignoring it would scale the LoRA wrongly."""
        try:
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            settings = {}
        if not isinstance(settings, dict):
            return
        named = {key.rpartition("."): value for key, value in settings.items()}
        scaled = any(
            value
            and (name in ("use_rslora", "alpha_pattern", "rank_pattern"))
            or (name == "lora_alpha" and value != named.get((prefix, dot, "r"), value))
            for (prefix, dot, name), value in named.items()
        )
        if scaled:
            self.problems.append(
                "its alpha is kept in the metadata lora_adapter_metadata, which is not supported"
                " yet by this version"
            )

    def _build(self, module: str, layer: LayerKey, found: Mapping[str, str]) -> None:
        where = layer.path if module == layer.path else f"{layer.path} ({module})"
        kind = type_of_tensors({name: self.tensors[key].shape for name, key in found.items()})
        if kind is None:
            self.problems.append(f"{where}: {_missing(found)}")
            return
        named = {name: self.tensors[key] for name, key in found.items()}
        problems = [text for name, tensor in named.items() if (text := _unfit(name, tensor))]
        if not problems:
            try:
                owned = {name: t.detach().to(torch.float32, copy=True) for name, t in named.items()}
                self.adapters[layer.path] = kind.from_tensors(owned, tuple(layer.shape))
            except ValueError as error:
                problems = [str(error)]
        self.problems += [f"{where}: {problem}" for problem in problems]


def not_a_lora(keys: Iterable[str]) -> str:
    """What to say of tensors none of which is named as a LoRA's."""
    keys = list(keys)
    if not keys:
        return "it has no tensors"
    return f"it is not a LoRA: none of its {len(keys)} tensors is named like one: {some(keys)}"


def _missing(found: Iterable[str]) -> str:
    """What the form with the most tensors in common still lacks."""
    present = set(found)
    forms = [form for cls in ADAPTERS.values() for form in cls.forms]
    nearest = max(forms, key=lambda form: (len(form & present), -len(form - present)))
    lacking = ", ".join(sorted(nearest - present))
    return f"{lacking} is missing; there is only {', '.join(sorted(present))}"


def _unfit(name: str, tensor: Tensor) -> str:
    """Why a tensor can't be used whatever the layer; "" when it can."""
    if not tensor.is_floating_point() and tensor.numel() != 1:  # a flag, such as on_input
        return f"{name} is {tensor.dtype}, expected floating point"
    if tensor.numel() == 0:
        return f"{name} is empty: {tuple(tensor.shape)}"
    if not is_finite(tensor):
        bad = int((~tensor.float().isfinite()).sum())
        return f"{name} has {bad} of {tensor.numel()} values that are not finite (NaN or infinite)"
    return ""


def is_finite(tensor: Tensor) -> bool:
    """float8 has no isfinite of its own in torch, so all is compared in float32 or wider."""
    if not tensor.is_floating_point() and tensor.numel() != 1:  # a flag, such as on_input
        return True
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return bool(wide.isfinite().all())


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first of the names, shortened, and how many more there are."""
    shown = ", ".join(name if len(name) <= 120 else name[:117] + "..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
