"""The host's convolutions as matrix products: equal results, on a CPU, over few positions only."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_weave.lora_core.host import small_conv
from lora_weave.lora_core.host.small_conv import MAX_POSITIONS, small_convolutions

GEOMETRIES = {
    "kernel 3": {"kernel_size": 3, "padding": 1},
    "kernel 1": {"kernel_size": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "odd": {"kernel_size": (3, 2), "padding": (1, 1), "stride": (1, 2), "dilation": (2, 1)},
    "no bias": {"kernel_size": 3, "padding": 1, "bias": False},
}


def make_layer(operations=comfy.ops.disable_weight_init, dtype=torch.float64, **geometry):
    layer = operations.Conv2d(6, 10, dtype=dtype, **geometry).requires_grad_(False)
    for index, parameter in enumerate(layer.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def make_input(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def output_and_gradient(layer, x):
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), gradient


def count_convolutions(monkeypatch):
    seen = []
    real = functional.conv2d

    def counted(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.conv2d", counted)
    return seen


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_product_equals_the_convolution(geometry, batch, monkeypatch):
    layer, x = make_layer(**geometry), make_input(batch, 6, 4, 5)
    expected = output_and_gradient(layer, x)
    convolutions = count_convolutions(monkeypatch)
    with small_convolutions([layer]):
        found = output_and_gradient(layer, x)
    assert not convolutions
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_many_positions_stay_with_the_convolution(monkeypatch):
    layer = make_layer(kernel_size=3, padding=1)
    convolutions = count_convolutions(monkeypatch)
    with small_convolutions([layer]):
        layer(make_input(1, 6, MAX_POSITIONS // 8, 8))
        assert not convolutions
        layer(make_input(2, 6, MAX_POSITIONS // 8, 8))
        assert len(convolutions) == 1


def test_a_heavy_weight_is_a_product_over_more_positions(monkeypatch):
    layer = make_layer(kernel_size=3, padding=1)
    x = make_input(1, 6, small_conv.MAX_HEAVY_POSITIONS // 8, 8)
    expected = output_and_gradient(layer, x)
    convolutions = count_convolutions(monkeypatch)
    monkeypatch.setattr(small_conv, "HEAVY", layer.weight.numel())
    with small_convolutions([layer]):
        found = output_and_gradient(layer, x)
        assert not convolutions
        monkeypatch.setattr(small_conv, "HEAVY", layer.weight.numel() + 1)
        layer(x)
        assert len(convolutions) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_1x1_kernel_on_one_image_in_bf16_is_a_product_at_any_size(monkeypatch):
    layer = make_layer(dtype=torch.bfloat16, kernel_size=1)
    x = make_input(1, 6, MAX_POSITIONS, 2, dtype=torch.bfloat16)
    expected = output_and_gradient(layer, x)
    convolutions = count_convolutions(monkeypatch)
    with small_convolutions([layer]):
        found = output_and_gradient(layer, x)
        assert not convolutions
        layer(make_input(2, 6, MAX_POSITIONS, 2, dtype=torch.bfloat16))
        assert len(convolutions) == 1
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_the_product_in_low_precision():
    layer = make_layer(dtype=torch.bfloat16, kernel_size=3, padding=1)
    x = make_input(2, 6, 4, 4, dtype=torch.bfloat16)
    expected = output_and_gradient(layer, x)
    with small_convolutions([layer]):
        found = output_and_gradient(layer, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.01 * other.norm()


def test_a_cast_weight_is_used_as_the_host_gives_it():
    layer = make_layer(comfy.ops.manual_cast, torch.bfloat16, kernel_size=3, padding=1)
    x = make_input(1, 6, 4, 4, dtype=torch.float32)
    expected = output_and_gradient(layer, x)
    with small_convolutions([layer]):
        found = output_and_gradient(layer, x)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_groups_and_other_paddings_are_left_alone():
    grouped = nn.Conv2d(6, 6, 3, groups=2)
    same = nn.Conv2d(6, 6, 3, padding="same")
    circular = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
    with small_convolutions([nn.ModuleList([grouped, same, circular])]):
        assert not any("_conv_forward" in vars(layer) for layer in (grouped, same, circular))


def test_nothing_is_left_behind_by_an_exception():
    layer = make_layer(kernel_size=3)
    before = dict(vars(layer))
    with pytest.raises(KeyError), small_convolutions([layer]):
        assert "_conv_forward" in vars(layer)
        raise KeyError
    assert vars(layer) == before
