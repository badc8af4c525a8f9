"""Which layers of a model get an adapter: presets and name patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# How the host's UNets, DiTs and text encoders name their layers, matched within a path part.
_ATTENTION = re.compile(r"(?i)attn|attention|^linear[12]$")  # linear1, 2: fused, as in Flux
_FEED_FORWARD = re.compile(
    r"(?i)(^|_)(ffn?|mlp[cx]?|feed_?forward|moe)(?![a-z0-9])|^DenseReluDense$"
    r"|^(intermediate|output)$|^channelwise$|^layer[12]$"  # BERT, Stable Cascade, Cosmos
)
_NEITHER = re.compile(r"(?i)modulation|norm|embed")  # such as adaln_modulation_self_attn

PRESETS = ("attention", "attention + feed-forward", "all linear", "all linear + conv")


@dataclass(frozen=True)
class Target:
    """A layer that an adapter can sit on: its path and the shape of its weight."""

    path: str
    shape: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2


def select(
    layers: Iterable[Target], preset: str, include: str = "", exclude: str = ""
) -> list[str]:
    """Paths of the layers that `preset` names, in the model's order.

    `include` and `exclude` are comma or line separated patterns with * and ?, matched against the
    whole path and against every run of its dotted parts ("attn2", "input_blocks.4", "*to_k").
    `include` narrows the preset's choice, `exclude` takes away from it. Raises ValueError for an
    unknown preset, for patterns that match nothing at all, and when no layer is left.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown target preset {preset!r}; known: {', '.join(PRESETS)}")
    candidates = [layer for layer in layers if _in_preset(layer, preset)]
    wanted, unwanted = _patterns(include), _patterns(exclude)
    problems = [
        f"the pattern {pattern!r} matches none of the {len(candidates)} layers of {preset!r}"
        for pattern in wanted + unwanted
        if not any(matches(layer.path, pattern) for layer in candidates)
    ]
    if problems:
        raise ValueError("\n".join(problems))
    chosen = [
        layer.path
        for layer in candidates
        if (not wanted or any(matches(layer.path, pattern) for pattern in wanted))
        and not any(matches(layer.path, pattern) for pattern in unwanted)
    ]
    if not chosen:
        raise ValueError(f"no layer is left to train: preset {preset!r}, {include=}, {exclude=}")
    return chosen


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` is the path, or a run of whole dotted parts of it; case counts."""
    return fnmatch.fnmatchcase(f".{path}.", f"*.{pattern}.*")


def _patterns(text: str) -> list[str]:
    parts = text.replace("\n", ",").split(",")
    return [part.strip() for part in parts if part.strip()]


def _in_preset(layer: Target, preset: str) -> bool:
    if preset == "all linear + conv":
        return True
    if not layer.is_linear:
        return False
    if preset == "all linear":
        return True
    parts = _parts_in_block(layer.path)
    if any(_NEITHER.search(part) for part in parts):
        return False
    if any(_ATTENTION.search(part) for part in parts):
        return True
    return preset != "attention" and any(_FEED_FORWARD.search(part) for part in parts)


def _parts_in_block(path: str) -> list[str]:
    """What follows the first number in a path: `t_embedder.mlp.0` is in no numbered block."""
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return parts[numbers[0] + 1 :] if numbers else []


def shapes(layers: Mapping[str, tuple[int, ...]]) -> list[Target]:
    """Targets of a {path: weight shape} mapping."""
    return [Target(path, tuple(shape)) for path, shape in layers.items()]
