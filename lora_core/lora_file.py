"""LoRA files: {layer path: Adapter} read from every key dialect, checked, and written as kohya's.

Everything that does not fit the model is found before anything is used, and told at once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .adapters import ADAPTERS, Adapter, type_of_tensors
from .files import write_atomically
from .key_map import (
    SEPARATE,
    TEXT_ENCODER,
    KeyMap,
    LayerKey,
    NamedTensors,
    part_of,
    recognise,
)
from .metadata import minimum_metadata, with_hashes
from .safetensors_file import Header, ReadCache, Serialized

__all__ = ["KeyMap", "LayerKey", "LoraFile", "LoraFileError", "write_lora"]

CACHE_BYTES = 2**30
_CACHE = ReadCache(CACHE_BYTES)


class LoraFileError(ValueError):
    """A LoRA that can't be used as it is; `problems` has all that is wrong, one line each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"- {problem}" for problem in problems[:20]]
        if len(problems) > 20:
            shown.append(f"- and {len(problems) - 20} more")
        text = f": {problems[0]}" if len(problems) == 1 else ":\n" + "\n".join(shown)
        super().__init__(source + text)


@dataclass(frozen=True)
class LoraFile:
    """Adapters by layer path, in float32, with the file's metadata.

    `problems` is empty unless the file was read with strict=False. `left_out` are the file's
    modules of a part (UNet or text encoder) that the key map has no layer of.
    """

    adapters: dict[str, Adapter]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | str, keymap: KeyMap, *, strict: bool = True) -> LoraFile:
        """The adapters of a safetensors file for the layers of `keymap`, as own copies.

        Raises ValueError naming the file: see `read_tensors` for damaged ones, and
        LoraFileError with everything in it that does not fit the model. With strict=False what
        fits is loaded, the rest told in `problems`. Read files are cached until they change.
        """
        path = Path(path)

        def check(header: Header) -> None:
            if not NamedTensors.of(header.entries).is_lora:
                raise LoraFileError(path.name, [_not_a_lora(header.entries)])

        with torch.inference_mode(False):  # a node runs in it; cached tensors outlive the node
            tensors, metadata = _CACHE.read(path, check)
        return cls.from_state_dict(
            tensors, keymap, metadata, source=path.name, path=path, strict=strict
        )

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        keymap: KeyMap,
        metadata: Mapping[str, str] | None = None,
        *,
        source: str = "the LoRA",
        path: Path | None = None,
        strict: bool = True,
    ) -> LoraFile:
        """Like `read`, from tensors in memory; `source` names them in errors."""
        with torch.inference_mode(False), torch.no_grad():
            reading = _Reading(tensors, keymap, metadata or {})
        if reading.problems and strict or not reading.adapters:
            raise LoraFileError(source, reading.problems or [_not_a_lora(tensors)])
        return cls(
            reading.adapters,
            dict(metadata or {}),
            path,
            tuple(reading.problems),
            tuple(reading.left_out),
        )

    def to_generic(self) -> dict[str, Tensor]:
        """Copies of all tensors under the host's generic keys: layer path + ending."""
        return {
            f"{path}.{name}": tensor.detach().clone()
            for path, adapter in self.adapters.items()
            for name, tensor in adapter.tensors().items()
        }

    def to_kohya(self, keymap: KeyMap) -> dict[str, Tensor]:
        """All tensors under kohya's keys. LoraFileError for layers that `keymap` lacks."""
        strangers = [path for path in self.adapters if path not in keymap.layers]
        if strangers:
            line = f"{len(strangers)} layers are not in the model: {_some(strangers)}"
            raise LoraFileError("the LoRA can't be named", [line])
        return {
            f"{keymap.layers[path].kohya}.{name}": tensor
            for path, adapter in self.adapters.items()
            for name, tensor in adapter.tensors().items()
        }

    def save(
        self,
        path: Path | str,
        keymap: KeyMap,
        *,
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write kohya's keys with alpha and whole convolution shapes, atomically.

        `metadata` is added to the file's own and wins; what tools need to sort the file is filled
        in where it is missing, hashes always. The same adapters and metadata give the same bytes.
        Raises LoraFileError for layers without a name and values that `dtype` can't hold, OSError
        when writing fails; an older file stays then.
        """
        path = Path(path)
        least = self.least_metadata(keymap.label, path.stem)
        everything = {**least, **self.metadata, **(metadata or {})}
        write_lora(path, self.to_kohya(keymap), everything, dtype)

    def least_metadata(self, family: str, title: str) -> dict[str, str]:
        """See `metadata.minimum_metadata`."""
        ranks = [adapter.rank for adapter in self.adapters.values()]
        alphas = [adapter.alpha for adapter in self.adapters.values()]
        return minimum_metadata(family, title, ranks, alphas)


def write_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    """Write named tensors with metadata and its hashes, atomically; None keeps their dtypes.

    Alphas stay float32: bfloat16 would round alpha 0.3 by 0.1 %, and numpy can't read it. Tensors
    that are not floating point stay what they are.
    """
    if not tensors:
        raise LoraFileError(path.name, ["there are no tensors to write"])
    cast = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    broken = [name for name, tensor in cast.items() if not _is_finite(tensor)]
    if broken:
        lost = [name for name in broken if _is_finite(tensors[name])]
        line = f"{len(broken)} tensors have values that are not finite: {_some(broken)}"
        if lost:
            line += (
                f". {len(lost)} of them are too large for {dtype}; bfloat16 or float32 hold them"
            )
        raise LoraFileError(path.name, [line + ". Nothing was written"])
    serialized = Serialized.of(cast)
    write_atomically(path, serialized.header(with_hashes(metadata, serialized)), serialized.body)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point() or dtype is None:
        return tensor.detach()
    if name.endswith(".alpha"):
        return tensor.detach().to(torch.float32).reshape(())
    return tensor.detach().to(dtype)


class _Reading:
    """One pass over a LoRA's tensors: what fits becomes `adapters`, the rest `problems`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], keymap: KeyMap, metadata: Mapping[str, str]
    ) -> None:
        self.tensors, self.keymap = tensors, keymap
        self.adapters: dict[str, Adapter] = {}
        self.problems: list[str] = []
        self.left_out: list[str] = []
        names = NamedTensors.of(tensors)
        if not names.is_lora:
            self.problems.append(_not_a_lora(tensors))
            return
        parts = keymap.parts
        layers = {
            module: layer
            for module in names.modules
            if (layer := keymap.find(module)) is not None or part_of(module) in parts
        }
        self.left_out = [module for module in names.modules if module not in layers]
        if self.left_out and not layers:
            self._nothing_here()
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

    def _nothing_here(self) -> None:
        wanted = "CLIP" if part_of(self.left_out[0]) == TEXT_ENCODER else "MODEL"
        part = part_of(self.left_out[0])
        self.problems.append(
            f"all {len(self.left_out)} layers are for the {part}; connect a {wanted} to use them"
        )

    def _strangers(self, strangers: list[str]) -> None:
        fused = [name for name in strangers if self.keymap.find_fused(name) is not None]
        if fused:
            self.problems.append(
                f"{len(fused)} modules mean a part of a fused layer (such as q of q/k/v), which is"
                f" not supported yet by this version: {_some(fused)}"
            )
        missing = [name for name in strangers if name not in set(fused)]
        if missing:
            label = self.keymap.label
            self.problems.append(
                f"{len(missing)} layers are not in the model ({label}): {_some(missing)}"
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
                f" this version: {_some(keys)}"
            )
        if names.unknown:
            self.problems.append(
                f"{len(names.unknown)} tensors have names of no known kind: {_some(names.unknown)}"
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
        kind = type_of_tensors(found.keys())
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


def _not_a_lora(keys: Iterable[str]) -> str:
    keys = list(keys)
    if not keys:
        return "it has no tensors"
    return f"it is not a LoRA: none of its {len(keys)} tensors is named like one: {_some(keys)}"


def _missing(found: Iterable[str]) -> str:
    """What the type with the most tensors in common still lacks."""
    present = set(found)
    nearest = max(ADAPTERS.values(), key=lambda cls: len(cls.required & present))
    lacking = ", ".join(sorted(nearest.required - present))
    return f"{lacking} is missing; there is only {', '.join(sorted(present))}"


def _unfit(name: str, tensor: Tensor) -> str:
    """Why a tensor can't be used whatever the layer; "" when it can."""
    if not tensor.is_floating_point():
        return f"{name} is {tensor.dtype}, expected floating point"
    if tensor.numel() == 0:
        return f"{name} is empty: {tuple(tensor.shape)}"
    if not _is_finite(tensor):
        bad = int((~tensor.float().isfinite()).sum())
        return f"{name} has {bad} of {tensor.numel()} values that are not finite (NaN or infinite)"
    return ""


def _is_finite(tensor: Tensor) -> bool:
    """float8 has no isfinite of its own in torch, so all is compared in float32 or wider."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return bool(wide.isfinite().all())


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(name if len(name) <= 120 else name[:117] + "..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
