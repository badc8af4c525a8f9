"""Mistakes measured in other tools: our ΔW is the right one, and far from theirs.

Each test computes the wrong formula itself. `size` is the relative error of ΔW that was measured in
the tool; the wrong ΔW has to be a tenth of it away at least, or the test would prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters.loha import LoHa

from . import closed_forms
from .layer_kinds import KINDS, cases, make_input, run, with_weight
from .samples import Sample, samples

Close = Callable[..., None]
SAMPLES = {str(sample): sample.in_dtype(torch.float64) for sample in samples()}
DECOMPOSED = ["lora", "loha", "lokr-low"]
BOTH_KINDS = ["linear", "conv2d-3x3"]


def change_of(sample: Sample) -> Tensor:
    """ΔV, the change before a magnitude, by its formula."""
    return closed_forms.FORMULAS[sample.case.name].change(sample.tensors, sample.weight)


def column(values: Tensor, weight: Tensor) -> Tensor:
    """One value a row of the weight."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def row_norms(weight: Tensor) -> Tensor:
    return column(weight.flatten(1).square().sum(1).sqrt(), weight)


def is_away(found: Tensor, wrong: Tensor, size: float) -> bool:
    return bool((found - wrong).norm() >= size / 10 * found.norm())


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("form", DECOMPOSED)
def test_dora_norm_is_not_that_of_the_original_weight(
    form: str, kind: str, assert_close: Close
) -> None:
    """ComfyUI, out axis: m · (W + ΔV) / ‖W‖; 17 to 25 %."""
    sample = SAMPLES[f"{form}+dora-out-{kind}"]
    weight, magnitude = sample.weight, sample.tensors["dora_scale"]
    full = weight + change_of(sample)
    found = sample.adapter().delta(weight)
    assert_close(found, magnitude * full / row_norms(full) - weight)
    assert is_away(found, magnitude * full / row_norms(weight) - weight, 0.17)


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("form", DECOMPOSED)
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_scales_a_whole_dora(
    strength: float, form: str, kind: str, assert_close: Close
) -> None:
    """LyCORIS: (W + ΔV) · (s · (m / ‖W + ΔV‖ - 1) + 1), so that ΔV stays at strength 0; 44 %."""
    sample = SAMPLES[f"{form}+dora-out-{kind}"]
    weight, magnitude = sample.weight, sample.tensors["dora_scale"]
    full = weight + change_of(sample)
    gain = magnitude / row_norms(full)
    found = strength * sample.adapter().delta(weight)
    assert_close(weight + found, (1 - strength) * weight + strength * gain * full)
    wrong = full * (strength * (gain - 1) + 1) - weight
    assert is_away(found, wrong, 0.44)
    assert (found - wrong).norm() > 0.05 * wrong.norm()  # also where nothing was to be found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", DECOMPOSED)
def test_layers_output_has_the_magnitude(form: str, kind: str, assert_close: Close) -> None:
    """LyCORIS' bypass_mode runs ΔV alone and drops m; 53 %."""
    sample = SAMPLES[f"{form}+dora-out-{kind}"]
    x, layer, adapter = make_input(kind, torch.float64), sample.layer, sample.adapter()
    found = run(layer, adapter, x)
    assert_close(found, with_weight(layer, closed_forms.delta(sample), x))
    base = layer(x)
    assert is_away(found - base, with_weight(layer, change_of(sample), x) - base, 0.53)


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("form", ["loha", "lokr-low"])
def test_scale_is_applied_once(form: str, kind: str, assert_close: Close) -> None:
    """LyCORIS' merging: alpha / rank of a weight that has it already; 50 % at alpha = rank / 2."""
    sample = SAMPLES[f"{form}-{kind}"]
    tensors = {**sample.tensors, "alpha": torch.tensor(sample.rank / 2)}
    half = sample.case.type.from_tensors(tensors, sample.shape)
    right = closed_forms.FORMULAS[sample.case.name].change(tensors, sample.weight)
    found = half.delta(sample.weight)
    assert_close(found, right)
    assert is_away(found, right / 2, 0.5)


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_lokr_of_two_whole_blocks_has_no_scale(kind: str, assert_close: Close) -> None:
    """PEFT: alpha / rank all the same, half of it at alpha = rank / 2."""
    sample = SAMPLES[f"lokr-{kind}"]
    tensors = {**sample.tensors, "alpha": torch.tensor(sample.rank / 2)}
    assert {"lokr_w1", "lokr_w2"} <= tensors.keys()
    found = sample.case.type.from_tensors(tensors, sample.shape).delta(sample.weight)
    right = change_of(sample)
    assert_close(found, right)
    assert is_away(found, right / 2, 0.5)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d-3x3"])
