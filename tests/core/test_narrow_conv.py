"""Convolutions to few channels and their gradients, by each way, against torch's in float64."""

import pytest
import torch
from torch.nn import functional

from lora_weave.lora_core.adapters import Layer, narrow_conv

# (rank, dtype): (shifts forward, shifts backward)
WAYS = {
    (4, torch.float32): (True, True),
    (16, torch.float32): (False, False),
    (20, torch.float32): (True, True),
    (16, torch.bfloat16): (False, True),
    (80, torch.bfloat16): (False, False),
}
ROUNDINGS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # of the largest value


def layer_of(size: int, **geometry) -> Layer:
    shape = (6, 6, size, size)
    padding = (size // 2,) * 2
    plain = {"stride": (1, 1), "padding": padding, "dilation": (1, 1)}
    return Layer(shape=shape, weight=lambda: torch.zeros(shape), **{**plain, **geometry})


def example(rank, dtype, size=3, image=(16, 18), batch=2):
    generator = torch.Generator().manual_seed(rank + size)
    x = torch.randn((batch, 6, *image), generator=generator).to(dtype)
    weight = torch.randn((rank, 6, size, size), generator=generator).to(dtype)
    grad = torch.randn((batch, rank, *image), generator=generator).to(dtype)
    return x, weight, grad


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(("rank", "dtype"), WAYS)
def test_each_way_gives_the_convolution_and_its_gradients(rank, dtype, size):
    layer = layer_of(size)
    x, weight, grad = example(rank, dtype, size)
    ways = narrow_conv._shifts_forward, narrow_conv._shifts_backward
    assert tuple(way(x, weight, layer) for way in ways) == WAYS[rank, dtype]

    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    out = functional.conv2d(*exact, padding=size // 2)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    found = [narrow_conv.forward(x, weight, layer)]
    found += narrow_conv.backward(grad, x, weight, layer, wants_x=True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        # A tap is rounded before it is added: three roundings cover K² of them by far.
        assert error < 3 * ROUNDINGS[dtype]


def test_the_gradient_of_the_input_is_left_out_where_nobody_wants_it():
    layer = layer_of(3)
    x, weight, grad = example(4, torch.float32)
    grad_x, grad_weight = narrow_conv.backward(grad, x, weight, layer, wants_x=False)
    assert grad_x is None
    torch.testing.assert_close(
        grad_weight, narrow_conv.backward(grad, x, weight, layer, wants_x=True)[1]
    )


@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (layer_of(3), (8, 8)),
        (layer_of(3, stride=(2, 2)), (16, 18)),
        (layer_of(3, dilation=(2, 2), padding=(2, 2)), (16, 18)),
        (layer_of(3, padding=(0, 0)), (18, 20)),
    ],
    ids=["small image", "stride", "dilation", "no padding"],
)
def test_nothing_else_is_shifted(layer, image):
    x, weight, _ = example(4, torch.float32, image=image)
    assert not narrow_conv._shifts_forward(x, weight, layer)
    expected = functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    torch.testing.assert_close(narrow_conv.forward(x, weight, layer), expected)
