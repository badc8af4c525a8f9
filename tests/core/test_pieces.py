"""Adapters of some rows of a layer each, as one: every type, on its own rows alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import ADAPTERS, Adapter
from lora_weave.lora_core.adapters.dora import Decomposable, norm_of
from lora_weave.lora_core.adapters.pieces import Pieces
from lora_weave.lora_core.adapters.replacement import Replacement
from lora_weave.lora_core.similarity import NeedsWeight, gram

from . import closed_forms
from .layer_kinds import ALPHA, RANK, cases, facts, fill, run, with_weight

Close = Callable[..., None]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 32), (2, 5, 12)),
    "linear of one token": (lambda: nn.Linear(12, 32), (1, 12)),
    "conv": (lambda: nn.Conv2d(6, 32, 3, padding=1), (2, 6, 5, 4)),
}
ROWS = {4: 8, 12: 4, 20: 12}  # {first row: how many}; rows 0, 16 to 20 and the last have none
# A DoRA of columns is no case of its own: it comes from files alone.
IN_AXIS = [f"{name} in axis" for name in ("lora", "loha", "lokr")]
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_form = pytest.mark.parametrize("form", [*cases(), *IN_AXIS])


def layer_of(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LAYERS[kind][0]().requires_grad_(False)


def input_of(kind: str) -> Tensor:
    return torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(2))


def pieces_of(form: str, layer: nn.Module) -> Pieces:
    weight, members = layer.weight, {}
    case = cases()[form.removesuffix(" in axis")]
    for start, length in ROWS.items():
        generator = torch.Generator().manual_seed(start)
        rows = weight[start : start + length]
        one = case.type.create(
            tuple(rows.shape), RANK, ALPHA, options=case.options, generator=generator
        )
        if case.decomposed or form in IN_AXIS:
            assert isinstance(one, Decomposable)
            one.magnitude = nn.Parameter(norm_of(rows, 1 if form in IN_AXIS else 0))
        fill(one, generator)
        members[start] = one
    return Pieces(members, tuple(weight.shape))


def exact(pieces: Pieces, weight: Tensor) -> Tensor:
    """ΔW in float64, by the definition of each piece's type on its rows."""
    change = torch.zeros(weight.shape, dtype=torch.float64)
    for place, one in pieces.placed():
        tensors = {name: tensor.double() for name, tensor in one.tensors().items()}
        rows = weight[place].double()
        full = rows + closed_forms.FORMULAS[one.name].change(tensors, rows)
        if (magnitude := tensors.get("dora_scale")) is not None:
            axis = 0 if magnitude.shape[0] == len(rows) else 1
            full = magnitude * full / norm_of(full, axis)
        change[place] = full - rows
    return change


@every_layer
@every_form
def test_each_changes_its_own_rows_alone(form: str, kind: str, assert_close: Close) -> None:
    layer, x = layer_of(kind), input_of(kind)
    pieces = pieces_of(form, layer)
    expected = exact(pieces, layer.weight)
    assert not expected[:4].any() and not expected[16:20].any() and expected[4].any()
    assert_close(pieces.delta(layer.weight), expected, torch.float32)
    assert_close(run(layer, pieces, x), with_weight(layer, expected, x), torch.float32)


@every_layer
@every_form
def test_gradients_are_those_of_the_dense_change(form: str, kind: str, assert_close: Close) -> None:
    layer, x = layer_of(kind).double(), input_of(kind).double()
    pieces = pieces_of(form, layer_of(kind)).double()
    parameters = list(pieces.parameters())
    out = run(layer, pieces, x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    found = torch.autograd.grad((out * weight).sum(), parameters)
    changed = with_weight(layer, pieces.delta(layer.weight), x)
    expected = torch.autograd.grad((changed * weight).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, torch.float64)


@every_form
def test_tensors_name_rows_and_type_and_are_read_back(form: str) -> None:
    pieces = pieces_of(form, layer_of("linear"))
    named = pieces.tensors()
    first = pieces.members()[0]
    assert {name.split(".", 1)[0] for name in named} == {"4:12", "12:16", "20:32"}
    assert f"4:12.{first.name}.{next(iter(first.tensors()))}" in named
    again = Pieces.from_tensors(named, pieces.shape)
    assert again.places == pieces.places
    assert [type(one) for one in again.members()] == [type(one) for one in pieces.members()]
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in named.items())


