"""Changes without structure: of weights, norms and biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_weave.lora_core.adapters import Adapter, Bias, Layer, type_of_tensors
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.attach import attached

from .layer_kinds import KINDS, facts, make_input, make_layer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
Close = Callable[..., None]


def rms_norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (6,), eps=1e-5)


# {norm: (the module, its input's shape, its input normalised, the axis of its channels)}
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor], int]] = {
    "layer-norm": (
        lambda: nn.LayerNorm(6),
        (2, 5, 6),
        lambda x: functional.layer_norm(x, (6,)),
        -1,
    ),
    "rms-norm": (lambda: nn.RMSNorm(6, eps=1e-5), (2, 5, 6), rms_norm, -1),
    "group-norm": (
        lambda: nn.GroupNorm(3, 6),
        (2, 6, 3, 4),
        lambda x: functional.group_norm(x, 3),
        1,
    ),
}
every_norm = pytest.mark.parametrize("name", list(NORMS))


def make_norm(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Layer]:
    """The norm with weights about 1, an input that is far from normal, and the norm's facts."""
    make, shape, normalized, axis = NORMS[name]
    norm = make().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    norm = norm.to(dtype)
    x = (1.0 + 2.0 * torch.randn(shape, generator=generator)).to(dtype)
    layer = Layer(shape=(6,), weight=lambda: norm.weight, channel_axis=axis, normalized=normalized)
    return norm, x, layer


