"""Every adapter type on every kind of layer: float64, finite differences, invariants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import Adapter, adapter_type, type_of_tensors
from lora_weave.lora_core.adapters.dora import Decomposable

from .layer_kinds import (
    ALPHA,
    KINDS,
    Case,
    cases,
    facts,
    fill,
    make_input,
    make_layer,
    run,
    with_weight,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = cases()
every_type = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
Close = Callable[..., None]


@every_type
@every_kind
def test_starts_as_no_change(case: Case, kind: str, assert_close: Close) -> None:
    layer, x = make_layer(kind), make_input(kind)
    adapter = case.make(kind, filled=False)
    weight = layer.weight
    if case.decomposed:  # a norm divided by itself
        assert_close(weight + adapter.delta(weight), weight)
        assert_close(run(layer, adapter, x), layer(x))
    else:
        assert torch.equal(adapter.delta(weight), torch.zeros_like(weight))
        assert torch.equal(run(layer, adapter, x), layer(x))
    # No plain sum of squares: a rotation of all outputs leaves that as it is.
    (run(layer, adapter, x) - 1.0).square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


@every_type
@every_kind
@every_dtype
def test_output_and_gradients_are_those_of_the_changed_weight(
    case: Case, kind: str, dtype: torch.dtype, assert_close: Close
) -> None:
    layer = make_layer(kind, dtype)
    adapter, reference = case.make(kind), case.make(kind).double()
    adapter = adapter.double() if dtype == torch.float64 else adapter
    x = make_input(kind, dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()

    out = run(layer, adapter, x)
    expected = with_weight(layer, reference.delta(layer.weight.double()), exact_x)
    assert out.dtype == dtype
    assert_close(out, expected)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, exact_x.grad)
    for label, parameter in adapter.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, label
        assert parameter.grad.abs().max() > 0, label
    # All at once: the gradient of one factor may be a small difference of large terms (DoRA).
    found, wanted = (
        torch.cat([parameter.grad.flatten().double() for parameter in one.parameters()])
        for one in (adapter, reference)
    )
    assert_close(found, wanted, dtype)


@every_type
@every_kind
@pytest.mark.parametrize("first", [False, True], ids=["inside", "first-layer"])
def test_gradcheck(case: Case, kind: str, first: bool) -> None:
    """Against finite differences, also where the layer's input needs no gradient."""
    layer = make_layer(kind, torch.float64)
    adapter = case.make(kind).double()
    x = make_input(kind, torch.float64).requires_grad_(not first)
    inputs = (x, *adapter.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: run(layer, adapter, x), inputs, fast_mode=True)


@every_type
@every_kind
def test_factors_multiply_to_delta(case: Case, kind: str, assert_close: Close) -> None:
    adapter = case.make(kind).double()
    weight = make_layer(kind, torch.float64).weight
    factors = adapter.factors()
    assert (factors is None) == (adapter.factored_rank is None)
    if factors is not None:
        u, v = factors
        assert u.shape == (weight.shape[0], v.shape[0])
        assert v.shape[0] == adapter.factored_rank
        assert_close((u @ v).reshape(weight.shape), adapter.delta(weight))


@every_type
@every_kind
def test_alpha_over_rank_scales(case: Case, kind: str, assert_close: Close) -> None:
    weight = make_layer(kind).weight
    adapter = case.make(kind)
    tensors = adapter.tensors()
    assert ("alpha" in tensors) == adapter.has_alpha
    if adapter.has_alpha and not adapter.alpha_scales:
        assert tensors["alpha"].item() == adapter.alpha
    elif adapter.has_alpha and not case.decomposed:
        assert tensors["alpha"].item() == ALPHA == adapter.alpha
        tripled = case.type.from_tensors(
            {**tensors, "alpha": torch.tensor(3 * ALPHA)}, adapter.shape
        )
        times = 1 if getattr(adapter, "is_whole", False) else 3  # a whole LoKr takes no alpha
        assert_close(tripled.delta(weight), times * adapter.delta(weight))


@every_type
@every_kind
def test_tensors_round_trip(case: Case, kind: str) -> None:
    weight = make_layer(kind).weight
    adapter = case.make(kind)
    tensors = adapter.tensors()
    assert any(form <= tensors.keys() for form in case.type.forms)
    assert tensors.keys() <= case.type.names()
    assert not any(tensor.requires_grad for tensor in tensors.values())
    again = case.type.from_tensors(tensors, adapter.shape)
    assert (again.shape, again.rank, again.alpha) == (adapter.shape, adapter.rank, adapter.alpha)
    assert torch.equal(again.delta(weight), adapter.delta(weight))
    for label, tensor in again.tensors().items():
        assert tensor.dtype == tensors[label].dtype and torch.equal(tensor, tensors[label])


@every_type
@every_kind
def test_type_is_told_by_its_tensors(case: Case, kind: str) -> None:
    shapes = {name: tensor.shape for name, tensor in case.make(kind).tensors().items()}
    assert type_of_tensors(shapes) is case.type is adapter_type(case.name)


