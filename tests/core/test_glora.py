"""GLoRA: LyCORIS as the oracle, how it starts, the old layout of its files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_weave.lora_core.adapters.glora import GLoRA

from .layer_kinds import ALPHA, KINDS, RANK, facts, make_adapter, make_layer

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


@pytest.mark.parametrize("kind", ["linear", "linear-odd", "conv2d-1x1"])
def test_equals_lycoris(kind: str, assert_close: Close) -> None:
    from lycoris.modules.glora import GLoRAModule

    layer = make_layer(kind)
    adapter = make_adapter("glora", tuple(layer.weight.shape))
    theirs = GLoRAModule("x", layer, multiplier=1.0, lora_dim=RANK, alpha=ALPHA)
    for name, tensor in adapter.tensors().items():
        if name != "alpha":
            getattr(theirs, name.partition(".")[0]).weight.data = tensor
    assert_close(adapter.delta(layer.weight), theirs.get_diff_weight()[0].detach())


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
