"""The attention used while training: equal to the host's, by products where keys are few."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from lora_weave.lora_core.host import attention
from lora_weave.lora_core.host.attention import differentiable_attention

HEADS, WIDTH = 3, 8
LAYOUTS = [(False, False), (True, False), (True, True), (False, True)]
# Share of the largest norm. Observed: output 0.0023, gradients 0.0038; torch's own 0.0022, 0.0031.
LOW_PRECISION = 0.006


@pytest.fixture
def torchs(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that torch's attention gets."""
    seen: list[tuple[int, ...]] = []
    real = comfy.ops.scaled_dot_product_attention

    def counted(q, *args, **kwargs):
        seen.append(tuple(q.shape))
        return real(q, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", counted)
    return seen


def inputs(batch=2, queries=10, keys=7, dtype=torch.bfloat16, by_head=False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for tokens in (queries, keys, keys):
        shape = (batch, HEADS, tokens, WIDTH) if by_head else (batch, tokens, HEADS * WIDTH)
        made.append(torch.randn(shape, generator=generator).to(dtype).requires_grad_())
    return made


def with_gradients(run, parts: list[Tensor]) -> list[Tensor]:
    out = run(*parts)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, parts, grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_equal_the_hosts_attention(layout, dtype, torchs):
    options = {"skip_reshape": layout[0], "skip_output_reshape": layout[1]}
    parts = inputs(dtype=dtype, by_head=layout[0])
    found = with_gradients(lambda *p: differentiable_attention(None, *p, HEADS, **options), parts)
    assert not torchs
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = with_gradients(lambda *p: attention_pytorch(*p, heads=HEADS, **options), exact)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).norm() < LOW_PRECISION * other.norm()


def test_keys_and_values_may_come_by_heads(torchs):
    """As SD3 gives them to the host's attention."""
    q, k, v = inputs()
    apart = [part.unflatten(-1, (HEADS, WIDTH)) for part in (k, v)]
    found = differentiable_attention(None, q, *apart, heads=HEADS)
    assert not torchs
    assert torch.equal(found, differentiable_attention(None, q, k, v, heads=HEADS))


def test_a_scale_of_the_models_own():
    parts = inputs(batch=1)
    found = differentiable_attention(None, *parts, heads=HEADS, scale=0.5)
    q, k, v = (part.double().unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in parts)
    expected = ((0.5 * q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert (found.double() - expected).norm() < LOW_PRECISION * expected.norm()


@pytest.mark.parametrize("why", ["float32", "mask", "long"])
def test_all_else_is_left_to_torch(why, torchs, monkeypatch):
    parts = inputs(dtype=torch.float32 if why == "float32" else torch.bfloat16)
    options = {"mask": torch.zeros(10, 7, dtype=torch.bfloat16)} if why == "mask" else {}
    if why == "long":
        monkeypatch.setattr(attention, "MAX_WEIGHTS", 2 * HEADS * 10 * 7 - 1)
    found = differentiable_attention(None, *parts, heads=HEADS, **options)
    assert len(torchs) == 1
    assert torch.equal(found, attention_pytorch(*parts, heads=HEADS, **options))
