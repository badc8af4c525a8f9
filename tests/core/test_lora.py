"""LoRA and LoCon: what they keep for the backward pass, and the forms in files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters.lora import LoRA

from .layer_kinds import (
    ALPHA,
    KINDS,
    RANK,
    make_adapter,
    make_input,
    make_layer,
    run,
    with_weight,
)

CONVS = [kind for kind in KINDS if kind.startswith("conv")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
Close = Callable[..., None]


def shape_of(kind: str) -> tuple[int, ...]:
    return tuple(make_layer(kind).weight.shape)


def tucker(kind: str) -> LoRA:
    """A LoRA in the Tucker form, which only files bring."""
    out, into, *kernel = shape_of(kind)
    ones = [1] * len(kernel)
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "lora_up.weight": torch.randn(out, RANK, *ones, generator=generator),
        "lora_down.weight": torch.randn(RANK, into, *ones, generator=generator),
        "lora_mid.weight": torch.randn(RANK, RANK, *kernel, generator=generator),
        "alpha": torch.tensor(ALPHA),
    }
    return LoRA.from_tensors(tensors, shape_of(kind))


@pytest.mark.parametrize("rank", [0, -1])
def test_lora_needs_a_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        LoRA.create((4, 4), rank, 1.0)


def test_lora_without_alpha_has_scale_one(assert_close: Close) -> None:
    tensors = make_adapter("lora", (8, 6)).tensors()
    del tensors["alpha"]
    adapter = LoRA.from_tensors(tensors, (8, 6))
    assert adapter.alpha == RANK
    expected = tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    assert_close(adapter.delta(torch.zeros(8, 6)), expected)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("form", ["plain", "tucker"])
def test_lora_flattened_convolutions_are_read(kind: str, form: str) -> None:
    """The host's own trainer saves them so; we write them whole."""
    adapter = tucker(kind) if form == "tucker" else make_adapter("lora", shape_of(kind))
    flat = {n: t.flatten(1) if t.ndim > 2 else t for n, t in adapter.tensors().items()}
    again = LoRA.from_tensors(flat, shape_of(kind)).tensors()
    assert all(torch.equal(again[n], tensor) for n, tensor in adapter.tensors().items())


def test_lora_linear_saved_as_a_1x1_convolution_is_read() -> None:
    adapter = make_adapter("lora", (8, 6))
    whole = {n: t[..., None, None] if t.ndim else t for n, t in adapter.tensors().items()}
    again = LoRA.from_tensors(whole, (8, 6)).tensors()
    assert all(torch.equal(again[n], tensor) for n, tensor in adapter.tensors().items())


def test_lora_error_names_every_tensor_with_both_shapes() -> None:
    tensors = make_adapter("lora", (8, 6, 3, 3)).tensors()
    with pytest.raises(ValueError) as error:
        LoRA.from_tensors({**tensors, "alpha": torch.ones(2)}, (9, 5, 3, 3))
    text = str(error.value)
    assert "lora_up.weight is (8, 4, 1, 1), expected (9, 4, 1, 1)" in text
    assert "lora_down.weight is (4, 6, 3, 3), expected (4, 5, 3, 3)" in text
    assert "alpha has 2 values, expected 1" in text


def test_lora_ranks_of_both_factors_must_agree() -> None:
    tensors = {"lora_up.weight": torch.ones(8, 3), "lora_down.weight": torch.ones(4, 6)}
    with pytest.raises(ValueError, match=r"lora_up.weight is \(8, 3\), expected \(8, 4\)"):
        LoRA.from_tensors(tensors, (8, 6))


@pytest.mark.parametrize("down", [torch.ones(0, 6), torch.ones(())], ids=["empty", "scalar"])
def test_lora_of_rank_zero_is_refused(down: Tensor) -> None:
    tensors = {"lora_up.weight": torch.ones(8, 0), "lora_down.weight": down}
    with pytest.raises(ValueError, match="lora_down.weight"):
        LoRA.from_tensors(tensors, (8, 6))


@pytest.mark.parametrize("kind", CONVS)
@every_dtype
def test_lora_tucker_form(kind: str, dtype: torch.dtype, assert_close: Close) -> None:
    layer, adapter, x = make_layer(kind, dtype), tucker(kind), make_input(kind, dtype)
    adapter = adapter.double() if dtype == torch.float64 else adapter
    expected = with_weight(layer, tucker(kind).double().delta(layer.weight.double()), x)
    assert_close(run(layer, adapter, x), expected)


@pytest.mark.parametrize("kind", CONVS)
def test_lora_tucker_gradcheck(kind: str) -> None:
    layer, adapter = make_layer(kind, torch.float64), tucker(kind).double()
    inputs = (make_input(kind, torch.float64).requires_grad_(), *adapter.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: run(layer, adapter, x), inputs)


@pytest.mark.parametrize("kind", ["linear", "conv2d-1x1", "conv2d-3x3-stride-2"])
def test_lora_on_other_memory_layouts(kind: str, assert_close: Close) -> None:
    """Inputs and outputs whose memory is not in the order of their axes."""
    layer, adapter = make_layer(kind), make_adapter("lora", shape_of(kind))
    x = make_input(kind)
    if kind == "linear":
        other = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    else:
        layer = layer.to(memory_format=torch.channels_last)
        other = x.to(memory_format=torch.channels_last, copy=True).requires_grad_()
    assert not other.is_contiguous()
    x.requires_grad_()
    plain, out = run(make_layer(kind), adapter, x), run(layer, adapter, other)
    assert_close(out, plain)
    by_layout = [
        torch.autograd.grad(o.square().sum(), [i, *adapter.parameters()])
        for o, i in ((plain, x), (out, other))
    ]
    for expected, found in zip(*by_layout, strict=True):
        assert_close(found, expected)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_writes_into_the_layers_output(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, dtype)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    out = run(layer, make_adapter("lora", shape_of(kind)), make_input(kind, dtype))
    assert out.data_ptr() == outputs[0].data_ptr()
    assert out.stride() == outputs[0].stride()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_keeps_nothing_wide_for_the_backward_pass(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is alive anyway (input, base weight, factors) and one rank-sized tensor."""
    monkeypatch.setattr(LoRA, "is_factored", lambda *_: True)  # a rank of 4 is high for some
    layer, adapter = make_layer(kind, dtype), make_adapter("lora", shape_of(kind))
    x = make_input(kind, dtype).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = run(layer, adapter, x)
    alive = {t.data_ptr() for t in (x, *layer.parameters(), *adapter.parameters())}
    own = [tensor for tensor in saved if tensor.data_ptr() not in alive]
    assert [tensor.numel() for tensor in own] == [out.numel() // shape_of(kind)[0] * RANK]
    assert {p.data_ptr() for p in adapter.parameters()} <= {t.data_ptr() for t in saved}


def test_lora_fails_loudly_where_the_layer_keeps_its_output() -> None:
    """Its output is written over, so a layer that needs it must raise, never compute nonsense."""

    class Exponential(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).exp()  # whose derivative is its output

    layer = Exponential(6, 8).requires_grad_(False)
    out = run(layer, make_adapter("lora", (8, 6)), torch.ones(2, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
