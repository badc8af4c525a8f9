"""GLoRA: LyCORIS as the oracle, how it starts, the old layout of its files."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lora_weave.lora_core.adapters.glora import NAMES, GLoRA

from .layer_kinds import ALPHA, KINDS, RANK, facts, make_adapter, make_input, make_layer, run

every_kind = pytest.mark.parametrize("kind", list(KINDS))
OLD = {"a1.weight": "a2.weight", "a2.weight": "a1.weight"} | {
    "b1.weight": "b2.weight",
    "b2.weight": "b1.weight",
}
Close = Callable[..., None]


@every_kind
def test_equals_the_formula_written_out(kind: str, assert_close: Close) -> None:
    """ΔW[o, n, k] = s · (Σ W[o, i, k] a1[i, r] a2[r, n] + Σ b1[o, r] b2[r, n, k])"""
    weight = make_layer(kind, torch.float64).weight
    adapter = make_adapter("glora", tuple(weight.shape)).double()
    parts = {name: tensor.double() for name, tensor in adapter.tensors().items()}
    a1, a2, b1 = (parts[name].flatten(1) for name in ("a1.weight", "a2.weight", "b1.weight"))
    first = torch.einsum("oi...,ir,rn->on...", weight, a1, a2)
    second = torch.einsum("or,rn...->on...", b1, parts["b2.weight"])
    assert_close(adapter.delta(weight), ALPHA / RANK * (first + second))


@every_kind
def test_equals_lycoris(kind: str, assert_close: Close) -> None:
    from lycoris.modules.glora import GLoRAModule

    layer = make_layer(kind)
    adapter = make_adapter("glora", tuple(layer.weight.shape))
    theirs = GLoRAModule("x", make_layer(kind), multiplier=1.0, lora_dim=RANK, alpha=ALPHA)
    for name, tensor in adapter.tensors().items():
        if name != "alpha":
            weight = getattr(theirs, name.partition(".")[0]).weight
            assert weight.shape == tensor.shape
            weight.data = tensor
    assert_close(adapter.delta(layer.weight), theirs.get_diff_weight()[0].detach())
    theirs.apply_to()
    x = make_input(kind)
    assert_close(run(layer, adapter, x), theirs(x))


def test_starts_as_lycoris_does() -> None:
    """a2 and b2 = 0; a1 and b1 ~ U(±1/√R), whose standard deviation is 1/√(3 R)."""
    tensors = make_adapter("glora", (400, 300, 3, 3), filled=False).tensors()
    assert not tensors["a2.weight"].any() and not tensors["b2.weight"].any()
    for name in ("a1.weight", "b1.weight"):
        start, std = tensors[name], 1 / math.sqrt(3 * RANK)
        assert start.abs().max() <= 1 / math.sqrt(RANK)
        assert abs(start.mean().item()) < 4 * std / math.sqrt(start.numel())
        assert abs(start.std().item() / std - 1) < 4 / math.sqrt(start.numel())


def test_every_misfit_is_told() -> None:
    tensors = make_adapter("glora", (8, 6, 3, 3)).tensors()
    with pytest.raises(ValueError) as error:
        GLoRA.from_tensors({**tensors, "alpha": torch.ones(2)}, (9, 5, 3, 3))
    text = str(error.value)
    for expected in (
        "a1.weight is (6, 4, 1, 1), expected (5, 4, 1, 1)",
        "a2.weight is (4, 6, 1, 1), expected (4, 5, 1, 1)",
        "b1.weight is (8, 4, 1, 1), expected (9, 4, 1, 1)",
        "b2.weight is (4, 6, 3, 3), expected (4, 5, 3, 3)",
        "alpha has 2 values, expected 1",
    ):
        assert expected in text


def test_where_both_layouts_fit_it_is_the_new_one() -> None:
    """A square layer at its full rank: the shapes tell nothing."""
    tensors = {name: torch.randn(4, 4) for name in NAMES}
    again = GLoRA.from_tensors(tensors, (4, 4)).tensors()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("factored", [True, False], ids=["factors", "dense"])
@pytest.mark.parametrize("kind", ["linear", "conv2d-1x1", "conv2d-3x3"])
def test_nothing_as_large_as_the_weight_is_kept(
    kind: str, factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W comes from the layer again in the backward pass: it may have been dequantised for us."""
    monkeypatch.setattr(GLoRA, "is_factored", lambda *_: factored)
    layer, x = make_layer(kind), make_input(kind).requires_grad_()
    known, adapter = facts(layer), make_adapter("glora", tuple(layer.weight.shape))
    copies: list[torch.Tensor] = []

    def copy() -> torch.Tensor:
        copies.append(layer.weight.clone())
        return copies[-1]

    object.__setattr__(known, "weight", copy)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        out = adapter(x, layer(x), known)
    assert len(copies) == 1 and copies[0].data_ptr() not in saved
    out.sum().backward()
    assert len(copies) == 2


@every_kind
def test_files_of_the_old_layout_are_read(kind: str) -> None:
    """The two of a pair under each other's name, where their shapes tell."""
    shape = tuple(make_layer(kind).weight.shape)
    new = make_adapter("glora", shape).tensors()
    old = {OLD.get(name, name): tensor for name, tensor in new.items()}
    again = GLoRA.from_tensors(old, shape).tensors()
    assert all(torch.equal(again[name], tensor) for name, tensor in new.items())


@every_kind
def test_the_product_with_the_weight_is_kept_until_a1_changes(kind: str) -> None:
    layer = facts(make_layer(kind))
    adapter = make_adapter("glora", layer.shape)
    first = adapter.weight_product(layer)
    assert adapter.weight_product(layer) is first
    with torch.no_grad():
        adapter.a1.mul_(2.0)
    assert torch.equal(adapter.weight_product(layer), 2.0 * first)
