"""What training asks of adapters beside their gradients: dropout of ranks, LoRA+, a norm limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_weave.lora_core.adapters.dora import Decomposable

from .layer_kinds import KINDS, Case, cases, facts, make_input, make_layer, run, with_weight

CASES = cases()
LINEAR = {name: case for name, case in CASES.items() if case.make("linear").last_factors()}
PLAIN = {
    name: case
    for name, case in LINEAR.items()
    if issubclass(case.type, Decomposable) and not case.decomposed
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
Close = Callable[..., None]


@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
@every_kind
def test_last_factors_start_at_zero_and_change_linearly(
    case: Case, kind: str, assert_close: Close
) -> None:
    assert not any(factor.any() for factor in case.make(kind, filled=False).last_factors())
    if not case.decomposed:
        adapter, weight = case.make(kind).double(), make_layer(kind, torch.float64).weight
        before = adapter.delta(weight).detach()
        with torch.no_grad():
            for factor in adapter.last_factors():
                factor.mul_(2.5)
        assert_close(adapter.delta(weight), 2.5 * before)


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
@every_kind
def test_the_norm_is_limited(case: Case, kind: str, assert_close: Close) -> None:
    adapter, weight = case.make(kind).double(), make_layer(kind, torch.float64).weight
    assert isinstance(adapter, Decomposable)
    before = adapter.delta(weight).detach()
    adapter.limit_norm(2.0 * before.norm().item())
    assert_close(adapter.delta(weight), before)
    adapter.limit_norm(0.5 * before.norm().item())
    assert_close(adapter.delta(weight), 0.5 * before)


RANKED = [
    (name, kind)
    for name in ("lora", "lora-tucker", "loha", "lokr-factor", "lora+dora")
    for kind in KINDS
    if not getattr(CASES[name].make(kind), "is_whole", False)  # a whole LoKr has no ranks
]


@pytest.mark.parametrize(("name", "kind"), RANKED)
def test_a_rank_that_is_dropped_changes_nothing(name: str, kind: str, assert_close: Close) -> None:
    """As if its row of the factor were zero; also in the forward pass and in the gradients."""
    case = CASES[name]
    adapter, without = case.make(kind).double(), case.make(kind).double()
    adapter.rank_mask = torch.tensor([0.0, *[1.0] * (adapter.rank - 1)])
    _zero_first_rank(without)
    layer, x = make_layer(kind, torch.float64), make_input(kind, torch.float64)
    changed = with_weight(layer, without.delta(layer.weight), x)
    assert_close(run(layer, adapter, x), changed)
    assert_close(adapter.delta(layer.weight), without.delta(layer.weight))
    adapter.rank_mask = 2.0 * torch.ones(adapter.rank)
    if not case.decomposed:
        fresh = case.make(kind).double()
        assert_close(adapter.delta(layer.weight), 2.0 * fresh.delta(layer.weight))


def _zero_first_rank(adapter: torch.nn.Module) -> None:
    ranked = ("down", "parts.hada_w1_b", "parts.lokr_w2_b")
    found = [p for name, p in adapter.named_parameters() if name in ranked]
    assert found
    for parameter in found:
        parameter.data[0] = 0.0


def test_a_mask_of_another_step_is_another_change() -> None:
    """The dense ΔW that is kept is not taken for another mask's."""
    case = CASES["loha"]
    adapter, known = case.make("linear"), facts(make_layer("linear"))
    first = adapter.dense(known, torch.float32).change
    adapter.rank_mask = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert not torch.equal(adapter.dense(known, torch.float32).change, first)


def test_a_dropped_adapter_leaves_the_layer_alone() -> None:
    layer, x = make_layer("linear"), make_input("linear")
    adapter = CASES["lora"].make("linear")
    adapter.is_dropped = True
    assert torch.equal(run(layer, adapter, x), layer(x))
