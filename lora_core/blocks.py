"""Blocks of a model by name, and weights for them: {"IN04": 0.5, "OUT": 0.8}.

A UNet has IN00 to IN11, MID (of which MID00 to MID02) and OUT00 to OUT11; a transformer has its
lists of blocks, such as DOUBLE00 and SINGLE00 (Flux), JOINT00 (SD3), LAYER00 (Lumina2) or BLOCK00.
BASE is all that is in none of them: text encoders, embeddings, the last layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

BASE, ALL = "BASE", "ALL"
_TEXT_ENCODERS = "text_encoders."
_WORDS = {
    **{"input_blocks": "IN", "middle_block": "MID", "output_blocks": "OUT"},
    **{"double_blocks": "DOUBLE", "single_blocks": "SINGLE", "joint_blocks": "JOINT"},
    **{"transformer_blocks": "BLOCK", "blocks": "BLOCK", "layers": "LAYER"},
    **{"noise_refiner": "NOISE", "context_refiner": "CONTEXT"},
}
_NAME = re.compile(r"([A-Z]+)(?:(\d{1,4})(?:-[A-Z]*(\d{1,4}))?)?")
_PRESET_NAME = re.compile(r"^[^=,;\n]*:(?=[^=,;\n]*=)")  # before "name=weight"
_SPELLINGS = {"M": "MID", "M00": "MID", "*": ALL, "DEFAULT": ALL, "%DEFAULT": ALL}


class NeedsFamily(ValueError):
    """Raised for numbers that mean other blocks in other families, where none is known."""


@dataclass(frozen=True)
class BlockWeights:
    """Weights by the name of a block ("IN04"), of some ("IN4-8"), or of a kind ("OUT", "ALL").

    The most exact name counts; blocks that none of them names have 1.
    """

    weights: Mapping[str, float]

    @classmethod
    def parse(cls, value: object, family: str = "") -> BlockWeights | None:
        """From {name: weight}, "IN04=0.5, OUT:0.8", or the numbers of a common schema.

        Numbers ("1,0,0.5,..." or a list, with a name and ":" before them at will) are turned to
        names by their count and the family's label: see `SCHEMAS`. None where nothing is said:
        by null, blank text, or what is empty. Raises ValueError for names and numbers that can't
        be read, all at once, and NeedsFamily.
        """
        if isinstance(value, str):
            value = _parsed(value)
        if value is None or (isinstance(value, Mapping | Sequence) and not value):
            return None
        if isinstance(value, Mapping):
            return cls._named(value)
        if isinstance(value, Sequence):
            return cls(from_numbers(value, family))
        raise ValueError(f'block weights are {value!r}; expected names, as {{"IN04": 0.5}}')

    @classmethod
    def _named(cls, value: Mapping[object, object]) -> BlockWeights:
        weights, problems = {}, []
        for name, weight in value.items():
            known = canonical(str(name))
            if not _NAME.fullmatch(known):
                problems.append(f"{name!r} is no name of a block")
            elif not _is_number(weight):
                problems.append(f"{name} is {weight!r}, not a number")
            elif known in weights:
                problems.append(f"{known} is there twice")
            else:
                weights[known] = float(weight)
        if problems:
            raise ValueError(f"block weights: {'; '.join(problems)}")
        return cls(weights)

    def of(self, block: str) -> float:
        """The weight of a block by its own name."""
        found = [(_exactness(name, block), weight) for name, weight in self.weights.items()]
        best = max(found, key=lambda one: one[0], default=(0, 1.0))
        return best[1] if best[0] else 1.0

    def for_path(self, path: str) -> float:
        """The weight of the block that a layer is in."""
        return self.of(block_of(path))

    def check(self, blocks: Iterable[str]) -> list[str]:
        """A line for each name that means none of `blocks`."""
        known = list(dict.fromkeys(blocks))
        return [
            f"there is no block {name}; the model has {summary(known)}"
            for name in self.weights
            if not any(_exactness(name, block) for block in known)
        ]


def block_of(path: str) -> str:
    """The block of a layer path, by its first numbered list of blocks.

    >>> block_of("diffusion_model.input_blocks.4.1.proj_in")
    'IN04'
    """
    if path.startswith(_TEXT_ENCODERS):
        return BASE
    parts = path.split(".")
    for word, number in zip(parts, parts[1:], strict=False):
        if number.isdecimal() and word in _WORDS:
            return f"{_WORDS[word]}{int(number):02}"
    return BASE


def canonical(name: str) -> str:
    """A block's name in our spelling: "in4" and "IN04" are IN04, "M00" is MID."""
    spelled = name.strip().upper()
    spelled = _SPELLINGS.get(spelled, spelled)
    match = _NAME.fullmatch(spelled)
    if match is None or match[2] is None:
        return spelled
    last = f"-{int(match[3]):02}" if match[3] else ""
    return f"{match[1]}{int(match[2]):02}{last}"


