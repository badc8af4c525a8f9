"""Adapters put on a module's layers add their change, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import ADAPTERS, BIASES, Adapter, Layer
from lora_weave.lora_core.attach import attached

from .layer_kinds import facts, make_adapter, make_input, make_layer, with_weight

every_type = pytest.mark.parametrize("name", list(ADAPTERS))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = make_layer("conv2d-3x3-stride-2")
        self.second = nn.Linear(8, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().mean(dim=(2, 3)))


def parts(model: Model) -> tuple[dict[str, nn.Module], dict[str, Layer]]:
    layers = {"first": model.first, "second": model.second}
    return layers, {path: facts(layer) for path, layer in layers.items()}


def adapters(model: Model, name: str) -> dict[str, Adapter]:
    return {path: make_adapter(name, tuple(m.weight.shape)) for path, m in model.named_children()}


def dicts(model: nn.Module) -> list[dict[str, Any]]:
    """Every module's `__dict__`, one level copied, so that later changes show."""
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        for module in model.modules()
    ]


def same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Equal keys in the same order, and the very same objects behind them."""

    def identical(old: Any, new: Any) -> bool:
        if isinstance(old, dict):
            return list(old) == list(new) and all(old[k] is new[k] for k in old)
        return old is new or old == new

    return all(
        list(old) == list(new) and all(identical(old[key], new[key]) for key in old)
        for old, new in zip(before, after, strict=True)
    )


@every_type
def test_changes_the_output_only_while_attached(name: str) -> None:
    model, x = Model(), make_input("conv2d-3x3-stride-2")
    layers, layer_facts = parts(model)
    plain, before = model(x), dicts(model)
    with attached(layers, adapters(model, name), layer_facts):
        assert not torch.allclose(model(x), plain)
        assert not same(before, dicts(model))  # the comparison sees hooks
    assert torch.equal(model(x), plain)
    assert same(before, dicts(model))


@every_type
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_leaves_nothing(name: str, error: type[BaseException]) -> None:
    model = Model()
    layers, layer_facts = parts(model)
    before = dicts(model)
    with pytest.raises(error), attached(layers, adapters(model, name), layer_facts):
        raise error
    assert same(before, dicts(model))


@every_type
@pytest.mark.parametrize("kind", ["linear", "conv2d-3x3"])
@pytest.mark.parametrize("bias_type", BIASES)
def test_a_bias_changes_after_the_weight(
    name: str, kind: str, bias_type: str, assert_close: Callable[..., None]
) -> None:
    """Whatever order they are given in: a rotation or factor of the output must not take it up."""
    layer, x = make_layer(kind, torch.float64), make_input(kind, torch.float64)
    change = make_adapter(name, tuple(layer.weight.shape)).double()
    bias = BIASES[bias_type].create((len(layer.bias),), 1, 1.0).double()
    (parameter,) = bias.parameters()
    with torch.no_grad():
        parameter.normal_(generator=torch.Generator().manual_seed(4))
    layers = {"x": layer, "x.bias": layer}
    both = {
        "x": facts(layer),
        "x.bias": Layer(
            shape=(len(layer.bias),),
            weight=lambda: layer.weight,
            bias=lambda: layer.bias,
            channel_axis=1 if x.ndim > 3 else -1,
        ),
    }
    added = bias.delta(layer.bias).detach()
    expected = with_weight(layer, change.delta(layer.weight), x)
    expected = expected + (added if x.ndim < 4 else added[:, None, None])
    for adapters in ({"x.bias": bias, "x": change}, {"x": change, "x.bias": bias}):
        with attached(layers, adapters, both):
            assert_close(layer(x), expected)


@every_type
def test_nested_changes_add_up(name: str, assert_close: Callable[..., None]) -> None:
    """Where a type acts on the output, the outer one changes what the inner one has made."""
    layer, x = make_layer("linear", torch.float64), make_input("linear", torch.float64)
    one, two = (make_adapter(name, (10, 12)).double() for _ in range(2))
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(-1.5)
    x.requires_grad_()
    layers, layer_facts = {"x": layer}, {"x": facts(layer)}
    with attached(layers, {"x": one}, layer_facts):
        with attached(layers, {"x": two}, layer_facts):
            both = layer(x)
        alone = layer(x)
    weight, first = layer.weight, one.delta(layer.weight)
    second = two.delta(weight + first if two.acts_on_output else weight)
    expected = with_weight(layer, first + second, x)
    assert_close(both, expected)
    assert_close(alone, with_weight(layer, first, x))
    inputs = [x, *one.parameters(), *two.parameters()]
    found = torch.autograd.grad(both.square().sum(), inputs)
    grads = torch.autograd.grad(expected.square().sum(), inputs)
    for grad, wanted in zip(found, grads, strict=True):
        assert_close(grad, wanted)


@every_type
def test_works_on_a_forward_that_the_host_replaced(name: str) -> None:
    """The host's injections assign `forward` on instances; that must not drop the change."""
    layer, x = make_layer("linear"), make_input("linear")
    adapter = make_adapter(name, (10, 12))
    with attached({"x": layer}, {"x": adapter}, {"x": facts(layer)}):
        expected = layer(x) + 1
        if adapter.acts_on_output:
            expected = adapter(x, make_layer("linear")(x) + 1, facts(layer))
        layer.forward = lambda x, original=layer.forward: original(x) + 1
        found = layer(x)
        del layer.forward
    torch.testing.assert_close(found, expected)
    assert "forward" not in layer.__dict__


@every_type
def test_works_without_gradients(name: str) -> None:
    layer, x = make_layer("linear"), make_input("linear")
    adapter = make_adapter(name, (10, 12))
    with attached({"x": layer}, {"x": adapter}, {"x": facts(layer)}):
        out = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), out) and not layer(x).requires_grad
        with torch.inference_mode():
            assert torch.equal(layer(x), out)


def test_every_misfit_is_told_before_anything_is_attached() -> None:
    model = Model()
    layers, layer_facts = parts(model)
    wrong = {"first": make_adapter("lora", (8, 4, 1, 1)), "third": make_adapter("lora", (5, 8))}
    before = dicts(model)
    with pytest.raises(ValueError) as error:
        with attached(layers, {**wrong, "second": make_adapter("lora", (5, 8))}, layer_facts):
            raise AssertionError("the body must not run")
    text = str(error.value)
    assert "third: no such layer" in text
    assert "first: the adapter is for (8, 4, 1, 1), the layer is (8, 4, 3, 3)" in text
    assert "second" not in text
    assert same(before, dicts(model))


def test_a_layer_without_facts_is_no_layer() -> None:
    layers, layer_facts = parts(Model())
    del layer_facts["second"]
    with pytest.raises(ValueError, match="second: no such layer"):
        with attached(layers, {"second": make_adapter("lora", (5, 8))}, layer_facts):
            raise AssertionError("the body must not run")


def test_only_the_named_layers_change() -> None:
    model = Model()
    layers, layer_facts = parts(model)
    with attached(layers, {"second": make_adapter("lora", (5, 8))}, layer_facts):
        assert not model.first._forward_hooks and model.second._forward_hooks