def filled(adapter: Adapter, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter.double() if dtype == torch.float64 else adapter


def with_diff(module: nn.Module, name: str, diff: Tensor, x: Tensor) -> Tensor:
    """The module's output in float64 with `diff` added to its weight or bias."""
    parameters = {key: value.double() for key, value in module.named_parameters()}
    parameters[name] = parameters[name] + diff.double()
    return torch.func.functional_call(module, parameters, (x.double(),))


def run(module: nn.Module, adapter: Adapter, layer: Layer, x: Tensor) -> Tensor:
    with attached({"x": module}, {"x": adapter}, {"x": layer}):
        return module(x)


@every_norm
@every_dtype
def test_a_norms_weight(name: str, dtype: torch.dtype, assert_close: Close) -> None:
    norm, x, layer = make_norm(name, dtype)
    adapter = filled(Full.create((6,), 1, 1.0), dtype)
    exact_x, exact = x.double().requires_grad_(), adapter.tensors()["diff"].double()
    exact.requires_grad_()
    x.requires_grad_()
    out, expected = run(norm, adapter, layer, x), with_diff(norm, "weight", exact, exact_x)
    assert out.dtype == dtype
    assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for parameter in adapter.parameters():
        assert_close(parameter.grad, exact.grad, dtype)


@every_norm
def test_a_norms_weight_starts_as_no_change(name: str) -> None:
    norm, x, layer = make_norm(name, torch.float32)
    adapter = Full.create((6,), 1, 1.0)
    assert torch.equal(run(norm, adapter, layer, x), norm(x))
    assert torch.equal(adapter.delta(norm.weight), torch.zeros(6))
    assert (adapter.shape, adapter.rank, adapter.alpha) == ((6,), 1, 1.0)


@every_norm
@pytest.mark.parametrize("first", [False, True], ids=["inside", "first-layer"])
def test_a_norms_gradients(name: str, first: bool) -> None:
    norm, x, layer = make_norm(name, torch.float64)
    x = x.requires_grad_(not first)
    for adapter in (Full.create((6,), 1, 1.0), Bias.create((6,))):
        adapter = filled(adapter, torch.float64)
        inputs = (x, *adapter.parameters())
        call = lambda x, *_, adapter=adapter: run(norm, adapter, layer, x)  # noqa: E731
        assert torch.autograd.gradcheck(call, inputs)


def test_a_norm_that_is_not_known_is_refused() -> None:
    layer = Layer(shape=(6,), weight=lambda: torch.ones(6))
    with pytest.raises(ValueError, match="needs the layer's `normalized`"):
        Full.create((6,), 1, 1.0)(torch.ones(2, 6), torch.ones(2, 6), layer)


@every_kind
@every_dtype
def test_a_bias(kind: str, dtype: torch.dtype, assert_close: Close) -> None:
    """Whether the layer is told by the shape of its weight or of its bias."""
    module, x = make_layer(kind, dtype), make_input(kind, dtype)
    layer = facts(module)
    adapter = filled(Bias.create(layer.shape[:1]), dtype)
    channels = -1 if layer.is_linear else 1
    diff = adapter.tensors()["diff_b"]
    expected = with_weight_and_bias(module, diff, x)
    alone = Layer(shape=layer.shape[:1], weight=layer.weight, channel_axis=channels)
    for known in (layer, alone):
        out = adapter(x, module(x), known)
        assert out.dtype == dtype
        assert_close(out, expected)
    axes = [axis for axis in range(out.ndim) if axis != channels % out.ndim]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out.backward(grad)
    for parameter in adapter.parameters():
        assert_close(parameter.grad, grad.double().sum(axes), dtype)


def with_weight_and_bias(module: nn.Module, diff: Tensor, x: Tensor) -> Tensor:
    """As `with_diff` for the bias, also where the module has none."""
    parameters = {key: value.double() for key, value in module.named_parameters()}
    if module.bias is None:
        return torch.func.functional_call(module, parameters, (x.double(),)) + diff.double()
    return with_diff(module, "bias", diff, x)


def test_a_bias_starts_at_zero_and_keeps_its_tensors() -> None:
    assert not Bias.create((5,)).tensors()["diff_b"].any()
    adapter = filled(Bias.create((5,)))
    again = Bias.from_tensors(adapter.tensors(), (5,))
    assert torch.equal(again.tensors()["diff_b"], adapter.tensors()["diff_b"])
    assert type_of_tensors({"diff_b": (5,)}) is None  # it is no type of its own


def test_misfits_are_told() -> None:
    with pytest.raises(ValueError, match="a bias has one axis"):
        Bias.create((5, 4))
    with pytest.raises(ValueError, match=r"diff_b is \(4,\), expected \(5,\)"):
        Bias.from_tensors({"diff_b": torch.ones(4)}, (5,))
    with pytest.raises(ValueError, match=r"diff is \(6, 1\), expected \(6,\)"):
        Full.from_tensors({"diff": torch.ones(6, 1)}, (6,))
    with pytest.raises(ValueError, match="diff_b is missing"):
        Bias.from_tensors({}, (5,))


def test_a_weight_saved_as_a_1x1_convolution_is_read() -> None:
    diff = torch.randn(5, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Full.from_tensors({"diff": diff}, (5, 4)).diff, diff.flatten(1))


def test_rank_is_the_largest_that_the_change_can_have() -> None:
    assert Full.create((8, 3, 2, 2), 1, 1.0).rank == 8
    assert Full.create((20, 3, 2, 2), 1, 1.0).rank == 12


@every_kind
def test_full_equals_lycoris(kind: str, assert_close: Close) -> None:
    """LyCORIS' module for an attached layer, weight and bias together."""
    from lycoris.modules.full import FullModule

    layer, x = make_layer(kind), make_input(kind)
    theirs = FullModule("x", make_layer(kind))
    weight = filled(Full.create(tuple(layer.weight.shape), 1, 1.0))
    theirs.weight.data.copy_(weight.tensors()["diff"])
    out = weight(x, layer(x), facts(layer))
    if layer.bias is not None:
        bias = filled(Bias.create(tuple(layer.bias.shape)))
        theirs.bias.data.copy_(bias.tensors()["diff_b"])
        out = bias(x, out, facts(layer))
    theirs.apply_to()
    assert_close(out, theirs(x))
    for name, saved in theirs.custom_state_dict().items():
        assert name in ("diff", "diff_b") and saved.shape == theirs.weight.shape[: saved.ndim]
