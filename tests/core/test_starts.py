"""The moments of every factor of a new adapter are those that its type promises."""

from __future__ import annotations

import math

import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.adapters.create_options import CreateOptions

from .closed_forms import FORMULAS

SHAPES = {"linear": (128, 96), "convolution": (64, 48, 3, 3)}
OPTIONS = {
    "plain": CreateOptions(),
    "tucker": CreateOptions(tucker=True),
    "both": CreateOptions(factor=16, decompose_both=True),
}


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name in FORMULAS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_moments_of_the_start(name: str, shape: tuple[int, ...], options: CreateOptions) -> None:
    """Within four standard errors: σ / √n of the mean, σ · √((κ - 1) / 4n) of the deviation σ."""
    generator = torch.Generator().manual_seed(0)
    adapter = ADAPTERS[name].create(shape, 4, 4.0, options=options, generator=generator)
    for label, tensor in adapter.tensors().items():
        if label == "alpha":
            continue
        start, draws = FORMULAS[name].start(label, tuple(tensor.shape)), tensor.double()
        sigma, root = start.deviation, math.sqrt(tensor.numel())
        draws = draws - start.mean
        mean, deviation = draws.mean().item(), draws.square().mean().sqrt().item()
        assert abs(mean) <= 4 * sigma / root, label
        error = sigma * math.sqrt(start.kurtosis - 1) / (2 * root)
        assert abs(deviation - sigma) <= 4 * error, label
        assert draws.abs().max() <= start.bound * (1 + 1e-6), label
