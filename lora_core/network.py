"""What only the host knows of a network: its modules' shapes, and its own names of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .key_map import Slice

Shapes = Mapping[str, tuple[int, ...]]  # {layer path: shape}
# Whose rules give diffusers' names: see `block_names.diffusers`.
Style = Literal["table", "own", "flux", "flux2", "lumina2", "wan"]

UNET_PREFIX = "diffusion_model."
CLIP_PREFIX = "text_encoders."


@dataclass(frozen=True)
class Meaning:
    """What a name stands for: a layer, or the rows of it that `rows` gives.

    `swapped`: the whole layer, with the two halves of its rows in the other order.
    """

    path: str
    rows: Slice | None = None
    swapped: bool = False


Named = tuple[str, Meaning]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A diffusion model's network, or the text encoders of a model together.

    `layers` and `norms` are {path: the weight's shape}, norms those whose weight has one axis.
    `biases` are the paths of those with a bias, `parameters` {path ending in MODULATION: shape}.
    `embeddings` are those whose module looks rows up, {path: (number of rows, width)}.
    `hosts` are the names that the host knows.
    `table` are names within the network that the host's table of diffusers' names has.
    """

    layers: Shapes
    norms: Shapes
    biases: frozenset[str]
    hosts: Mapping[str, Meaning]
    table: Mapping[str, Meaning] = field(default_factory=dict)
    style: Style = "table"
    parameters: Shapes = field(default_factory=dict)
    embeddings: Shapes = field(default_factory=dict)

    @property
    def shapes(self) -> Shapes:
        """Those of layers, of norms, of parameters and of embeddings."""
        return {**self.layers, **self.norms, **self.parameters, **self.embeddings}
