"""One pass over a LoRA's tensors: every adapter that fits, and everything that does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .adapters import Adapter
from .fused import Piece, joined, piece_shape, swapped
from .key_map import BIAS, TEXT_ENCODER, KeyMap, LayerKey, part_of
from .module_changes import FLOAT32_MAX, changes_of, largest_change
from .peft_config import ConfigTensors
from .peft_encoder import encoders_for, open_names
from .recognition import recognise
from .tensor_names import (
    BIAS_CHANGE,
    BIAS_GAIN,
    CONTROL_LAYER,
    NEW_SHAPE,
    SEPARATE,
    NamedTensors,
)

# Why tensors of a kind that `tensor_names` knows are not read.
_REASONS = {
    "sparse": "change single weights, too, as old LyCORIS files do, which no type here can",
    "embedding": "change an embedding, and no layer",
    "ControlLoRA": "are a ControlLoRA's, which is a ControlNet and no LoRA",
    "numbered": "number the layers, as cloneofsimo's lora did, without their names",
}

_OF_ONE = {"are": "is", "have": "has"}  # verbs; others get an "s"
_PAIR = ("lora_up.weight", "lora_down.weight")


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
        self.tensors, self.keymap, self.metadata = tensors, keymap, metadata
        self.adapters: dict[str, Adapter] = {}
        self.problems: list[str] = []
        self.left_out: dict[str, Tensor] = {}
        names = NamedTensors.of(tensors)
        if not names.is_lora:
            self.problems.append(not_a_lora(tensors))
            return
        names = self._with_encoder(self._with_settings(names, metadata))
        names = self._with_control_shape(names)
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
        unusable = self._unusable | self._kept_aside(names)
        self._owners: dict[str, str] = {}
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for module, layer in layers.items():
            if layer is not None and module not in unusable:
                self._take(module, layer, names.modules[module])
        self._join()
        self._too_large()
        self._other_family(len(layers))

    def _with_settings(self, names: NamedTensors, metadata: Mapping[str, str]) -> NamedTensors:
        """Bring in what lies outside the tensors; without alphas the LoRA would be too strong."""
        modules = {
            module: {name: self.tensors[key] for name, key in found.items()}
            for module, found in names.modules.items()
        }
        told = ConfigTensors.of(modules, metadata)
        self.problems += told.problems
        self._unusable = told.unknown
        self.tensors = {**self.tensors, **told.tensors}
        return NamedTensors.of(self.tensors) if told.tensors else names

    def _with_encoder(self, names: NamedTensors) -> NamedTensors:
        """Put the text encoder's name before those of a PEFT folder that leave it open."""
        open_ones = open_names(names.modules, self.keymap)
        if not open_ones:
            return names
        shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        encoders = encoders_for(shapes, open_ones, self.keymap)
        if len(encoders) != 1:
            which = f"fit {' and '.join(encoders)}" if encoders else "fit none whole"
            self.problems.append(
                f"the names do not tell which text encoder they are for, and the sizes {which}:"
                f" {some(open_ones)}"
            )
            for module in open_ones:
                del names.modules[module]
            return names
        keys = {key for module in open_ones for key in names.modules[module].values()}
        self.tensors = {
            (encoders[0] + key if key in keys else key): tensor
            for key, tensor in self.tensors.items()
        }
        self._unusable = {
            encoders[0] + module if module in open_ones else module for module in self._unusable
        }
        return NamedTensors.of(self.tensors)

    def _with_control_shape(self, names: NamedTensors) -> NamedTensors:
        """A control LoRA is for a wider first layer, which its pair alone tells."""
        pair = names.modules.get(CONTROL_LAYER, {})
        sides = [self.tensors[pair[name]] for name in _PAIR if name in pair]
        if not names.is_control or len(sides) < 2 or not all(side.ndim > 1 for side in sides):
            return names
        shape = torch.tensor([sides[0].shape[0], sides[1].shape[1]])
        self.tensors = {**self.tensors, f"{CONTROL_LAYER}.{NEW_SHAPE}": shape}
        return NamedTensors.of(self.tensors)

    def _take(self, module: str, layer: LayerKey, found: Mapping[str, str]) -> None:
        """Build what a module's tensors say of the layer, or of some rows of it."""
        rows = layer.slices.get(module)
        is_of_weight = bool(found.keys() - {BIAS_CHANGE, BIAS_GAIN})
        if is_of_weight and self._is_twice(layer.path, module, layer):
            return
        shape = tuple(layer.shape) if rows is None else piece_shape(layer.shape, rows)
        tensors = {name: self.tensors[key] for name, key in found.items()}
        changes = changes_of(tensors, shape, has_bias=layer.path in self.keymap.biases)
        where = layer.path if module == layer.path else f"{layer.path} ({module})"
        self.problems += [f"{where}: {problem}" for problem in changes.problems]
        for path, adapter in ((layer.path, changes.weight), (layer.path + BIAS, changes.bias)):
            if adapter is None or self._is_twice(path, module, layer):
                continue
            if rows is not None:
                self._pieces[path].append(Piece(adapter, rows))
            else:
                is_swapped = module in layer.swapped
                self.adapters[path] = swapped(adapter) if is_swapped else adapter

    def _is_twice(self, path: str, module: str, layer: LayerKey) -> bool:
        """Tells of a weight or bias that two modules change, unless both are of some rows of it.

        Adapters of some rows are written with the bias of the whole layer beside them.
        """
        other = self._owners.setdefault(path, module)
        if other == module or {other, module} <= layer.slices.keys():
            return False
        self.problems.append(f"{path} is there twice: {other}, {module}")
        return True

    def _join(self) -> None:
        """Make one adapter of the pieces of each fused layer."""
        for path, pieces in self._pieces.items():
            shape = self.keymap.shape(path)
            assert shape is not None
            try:
                self.adapters[path] = joined(pieces, shape)
            except ValueError as error:
                self.problems.append(f"{path}: {error}")

    def _too_large(self) -> None:
        """Scales, alphas and products may take numbers that were finite beyond float32."""
        for path, adapter in list(self.adapters.items()):
            if not all(largest_change(one) <= FLOAT32_MAX for one in adapter.members()):
                self.problems.append(f"{path}: its numbers are too large for float32")
                del self.adapters[path]

    def _nothing_here(self, modules: list[str]) -> None:
        part = part_of(modules[0])
        wanted = "CLIP" if part == TEXT_ENCODER else "MODEL"
        are = "the only layer is" if len(modules) == 1 else f"all {len(modules)} layers are"
        self.problems.append(f"{are} for the {part}; connect a {wanted} to use it")

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
        if strangers:
            label = self.keymap.label
            line = counted(len(strangers), "layer", f"are not in the model ({label})")
            self.problems.append(f"{line}: {some(strangers)}")

    def _other_family(self, total: int) -> None:
        """Says first, when most layers do not fit, what model the file seems to be made for."""
        if len(self.adapters) * 2 >= total:
            return
        shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        looks = recognise(shapes, self.metadata)
        if looks is not None and looks != self.keymap.label:
            self.problems.insert(
                0,
                f"{len(self.adapters)} of {total} layers match: the file looks like {looks}, the"
                f" model is {self.keymap.label}",
            )

    def _kept_aside(self, names: NamedTensors) -> set[str]:
        """Tells of tensors that are not read; gives the modules that are unusable without them."""
        by_kind: dict[str, list[str]] = defaultdict(list)
        for key, (kind, module, _) in names.foreign.items():
            if part_of(module) in self.keymap.parts:
                by_kind[kind].append(key)
        for kind, keys in by_kind.items():
            what = _REASONS.get(kind, f"look like the type {kind}, which can't be read here")
            self.problems.append(f"{counted(len(keys), 'tensor', what)}: {some(keys)}")
        if names.doubled:
            line = counted(len(names.doubled), "tensor", "are there in another spelling, too")
            self.problems.append(f"{line}: {some(names.doubled)}")
        if names.unknown:
            line = counted(len(names.unknown), "tensor", "have names of no known kind")
            self.problems.append(f"{line}: {some(names.unknown)}")
        others = (entry for entry in names.foreign.values() if entry[0] not in SEPARATE)
        return {module for _, module, _ in others} | _with_unknown(names)


def _with_unknown(names: NamedTensors) -> set[str]:
    """Modules with tensors of no known kind, whose change may be another than the rest says."""
    found = set()
    for key in names.unknown:
        parts = key.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        found |= set(next(([owner] for owner in owners if owner in names.modules), []))
    return found


def not_a_lora(keys: Iterable[str]) -> str:
    """What to say of tensors none of which is named as a LoRA's."""
    keys = list(keys)
    if not keys:
        return "it has no tensors"
    return f"it is not a LoRA: none of its {len(keys)} tensors is named like one: {some(keys)}"


def counted(number: int, noun: str, rest: str) -> str:
    """ "3 layers are ..." or "1 layer is ..."; `rest` begins with a verb of the many."""
    if number != 1:
        return f"{number} {noun}s {rest}"
    verb, _, others = rest.partition(" ")
    return f"1 {noun} {_OF_ONE.get(verb, verb + 's')} {others}"


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first of the names, shortened, and how many more there are."""
    shown = ", ".join(name if len(name) <= 120 else name[:117] + "..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
