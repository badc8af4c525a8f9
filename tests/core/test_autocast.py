"""Under autocast a layer's output is of another dtype than its input; every type goes along."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .layer_kinds import KINDS, Case, cases, make_input, make_layer, run, with_weight

CASES = cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_output_and_gradients(case: Case, kind: str, assert_close: Callable[..., None]) -> None:
    layer, adapter, reference = make_layer(kind), case.make(kind), case.make(kind).double()
    x = make_input(kind).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.detach()).dtype == torch.bfloat16
        out = run(layer, adapter, x)
    expected = with_weight(layer, reference.delta(layer.weight.double()), exact_x)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, exact_x.grad, torch.bfloat16)
    found, wanted = (
        torch.cat([parameter.grad.flatten().double() for parameter in one.parameters()])
        for one in (adapter, reference)
    )
    assert_close(found, wanted, torch.bfloat16)