@pytest.mark.parametrize("rest", [(40,), (8, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("form", ["lora", "loha", "lora-tucker"])
def test_factors(form: str, rest: tuple[int, ...], assert_close: Close) -> None:
    members, case = {}, cases()[form]
    for start, length in ((4, 8), (50, 4)):
        members[start] = case.type.create((length, *rest), 2, 3.0, options=case.options)
        fill(members[start], torch.Generator().manual_seed(start))
    pieces = Pieces(members, (60, *rest))
    factors = pieces.factors()
    assert factors is not None and factors[1].shape[0] == pieces.factored_rank
    expected = copy.deepcopy(pieces).double().delta(torch.zeros(pieces.shape).double())
    assert_close(factors[0] @ factors[1], expected.flatten(1), torch.float32)


def test_no_factors_where_the_change_itself_is_smaller_or_a_piece_has_none() -> None:
    wide = Pieces({0: ADAPTERS["lora"].create((8, 8), 4, 1.0)}, (8, 8))
    mixed = {0: ADAPTERS["lora"].create((40, 80), 1, 1.0)}
    mixed[40] = ADAPTERS["ia3"].create((40, 80), 1, 1.0)
    for pieces in (wide, Pieces(mixed, (80, 80))):
        assert pieces.factored_rank is None and pieces.factors() is None


def test_it_depends_on_the_weight_where_a_piece_does() -> None:
    layer = layer_of("linear")
    assert not pieces_of("lokr", layer).needs_weight
    assert pieces_of("lokr+dora", layer).needs_weight
    assert pieces_of("oft", layer).acts_on_output
    assert not pieces_of("lokr", layer).acts_on_output


def test_rank_dropout_reaches_each_piece() -> None:
    layer = layer_of("linear")
    pieces = pieces_of("lora", layer)
    pieces.rank_mask = torch.tensor([0.0] * RANK + [2.0] * RANK + [1.0] * RANK)
    whole = pieces_of("lora", layer).delta(layer.weight)
    found = pieces.delta(layer.weight)
    assert not found[4:12].any() and torch.equal(pieces.rank_mask[:RANK], torch.zeros(RANK))
    torch.testing.assert_close(found[12:16], 2.0 * whole[12:16])
    pieces.rank_mask = None
    assert torch.equal(pieces.delta(layer.weight), whole)


def test_it_trains_what_its_pieces_do() -> None:
    pieces = pieces_of("lora+dora", layer_of("linear"))
    assert [id(one) for one in pieces.last_factors()] == [id(one.up) for one in pieces.members()]
    with pytest.raises(ValueError, match="come from files only"):
        Pieces.create((8, 8), 2, 1.0)


def test_a_replaced_weight_of_some_rows(assert_close: Close) -> None:
    weight = torch.randn(8, 6)
    new: Adapter = Replacement(torch.randn(4, 6))
    pieces = Pieces.from_tensors(Pieces({2: new}, (8, 6)).tensors(), (8, 6))
    changed = weight + pieces.delta(weight)
    assert_close(changed[2:6], new.tensors()["set_weight"], torch.float32)
    assert torch.equal(changed[:2], weight[:2])


def test_facts_are_made_once_for_a_layer() -> None:
    """By them the pieces know the dense change that the forward pass has built."""
    layer = layer_of("linear")
    known, pieces = facts(layer), pieces_of("loha+dora", layer)
    one, two = (pieces._layers(known) for _ in range(2))
    assert one is two and pieces._layers(facts(layer)) is not one
    assert torch.equal(one[0].bias(), layer.bias[4:12])


@pytest.mark.parametrize("form", ["lora", "lokr", "lora+dora", "oft"])
def test_inner_products_of_changes(form: str) -> None:
    layer = layer_of("linear")
    loras = [{"x": pieces_of(form, layer)}, {"x": pieces_of("loha", layer)}]
    dense = torch.stack([exact(one["x"], layer.weight).flatten() for one in loras])
    found = gram(loras, [lambda _: 1.0] * 2, lambda _: layer.weight)
    torch.testing.assert_close(found, dense @ dense.t(), rtol=1e-5, atol=1e-6)
    if loras[0]["x"].needs_weight:
        with pytest.raises(NeedsWeight, match=f"the change of a {form.split('+')[0]} depends on"):
            gram(loras, [lambda _: 1.0] * 2)