@every_type
@every_kind
def test_missing_tensors_are_named(case: Case, kind: str) -> None:
    adapter = case.make(kind)
    tensors = adapter.tensors()
    form = next(form for form in case.type.forms if form <= tensors.keys())
    for missing in form:
        rest = {label: tensor for label, tensor in tensors.items() if label != missing}
        if not any(other <= rest.keys() for other in case.type.forms):
            with pytest.raises(ValueError, match=rf"{missing}\b.* is missing"):
                case.type.from_tensors(rest, adapter.shape)


@every_type
@every_kind
def test_tensors_of_another_layer_are_refused(case: Case, kind: str) -> None:
    adapter = case.make(kind)
    shape = adapter.shape
    other = (shape[0] + 1, shape[1] + 1, *shape[2:])
    with pytest.raises(ValueError):
        case.type.from_tensors(adapter.tensors(), other)


@every_type
@every_kind
def test_a_dense_change_is_built_once_a_step(
    case: Case, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again where a block is computed a second time, nor for gradients; anew after a step.

    Types that act on the output have no use for it. See `delta_gradients` for who builds it twice.
    """
    adapter, x, known = case.make(kind), make_input(kind).requires_grad_(), facts(make_layer(kind))
    out, own = make_layer(kind)(x).detach(), type(adapter)
    builder = "change" if isinstance(adapter, Decomposable) else "delta"
    built: list[Adapter] = []
    monkeypatch.setattr(own, builder, _counted(getattr(own, builder), built))
    monkeypatch.setattr(own, "is_factored", lambda *_: False)

    def forward() -> Tensor:
        return adapter(x, out.clone(), known)

    first, again = forward(), forward()
    assert torch.equal(first, again)
    once = len(built)
    assert once == (not adapter.acts_on_output)
    again.sum().backward()
    has_no_closed_form = own.delta_gradients is Adapter.delta_gradients
    assert len(built) == (2 * once if has_no_closed_form else once)
    built.clear()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    changed = forward()
    assert len(built) == once
    assert not torch.equal(changed, first)
    adapter.forget_dense()
    assert torch.equal(forward(), changed)


def test_closed_forms_are_known() -> None:
    """The test above allows a type without one."""
    for name in (
        "lora",
        "loha",
        "lokr",
        "full",
        "ia3-on-input",
        "oft-on-input",
        "glora",
        "loha+dora",
    ):
        own = type(CASES[name].make("linear"))
        assert own.delta_gradients is not Adapter.delta_gradients, name


def _counted(build: Callable[..., Tensor], built: list[Adapter]) -> Callable[..., Tensor]:
    def count(self: Adapter, *weight: Tensor) -> Tensor:
        built.append(self)
        return build(self, *weight)

    return count


@every_type
@every_kind
def test_gradients_of_a_change_are_those_of_its_formula(
    case: Case, kind: str, assert_close: Close
) -> None:
    """Closed forms against autograd through `delta`."""
    adapter = case.make(kind).double()
    weight = make_layer(kind, torch.float64).weight
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    adapter.delta(weight).backward(grad)
    with torch.no_grad():
        built = adapter.built(weight)
    found = adapter.delta_gradients(weight, grad, built)
    for gradient, parameter in zip(found, adapter.parameters(), strict=True):
        assert gradient is not None and gradient.shape == parameter.shape
        assert not gradient.requires_grad
    wanted = [parameter.grad.flatten() for parameter in adapter.parameters()]
    assert_close(torch.cat([gradient.flatten() for gradient in found]), torch.cat(wanted))


@every_type
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_of_the_fused_optimizer_is_seen(case: Case, kind: str, dtype: torch.dtype) -> None:
    """It writes into the parameters without counting up their versions."""
    layer, x, adapter = make_layer(kind, dtype), make_input(kind, dtype), case.make(kind)
    known = facts(layer)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    (adapter(x, layer(x), known) - 1.0).square().sum().backward()
    optimizer.step()
    fresh = case.type.from_tensors(adapter.tensors(), adapter.shape)
    assert torch.equal(adapter(x, layer(x), known), fresh(x, layer(x), known))


@every_type
def test_seed_decides_the_start(case: Case) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = case.type.create(
            (8, 6, 3, 3), case.rank, ALPHA, options=case.options, generator=generator
        )
        return made.tensors()

    before = torch.get_rng_state()
    first, again, other = start(0), start(0), start(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[label], again[label]) for label in first)
    random = any((tensor != tensor.flatten()[0]).any() for tensor in first.values())
    assert any(not torch.equal(first[label], other[label]) for label in first) == random


@every_type
def test_starts_in_float32(case: Case) -> None:
    assert {p.dtype for p in case.make("linear").parameters()} == {torch.float32}


@every_type
@every_kind
def test_rank_below_one_is_refused(case: Case, kind: str) -> None:
    shape = tuple(make_layer(kind).weight.shape)
    with pytest.raises(ValueError, match="rank is 0"):
        case.type.create(shape, 0, 1.0)


def test_unknown_type_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown adapter type 'lorra'; known: .*lora"):
        adapter_type("lorra")
    assert type_of_tensors({"lora_up.weight": (2, 2), "alpha": ()}) is None


@every_type
def test_fill_changes_every_factor(case: Case) -> None:
    """The tests above would see nothing of a factor that stayed zero."""
    adapter = case.make("conv2d-3x3", filled=False)
    fill(adapter, torch.Generator().manual_seed(0))
    assert all(parameter.any() for parameter in adapter.parameters())