def summary(blocks: Sequence[str]) -> str:
    """Blocks as people write them: "BASE, IN00 to IN11, MID00"."""
    kinds: dict[str, list[str]] = {}
    for block in blocks:
        kinds.setdefault(_kind_of(block), []).append(block)
    return ", ".join(
        of_kind[0] if len(of_kind) == 1 else f"{min(of_kind)} to {max(of_kind)}"
        for of_kind in kinds.values()
    )


def in_order(blocks: Iterable[str]) -> tuple[str, ...]:
    """Each block once: kinds as they first come, those of a kind by number."""
    known = list(dict.fromkeys(blocks))
    kinds = list(dict.fromkeys(map(_kind_of, known)))
    return tuple(sorted(known, key=lambda block: (kinds.index(_kind_of(block)), block)))


def _kind_of(block: str) -> str:
    return block.rstrip("0123456789")


def _exactness(name: str, block: str) -> int:
    """4: the block itself, 3: a range with it, 2: its kind, 1: all blocks, 0: others."""
    if name == block:
        return 4
    match = _NAME.fullmatch(name)
    own = _NAME.fullmatch(block)
    if name == ALL:
        return 1
    if match is None or own is None or match[1] != own[1]:
        return 0
    if match[2] is None:
        return 2
    if match[3] is None or own[2] is None:
        return 0
    return 3 if int(match[2]) <= int(own[2]) <= int(match[3]) else 0


def _run(kind: str, *numbers: int) -> list[str]:
    return [f"{kind}{number:02}" for number in numbers]


_MIDDLE = _run("MID", 0, 1, 2)
_SD1 = [
    [BASE, *_run("IN", 1, 2, 4, 5, 7, 8), "MID", *_run("OUT", *range(3, 12))],
    [BASE, *_run("IN", *range(12)), "MID", *_run("OUT", *range(12))],
    [BASE, *_run("IN", *range(1, 12)), *_MIDDLE, *_run("OUT", *range(12))],
]
_SDXL = [
    [BASE, *_run("IN", 4, 5, 7, 8), "MID", *_run("OUT", *range(6))],
    [BASE, *_run("IN", *range(9)), "MID", *_run("OUT", *range(9))],
    [BASE, *_run("IN", *range(1, 9)), *_MIDDLE, *_run("OUT", *range(9))],
]
_DOUBLE, _SINGLE = _run("DOUBLE", *range(19)), _run("SINGLE", *range(38))
_FLUX = [[BASE, *_DOUBLE], [*_DOUBLE, *_SINGLE], [BASE, *_DOUBLE, *_SINGLE]]
# {family: the blocks whose weights the numbers are}, as counted from the presets of
# sd-webui-lora-block-weight and ComfyUI-Inspire-Pack (resources/lbw-preset.txt).
SCHEMAS = {"SD1.5": _SD1, "SD2": _SD1, "SDXL": _SDXL, "Flux": _FLUX}


def from_numbers(numbers: Sequence[object], family: str = "") -> dict[str, float]:
    """{name: weight} of a vector of 12, 17, 20, 21, 26, 27, 57 or 58 numbers.

    A count that two families share (20) needs the family, else NeedsFamily is raised. Raises
    ValueError for other counts.
    """
    values = []
    for number in numbers:
        if not _is_number(number):
            raise ValueError(f"block weights hold {number!r}, which is not a number")
        values.append(float(number))
    families = [family] if family in SCHEMAS else list(SCHEMAS)
    found = [names for one in families for names in SCHEMAS[one] if len(names) == len(values)]
    if not found:
        counts = ", ".join(
            f"{one}: {' or '.join(str(len(names)) for names in SCHEMAS[one])}" for one in families
        )
        raise ValueError(f"{len(values)} block weights; known numbers of them are {counts}")
    if any(names != found[0] for names in found):
        raise NeedsFamily(
            f"{len(values)} block weights mean other blocks in other families, and the LoRA's is"
            ' not known; name the blocks, as {"IN04": 0.5}'
        )
    return dict(zip(found[0], values, strict=True))


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _parsed(text: str) -> object:
    """A JSON object, "name=weight" or "name:weight" pairs, or a list of numbers.

    A preset's name may stand before "name=weight" and before two numbers or more: "SD-OUT:1,0,1".
    """
    text = text.strip()
    if text.startswith(("{", "[")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"block weights {text[:60]!r} are not valid JSON: {error}") from error
    text = _PRESET_NAME.sub("", text)
    parts = [part.strip() for part in re.split(r"[,\n;]", text) if part.strip()]
    if "=" not in text and not any(":" in part for part in parts[1:] or parts):
        return [_number(part.rpartition(":")[2]) for part in parts]
    pairs = [re.split("[=:]", part, maxsplit=1) for part in parts]
    return {pair[0].strip(): _number("".join(pair[1:])) for pair in pairs}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()
