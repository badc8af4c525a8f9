"""Names of tensors in LoRA files taken apart, whatever the model.

A name is a module's name plus an ending: "lora_unet_..._to_q" + ".lora_up.weight". The endings
come from the registered adapter types and from other writers' spellings.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .adapters import ADAPTERS, Adapter
from .key_map import MODULATION

# Names of tensors beside those of the adapters: another weight, the shape that the layer has to
# have (rows, columns); a change of the bias, as itself, as what a LoRA's
# up adds (to be scaled as the LoRA is) and by a factor; PEFT's DoRA magnitudes, always of rows.
NEW_WEIGHT, NEW_SHAPE = "set_weight", "reshape_weight"
BIAS_CHANGE, UP_BIAS, BIAS_GAIN = "diff_b", "lora_up.bias", "ia3_b"
ROW_MAGNITUDE = "lora_magnitude_vector"

# Wan's few-step LoRAs have a change of a block's parameter `modulation` under the block's name.
_BLOCK_MODULATION = ".diff_m"

# Endings of other writers (diffusers, PEFT, Mochi, LyCORIS) for tensors that are known.
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
    ".up.weight": "lora_up.weight",
    ".down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    **{  # XLabs: the number tells image from text and stays with the module's name
        f"_lora{number}.{word}.weight": f"lora_{word}.weight"
        for number in (1, 2)
        for word in ("up", "down")
    },
    ".w_norm": "diff",
    ".b_norm": BIAS_CHANGE,
    ".diff_b": BIAS_CHANGE,
    _BLOCK_MODULATION: "diff",
    ".set_weight": NEW_WEIGHT,
    ".reshape_weight": NEW_SHAPE,
    ".lora_up.bias": UP_BIAS,
    ".lora_B.bias": UP_BIAS,
    ".lora_B.default.bias": UP_BIAS,
    ".ia3_b": BIAS_GAIN,
    ".ia3_l.default": "ia3_l",
    ".oft_R.default.weight": "oft_R.weight",
    ".lora_magnitude_vector": ROW_MAGNITUDE,
    ".lora_magnitude_vector.weight": ROW_MAGNITUDE,
    ".lora_magnitude_vector.default": ROW_MAGNITUDE,
    ".lora_magnitude_vector.default.weight": ROW_MAGNITUDE,
}
_NUMBERED = re.compile(r"_lora[12](?=\.(?:up|down)\.weight$)")
# Tensors that are not read: (kind, pattern of the name).
_FOREIGN = tuple(
    (kind, re.compile(rf"^(.+?)\.({endings})$", re.DOTALL))
    for kind, endings in {
        "sparse": "bias_(?:indices|values|size)",
        "OFT or BOFT of PEFT in another form": r"oft_\w+(?:\.weight)?|boft_\w+",
        "embedding": r"lora_embedding_[AB]|string_to_param(?:\..+)?",
        "ControlLoRA": "up|down",
    }.items()
) + (
    ("ControlLoRA", re.compile(r"^(lora_controlnet)()$")),
    ("numbered", re.compile(r"^(\w+:\d+):(up|down|mid)$")),
)
# Leaving these out does not change the rest of a layer.
SEPARATE = {"embedding", "ControlLoRA", "numbered"}
# Black Forest Labs' control LoRAs: one of their pairs, and other weights of norms as a model's.
CONTROL_LAYER = "img_in"
_CONTROL_PAIR, _CONTROL_NORM = f"{CONTROL_LAYER}.lora_A.weight", "_norm.scale"
_OWN_TO_MODELS = {"weight"}  # an adapter's name of a tensor that every model's weights have, too


@dataclass(frozen=True)
class NamedTensors:
    """`modules` is {module name: {the adapter's name of a tensor: key}}; `foreign` {key: (kind,
    module name, ending)} for tensors that are not read; `doubled` keys of tensors that are there
    in another spelling, too; `unknown` the other keys.
    """

    modules: dict[str, dict[str, str]]
    foreign: dict[str, tuple[str, str, str]]
    doubled: list[str]
    unknown: list[str]

    @classmethod
    def of(cls, keys: Iterable[str]) -> NamedTensors:
        keys = list(keys)
        endings = _endings(tuple(ADAPTERS.values()))
        is_control = _is_control(keys)
        names = cls(defaultdict(dict), {}, [], [])
        for key in keys:
            ending = next((end for end in endings if key.endswith(end)), None)
            if ending is None and is_control and key.endswith(_CONTROL_NORM):
                names.modules[key][NEW_WEIGHT] = key
                continue
            if ending is None or len(key) <= len(ending):
                names._keep_aside(key)
                continue
            module, name = key[: -len(ending)], endings[ending]
            if number := _NUMBERED.search(ending):
                module += number[0]
            if ending == _BLOCK_MODULATION:
                module += MODULATION if "." in module else MODULATION.replace(".", "_")
            if names.modules[module].setdefault(name, key) != key:
                names.doubled.append(key)
        for module, found in list(names.modules.items()):
            if found.keys() <= _OWN_TO_MODELS:
                for key in names.modules.pop(module).values():
                    names._keep_aside(key)
        return names

    def _keep_aside(self, key: str) -> None:
        for kind, pattern in _FOREIGN:
            if match := pattern.match(key):
                self.foreign[key] = (kind, match[1], match[2])
                return
        self.unknown.append(key)

    @property
    def is_control(self) -> bool:
        """Whether the names are those of a control LoRA."""
        return _is_control([key for found in self.modules.values() for key in found.values()])

    @property
    def is_lora(self) -> bool:
        """Whether any tensor of an adapter is there; a lone alpha does not count."""
        return bool(self.foreign) or any(
            found.keys() > {"alpha"} or "alpha" not in found for found in self.modules.values()
        )


def _is_control(keys: list[str]) -> bool:
    has_norms = any(key.endswith(_CONTROL_NORM) for key in keys)
    return has_norms and _CONTROL_PAIR in keys


@lru_cache(maxsize=4)
def _endings(kinds: tuple[type[Adapter], ...]) -> dict[str, str]:
    """{ending: the adapter's name of the tensor} for the registered types, longest first."""
    own = {f".{name}": name for cls in kinds for name in cls.names()}
    return dict(sorted({**_SPELLINGS, **own}.items(), key=lambda item: (-len(item[0]), item[0])))
