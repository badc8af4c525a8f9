"""LoRA files: {layer path: Adapter} read from every key dialect, checked, and written as kohya's.

Everything that does not fit the model is found before anything is used, and told at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import peft_config
from .adapters import Adapter
from .diffusers_format import diffusers_names
from .families import key_map_for
from .files import write_atomically
from .key_map import KeyMap, LayerKey
from .left_out import adapters_left_out
from .lora_naming import FORMATS, Format, generic_names, kohya_names
from .lora_reading import LoraFileError, Reading, counted, not_a_lora, some
from .metadata import minimum_metadata, with_hashes
from .module_changes import is_finite
from .peft_folder import peft_folder
from .recent import Recent, stamp_of
from .recognition import dialect_of, recognise
from .safetensors_file import Header, ReadCache, Serialized, forget_headers
from .tensor_names import NamedTensors

__all__ = ["KeyMap", "LayerKey", "LoraFile", "LoraFileError", "forget_files", "write_lora"]

CACHE_BYTES = 2**30
_CACHE = ReadCache(CACHE_BYTES)
_SHARED: Recent[tuple[KeyMap | None, LoraFile]] = Recent(CACHE_BYTES)


@dataclass(frozen=True)
class LoraFile:
    """Adapters by layer path, in float32, with the file's metadata.

    `problems` is empty unless the file was read with strict=False. `left_out` are the
    tensors of a part (UNet or text encoder) that the key map has no layers of, as they are named.
    `dialect` says in whose spelling the file is, `family` what model it looks made for, as a
    label; "" where that is not known. `keymap` is the one that it was read by.
    """

    adapters: dict[str, Adapter]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    problems: tuple[str, ...] = ()
    left_out: Mapping[str, Tensor] = field(default_factory=dict)
    dialect: str = ""
    family: str = ""
    keymap: KeyMap | None = field(default=None, repr=False, compare=False)

    @classmethod
    def read(
        cls, path: Path | str, keymap: KeyMap | None = None, *, strict: bool = True
    ) -> LoraFile:
        """The adapters of a safetensors file or PEFT folder for the layers of `keymap`, as copies.

        Without a key map, for those of the family that the file is made for: see
        `families.key_map_for`. Raises FileNotFoundError for a path that is not there, ValueError
        naming the file: see `read_tensors` for damaged ones, and LoraFileError with everything in
        it that does not fit the model. With strict=False what fits is loaded, the rest told in
        `problems`. Read files are cached until they change.
        """
        path, config = peft_config.find_files(Path(path))

        def check(header: Header) -> None:
            if not NamedTensors.of(header.entries).is_lora:
                raise LoraFileError(path.name, [not_a_lora(header.entries)])

        with torch.inference_mode(False):  # a node runs in it; cached tensors outlive the node
            tensors, metadata = _CACHE.read(path, check)
        return cls.from_state_dict(
            tensors, keymap, {**metadata, **config}, source=path.name, path=path, strict=strict
        )

    @classmethod
    def read_shared(cls, path: Path | str, keymap: KeyMap | None) -> LoraFile:
        """Like `read`, and the same object again while file and `keymap` are the same.

        Nobody may change its tensors. Kept up to `CACHE_BYTES`, the least used out first.
        """
        file, config = peft_config.find_files(Path(path))
        key = (stamp_of(file), hash(tuple(config.values())), id(keymap))
        known = _SHARED.get(key)
        if known is None:
            lora = cls.read(path, keymap)
            parameters = [p for adapter in lora.adapters.values() for p in adapter.parameters()]
            known = (keymap, lora)  # kept together, so that the id stays taken
            _SHARED.put(key, known, sum(parameter.nbytes for parameter in parameters))
        return known[1]

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        keymap: KeyMap | None = None,
        metadata: Mapping[str, str] | None = None,
        *,
        source: str = "the LoRA",
        path: Path | None = None,
        strict: bool = True,
    ) -> LoraFile:
        """Like `read`, from tensors in memory; `source` names them in errors."""
        if keymap is None:
            keymap = _familys_key_map(tensors, metadata, source)
        with torch.inference_mode(False), torch.no_grad():
            reading = Reading(tensors, keymap, metadata or {})
        if reading.problems and strict or not reading.adapters:
            raise LoraFileError(source, reading.problems or [not_a_lora(tensors)])
        spent = (peft_config.CONFIG, peft_config.METADATA)  # the alphas are in the adapters now
        return cls(
            reading.adapters,
            {key: text for key, text in (metadata or {}).items() if key not in spent},
            path,
            tuple(reading.problems),
            reading.left_out,
            dialect_of(tensors),
            recognise({key: tensor.shape for key, tensor in tensors.items()}, metadata) or "",
            keymap,
        )

    def to_generic(self, keymap: KeyMap | None = None) -> dict[str, Tensor]:
        """Copies of all tensors under the host's generic keys (layer path + ending), and of those
        that were left out.

        `Pieces` go under the names of their rows, in the key map of the file without another one;
        LoraFileError where there are none.
        """
        named = {**generic_names(self.adapters, keymap or self.keymap), **self.left_out}
        return {key: tensor.detach().clone() for key, tensor in named.items()}

    def to_kohya(self, keymap: KeyMap) -> dict[str, Tensor]:
        """All tensors under kohya's keys; those left out as they are where they have such names.

        LoraFileError for layers that `keymap` lacks, and see `adapters_left_out`.
        """
        named = kohya_names(self.adapters, keymap)
        if all(key.startswith("lora_") for key in self.left_out):
            return named | dict(self.left_out)
        return named | kohya_names(*adapters_left_out(self.left_out, keymap, self.metadata))

    def to_format(self, keymap: KeyMap, format: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors under a format's names, those left out among them, and its metadata.

        LoraFileError for what has no name in the format.
        """
        if format not in FORMATS:
            raise ValueError(f"unknown LoRA format {format!r}; known: {', '.join(FORMATS)}")
        if format == "kohya":
            return self.to_kohya(keymap), {}
        if format == "comfyui":
            return self.to_generic(keymap), {}
        parts = [(self.adapters, keymap)]
        if self.left_out:
            parts.append(adapters_left_out(self.left_out, keymap, self.metadata))
        return diffusers_names(parts)

    def save(
        self,
        path: Path | str,
        keymap: KeyMap,
        *,
        format: Format = "kohya",
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a format's keys with alpha and whole convolution shapes, atomically.

        `metadata` is added to the file's own and wins; what tools need to sort the file is filled
        in where it is missing, hashes always. The same adapters and metadata give the same bytes.
        Raises LoraFileError for layers without a name and values that `dtype` can't hold, OSError
        when writing fails; an older file stays then.
        """
        path = Path(path)
        tensors, own = self.to_format(keymap, format)
        least = self.least_metadata(keymap.label, path.stem)
        everything = {**least, **self.metadata, **(metadata or {}), **own}
        write_lora(path, tensors, everything, dtype)

    def save_peft(
        self, folder: Path | str, keymap: KeyMap, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write a folder that PEFT loads: adapter_model.safetensors and adapter_config.json.

        Raises LoraFileError for what PEFT can't hold: see `peft_folder`.
        """
        folder = Path(folder)
        tensors, config = peft_folder(self.adapters, keymap)
        folder.mkdir(parents=True, exist_ok=True)
        write_lora(folder / peft_config.WEIGHTS, tensors, {"format": "pt"}, dtype)
        write_atomically(folder / peft_config.CONFIG, config[peft_config.CONFIG].encode())

    def least_metadata(self, family: str, title: str) -> dict[str, str]:
        """See `metadata.minimum_metadata`."""
        everything = [one for adapter in self.adapters.values() for one in adapter.members()]
        scaled = [adapter for adapter in everything if adapter.has_alpha]
        ranks, alphas = [it.rank for it in scaled], [it.alpha for it in scaled]
        kinds = Counter(it.name for it in scaled or everything)
        algorithm = kinds.most_common(1)[0][0] if kinds else "lora"
        return minimum_metadata(family, title, ranks, alphas, algorithm)


def _familys_key_map(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str
) -> KeyMap:
    if not NamedTensors.of(tensors).is_lora:
        raise LoraFileError(source, [not_a_lora(tensors)])
    try:
        return key_map_for({key: tensor.shape for key, tensor in tensors.items()}, metadata)
    except ValueError as error:
        raise LoraFileError(source, [f"{error}; read it with its model loaded"]) from None


def forget_files() -> None:
    """Drop every file that was read; each is read anew when it is next asked for."""
    _CACHE.clear()
    _SHARED.clear()
    forget_headers()


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
    broken = [name for name, tensor in cast.items() if not is_finite(tensor)]
    if broken:
        lost = [name for name in broken if is_finite(tensors[name])]
        line = counted(len(broken), "tensor", "have values that are not finite")
        line += f": {some(broken)}"
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
