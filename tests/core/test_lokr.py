"""What a LoKr with whole blocks keeps for the backward pass, and where it writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .layer_kinds import make_adapter, make_input, make_layer, run

CASES = [("linear", torch.float32), ("linear", torch.bfloat16), ("conv2d-3x3", torch.float32)]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_whole_blocks_keep_the_input_alone(kind: str, dtype: torch.dtype) -> None:
    """w1 x, as large as the input, is computed again; the result is the layer's own output."""
    layer, x = make_layer(kind, dtype), make_input(kind, dtype).requires_grad_()
    adapter = make_adapter("lokr", tuple(layer.weight.shape))
    assert set(adapter.tensors()) == {"lokr_w1", "lokr_w2", "alpha"}
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = run(layer, adapter, x)
    alive = {t.data_ptr() for t in (x, *layer.parameters(), *adapter.parameters())}
    own = [tensor.shape for tensor in saved if tensor.data_ptr() not in alive]
    assert own == [adapter.tensors()["lokr_w1"].shape]  # times the scale
    assert out.data_ptr() == outputs[0].data_ptr()
