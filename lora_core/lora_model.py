"""LORA_MODEL: the host's own socket type, a dict of tensors, with what we know about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .families import key_map_for
from .key_map import KeyMap
from .lora_file import LoraFile, LoraFileError, write_lora
from .lora_naming import FORMATS, Format
from .lora_reading import counted
from .metadata import trigger_words
from .tensor_names import SEPARATE, NamedTensors

__all__ = ["FORMATS", "Format", "LoraInfo", "LoraModel"]


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """What a LORA_MODEL knows beside its tensors; all of it may be unknown.

    `provenance` says in one line where it came from. `keymap` holds the layer names of its model.
    """

    family: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    provenance: str = ""
    trigger_words: str = ""
    keymap: KeyMap | None = None


class LoraModel(dict[str, Tensor]):
    """Tensors under the host's generic keys (layer path + ending), and `info`.

    A plain dict for core's nodes, which read nothing but the items.
    """

    def __init__(self, tensors: Mapping[str, Tensor], info: LoraInfo | None = None) -> None:
        super().__init__(tensors)
        self.info = info or LoraInfo()

    @classmethod
    def of(cls, lora: Mapping[str, Tensor]) -> LoraModel:
        """`lora` itself when it is one, else the plain dict of another node with empty info."""
        return lora if isinstance(lora, cls) else cls(lora)

    @classmethod
    def from_file(cls, lora: LoraFile, keymap: KeyMap, provenance: str = "") -> LoraModel:
        """Copies of a LoraFile's tensors."""
        info = LoraInfo(
            family=keymap.label,
            metadata=dict(lora.metadata),
            provenance=provenance or ("" if lora.path is None else lora.path.name),
            trigger_words=trigger_words(lora.metadata),
            keymap=keymap,
        )
        return cls(lora.to_generic(keymap), info)

    def to_file(self, keymap: KeyMap | None = None, *, strict: bool = True) -> LoraFile:
        """The adapters, checked against `keymap` as a file's are: see `LoraFile.read`.

        Without one, against that of `info`, or of the family that they are made for.
        """
        source = self.info.provenance or "the LORA_MODEL"
        keymap = keymap or self.info.keymap
        return LoraFile.from_state_dict(
            self, keymap, self.info.metadata, source=source, strict=strict
        )

    def save(
        self,
        path: Path | str,
        *,
        format: Format = "kohya",
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the tensors, atomically, with metadata and its hashes; `metadata` wins.

        "comfyui": under the names that they have, whatever they are. "kohya" and "diffusers":
        renamed through `info.keymap`, or where there is none that of the family that they are
        made for, convolutions in full shape; in kohya's, entries that are not read (embeddings)
        are renamed and kept as they are. dtype None keeps dtypes.
        Raises LoraFileError listing every entry that has no name in the format, or values that
        `dtype` can't hold; OSError when writing fails. An older file stays then.
        """
        path = Path(path)
        everything = {**self.info.metadata, **(metadata or {})}
        if format not in FORMATS:
            raise ValueError(f"unknown LoRA format {format!r}; known: {', '.join(FORMATS)}")
        tensors: Mapping[str, Tensor] = self
        if format != "comfyui":
            keymap = self.info.keymap or self._familys_key_map(format, path.name)
            own: dict[str, str] = {}
            if format == "kohya":
                tensors, lora = self._kohya(keymap, path.name)
            else:
                lora = self.to_file(keymap)
                tensors, own = lora.to_format(keymap, format)
            everything = {**lora.least_metadata(keymap.label, path.stem), **everything, **own}
        write_lora(path, tensors, everything, dtype)

    def _familys_key_map(self, format: Format, source: str) -> KeyMap:
        """That of the family that all tensors fit; LoraFileError where there is none."""
        shapes = {name: tensor.shape for name, tensor in self.items()}
        try:
            keymap = key_map_for(shapes, self.info.metadata)
            self.to_file(keymap)
        except ValueError as error:
            whose = "kohya's" if format == "kohya" else "diffusers'"
            problem = (
                f"{whose} names for its {len(self)} tensors are not known, since this LORA_MODEL"
                " does not say which model it is for; save it in the format comfyui"
            )
            why = error.problems if isinstance(error, LoraFileError) else [str(error)]
            raise LoraFileError(source, [problem, *why]) from None
        return keymap

    def _kohya(self, keymap: KeyMap, source: str) -> tuple[dict[str, Tensor], LoraFile]:
        """All tensors under kohya's keys, and those of them that are adapters."""
        names = NamedTensors.of(self)
        # An alpha or a pair beside a tensor that is not read is renamed with it, not taken apart.
        whole = {module for kind, module, _ in names.foreign.values() if kind not in SEPARATE}
        kept = {key: (module, ending) for key, (_, module, ending) in names.foreign.items()}
        adapters: dict[str, Tensor] = {}
        for module, found in names.modules.items():
            for name, key in found.items():
                if module in whole:
                    kept[key] = (module, name)
                else:
                    adapters[key] = self[key]
        new_keys = {key: _kohya_key(keymap, *parts) for key, parts in kept.items()}
        nameless = names.unknown + names.doubled
        nameless += [key for key, new in new_keys.items() if new is None]
        lora, named, problems = LoraFile({}), {}, []
        try:
            if adapters:
                lora = LoraFile.from_state_dict(adapters, keymap, self.info.metadata, source=source)
                named = lora.to_kohya(keymap)
        except LoraFileError as error:
            problems = list(error.problems)
        if nameless:
            shown = ", ".join(nameless[:8]) + (" ..." if len(nameless) > 8 else "")
            problems.append(
                counted(len(nameless), "tensor", "have no name in kohya's format")
                + f": {shown}; the format comfyui keeps their names"
            )
        if problems:
            raise LoraFileError(source, problems)
        renamed = {new: self[key] for key, new in new_keys.items() if new is not None}
        return {**renamed, **named}, lora


def _kohya_key(keymap: KeyMap, module: str, ending: str) -> str | None:
    layer = keymap.find(module)
    if layer is not None:
        return f"{layer.kohya}.{ending}"
    return f"{module}.{ending}" if module.startswith("lora_") else None  # a part not connected