def test_lokr_tucker_takes_the_rank_from_the_core(kind: str, assert_close: Close) -> None:
    """LyCORIS' function: alpha / J, the rows of w2, 67 %. ComfyUI: an error, the layer is left."""
    sample = SAMPLES[f"lokr-tucker-{kind}"]
    found, right = sample.adapter().delta(sample.weight), change_of(sample)
    assert_close(found, right)
    rank, rows = sample.tensors["lokr_w2_a"].shape
    assert is_away(found, right * rank / rows, 0.67)
    assert is_away(found, torch.zeros_like(found), 1.0)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d"])
def test_lokr_kernel_axes_are_those_of_w2(kind: str, assert_close: Close) -> None:
    """ComfyUI: w1 (L, M) meets the last two axes of a whole w2 with one kernel axis or three;
    126 %.
    """
    sample = SAMPLES[f"lokr-{kind}"]
    first, second = sample.tensors["lokr_w1"], sample.tensors["lokr_w2"]
    found = sample.adapter().delta(sample.weight)
    assert_close(found, change_of(sample))
    assert is_away(found, torch.kron(first, second).reshape(sample.shape), 1.26)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "conv"])
def test_dora_scale_of_one_axis_goes_along_the_rows(
    kernel: tuple[int, ...], assert_close: Close
) -> None:
    """ComfyUI: (O,) meets the last axis of W. That fails, or if it fits, scales the columns."""
    size = 3
    generator = torch.Generator().manual_seed(0)
    up, down, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((size, 2), (2, size * math.prod(kernel)), (size, size, *kernel))
    )
    magnitude = torch.arange(1.0, 1.0 + size, dtype=torch.float64)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}
    found = cases()["lora"].type.from_tensors(tensors, tuple(weight.shape)).delta(weight)
    full = weight + (up @ down).reshape(weight.shape)
    assert_close(found, column(magnitude, weight) * full / row_norms(full) - weight)
    assert is_away(found, magnitude * full / row_norms(full) - weight, 1.0)


@pytest.mark.parametrize("kind", ["linear", "conv2d-odd"])
def test_lokr_of_two_products_is_scaled_once(kind: str, assert_close: Close) -> None:
    """ComfyUI's trainer: alpha / rank in w1 and in w2; 50 % at alpha = rank / 2."""
    sample = SAMPLES[f"lokr-both-{kind}"]
    tensors = {**sample.tensors, "alpha": torch.tensor(sample.rank / 2)}
    assert {"lokr_w1_a", "lokr_w2_a"} <= tensors.keys()
    right = closed_forms.lokr(tensors, sample.weight)
    found = sample.case.type.from_tensors(tensors, sample.shape).delta(sample.weight)
    assert_close(found, right)
    assert is_away(found, right / 2, 0.5)


def test_loha_starts_around_zero() -> None:
    """ComfyUI's trainer: `normal_(tensor, 0.1)`, a mean of 0.1 and a deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    made = LoHa.create((512, 256), 16, 1.0, generator=generator).tensors()["hada_w1_a"]
    theirs = torch.empty_like(made).normal_(0.1, generator=generator)

    def fits(tensor: Tensor, mean: float, deviation: float) -> bool:
        root = math.sqrt(tensor.numel())
        within = abs(tensor.mean().item() - mean) < 4 * deviation / root
        return within and abs(tensor.std().item() / deviation - 1) < 4 / (math.sqrt(2) * root)

    assert fits(made, 0.0, 0.1) and not fits(theirs, 0.0, 0.1)
    assert fits(theirs, 0.1, 1.0) and not fits(made, 0.1, 1.0)
