"""(IA)³: how it starts, the forms in files, other implementations, and what those get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import type_of_tensors
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.ia3 import IA3

from .layer_kinds import KINDS, facts, fill, make_input, make_layer, run, with_weight

every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_side = pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
CONVS = [kind for kind in KINDS if kind.startswith("conv")]
Close = Callable[..., None]


def make(kind: str, on_input: bool = False) -> IA3:
    options = CreateOptions(on_input=on_input)
    adapter = IA3.create(shape_of(kind), 4, 1.0, options=options)
    fill(adapter, torch.Generator().manual_seed(3))
    return adapter


def shape_of(kind: str) -> tuple[int, ...]:
    return tuple(make_layer(kind).weight.shape)


@pytest.mark.parametrize(
    ("shape", "on_input", "size"),
    [
        ((8, 6), False, (8,)),
        ((8, 6), True, (6,)),
        ((8, 6, 3), False, (1, 8, 1)),
        ((8, 6, 3, 3), True, (1, 6, 1, 1)),
    ],
)
def test_starts_at_zero(shape: tuple[int, ...], on_input: bool, size: tuple[int, ...]) -> None:
    tensors = IA3.create(shape, 4, 1.0, options=CreateOptions(on_input=on_input)).tensors()
    assert tensors["weight"].shape == size and not tensors["weight"].any()
    assert tensors["on_input"].item() == on_input


@every_kind
def test_the_bias_is_not_scaled(kind: str, assert_close: Close) -> None:
    """LyCORIS' bypass mode and PEFT's layer scale the whole output; a large bias shows that."""
    layer, x, adapter = make_layer(kind), make_input(kind), make(kind)
    if layer.bias is None:
        return
    layer.bias.fill_(10.0)
    out = run(layer, adapter, x)
    assert_close(out, with_weight(layer, adapter.delta(layer.weight), x))
    whole = layer(x) + layer(x) * facts(layer).along_channels(adapter.weight.flatten(), out)
    assert (whole - out).abs().max() > 1.0


@every_kind
def test_the_output_side_makes_no_product_with_the_weight(kind: str) -> None:
    layer, x = make_layer(kind), make_input(kind)
    known, out = facts(layer), make_layer(kind)(x)
    object.__setattr__(known, "weight", lambda: pytest.fail("W was asked for"))
    make(kind)(x.requires_grad_(), out, known).sum().backward()


def test_small_factors_count_in_bf16() -> None:
    """1 + 3e-3 is 1 in bf16, so only the result may be rounded to it."""
    adapter = IA3.create((4, 4), 1, 1.0)
    with torch.no_grad():
        adapter.weight.fill_(1e-3)
    out = torch.full((1, 4), 255.0, dtype=torch.bfloat16)  # whose neighbours are 1 apart
    layer = facts(nn.Linear(4, 4, bias=False))
    assert adapter(out, out.clone(), layer)[0, 0].item() == 255.0
    with torch.no_grad():
        adapter.weight.fill_(3e-3)
    assert adapter(out, out.clone(), layer)[0, 0].item() == 256.0


# files


@pytest.mark.parametrize("kind", CONVS)
def test_convolutions_without_axes_of_one_are_read(kind: str) -> None:
    tensors = make(kind).tensors()
    again = IA3.from_tensors({**tensors, "weight": tensors["weight"].flatten()}, shape_of(kind))
    assert torch.equal(again.tensors()["weight"], tensors["weight"])


def test_linear_saved_as_a_convolution_is_read() -> None:
    tensors = make("linear").tensors()
    whole = {**tensors, "weight": tensors["weight"][None, :, None, None]}
    again = IA3.from_tensors(whole, shape_of("linear"))
    assert torch.equal(again.tensors()["weight"], tensors["weight"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16, torch.bool])
@every_side
def test_on_input_of_any_dtype_is_read(on_input: bool, dtype: torch.dtype) -> None:
    """Readers and writers of files cast all tensors alike."""
    tensors = make("linear", on_input).tensors()
    assert tensors["on_input"].dtype == torch.int64
    tensors["on_input"] = tensors["on_input"].to(dtype)
    assert IA3.from_tensors(tensors, (10, 12)).on_input is on_input


def test_every_misfit_is_told() -> None:
    wrong = {"weight": torch.ones(7), "on_input": torch.tensor(2)}
    with pytest.raises(ValueError) as error:
        IA3.from_tensors(wrong, (8, 6))
    assert "on_input is 2, expected 0 or 1" in str(error.value)
    assert r"weight is (7,), expected (8,) or (6,)" in str(error.value)
    wrong = {"weight": torch.ones(6), "on_input": torch.tensor(0)}
    with pytest.raises(ValueError, match=r"weight is \(6,\), expected \(8,\)"):
        IA3.from_tensors(wrong, (8, 6))
    with pytest.raises(ValueError, match=r"on_input is of shape \(3,\), expected 0 or 1"):
        IA3.from_tensors({"weight": torch.ones(8), "on_input": torch.ones(3)}, (8, 6))


def test_a_lone_weight_is_no_ia3() -> None:
    """Every model has tensors of that name."""
    assert type_of_tensors({"weight": (8,)}) is None
    assert type_of_tensors({"weight": (8,), "on_input": ()}) is IA3


# against other implementations


@every_kind
@every_side
def test_ia3_equals_lycoris(kind: str, on_input: bool, assert_close: Close) -> None:
    from lycoris.modules.ia3 import IA3Module

    layer, x, adapter = make_layer(kind), make_input(kind), make(kind, on_input)
    theirs: Any = IA3Module("x", make_layer(kind), train_on_input=on_input)
    assert theirs.weight.shape == adapter.weight.shape
    assert theirs.on_input.dtype == adapter.tensors()["on_input"].dtype
    theirs.weight.data.copy_(adapter.tensors()["weight"])
    theirs.apply_to()
    assert_close(run(layer, adapter, x), theirs(x))
    assert_close(adapter.delta(layer.weight), theirs.get_diff_weight()[0])


@pytest.mark.parametrize("kind", ["linear", "linear-odd", "conv2d-3x3-stride-2"])
@every_side
def test_ia3_equals_peft(kind: str, on_input: bool, assert_close: Close) -> None:
    """Its factor is 1 + w. PEFT scales the bias, too, so its weight alone is compared."""
    import peft

    adapter = make(kind, on_input)
    config = peft.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if on_input else []
    )
    layer = make_layer(kind)
    before = layer.weight.clone()
    model = peft.get_peft_model(nn.ModuleDict({"layer": layer}), config)
    theirs: Any = model.base_model.model["layer"]
    factor: Tensor = theirs.ia3_l["default"]
    factor.data.copy_(1.0 + adapter.tensors()["weight"].reshape(factor.shape))
    theirs.merge()
    assert_close(before + adapter.delta(before), theirs.get_base_layer().weight)
