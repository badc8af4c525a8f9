"""Which layers of a model get an adapter: presets and name patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    layers: Iterable[Target],
    preset: str,
    include: str = "",
    exclude: str = "",
    norms: Iterable[str] | None = None,
) -> list[str]:
    """Paths of the layers that `preset` names, in the model's order, then of the norms with them.

    Of `norms`, given as paths, those are chosen that stand in a block of the chosen layers: see
    `beside`. None stands for no norms at all.
    `include` and `exclude` are comma or line separated patterns with * and ?, matched against the
    whole path and against every run of its dotted parts ("attn2", "input_blocks.4", "*to_k").
    `include` narrows the choice of layers and norms, `exclude` takes away from it. Raises
    ValueError for an unknown preset, for patterns that match nothing at all, when no layer is
    left, or no norm though some were asked for.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown target preset {preset!r}; known: {', '.join(PRESETS)}")
    of_preset = [layer.path for layer in layers if _in_preset(layer, preset)]
    all_norms = list(norms or ())
    what = f"{len(of_preset)} layers of {preset!r}"
    is_left = _filter(include, exclude, of_preset + all_norms, what)
    chosen = list(filter(is_left, of_preset))
    if not chosen:
        raise ValueError(f"no layer is left to train: preset {preset!r}, {include=}, {exclude=}")
    chosen_norms = list(filter(is_left, beside(chosen, all_norms)))
    if norms is not None and not chosen_norms:
        raise ValueError(
            "no norm is left to train: none of those in the blocks of the chosen layers has a "
            f"weight and goes with {include=} and {exclude=}"
        )
    return chosen + chosen_norms


def beside(layers: Iterable[str], norms: Iterable[str]) -> list[str]:
    """The norms in the blocks of these layers, by their paths.

    A norm's block is the innermost numbered one that holds it. A norm in none, such as the last of
    a model, goes with the layers of the very module that it is in.
    """
    parents, blocks = set(), set()
    for path in layers:
        parts = path.split(".")
        parents.add(".".join(parts[:-1]))
        blocks |= {".".join(parts[:end]) for end in range(1, len(parts))}
    found = []
    for path in norms:
        parts = path.split(".")
        numbered = [index for index, part in enumerate(parts[:-1]) if part.isdecimal()]
        end = numbered[-1] + 1 if numbered else len(parts) - 1
        if ".".join(parts[:end]) in (blocks if numbered else parents):
            found.append(path)
    return found


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` is the path, or a run of whole dotted parts of it; case counts."""
    return fnmatch.fnmatchcase(f".{path}.", f"*.{pattern}.*")


def _filter(include: str, exclude: str, paths: Sequence[str], what: str) -> Callable[[str], bool]:
    """Whether the patterns leave a path. ValueError naming each that matches none of `paths`."""
    wanted, unwanted = _patterns(include), _patterns(exclude)
    problems = [
        f"the pattern {pattern!r} matches none of the {what}"
        for pattern in wanted + unwanted
        if not any(matches(path, pattern) for path in paths)
    ]
    if problems:
        raise ValueError("\n".join(problems))

    def is_left(path: str) -> bool:
        is_wanted = not wanted or any(matches(path, pattern) for pattern in wanted)
        return is_wanted and not any(matches(path, pattern) for pattern in unwanted)

    return is_left


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
