"""OFT and BOFT: what a rotation keeps, other implementations, and what those get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import type_of_tensors
from lora_weave.lora_core.adapters.boft import BOFT
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.oft import OFT
from lora_weave.lora_core.adapters.oft_input import InputOFT
from lora_weave.lora_core.adapters.rotation import Rotation, cayley

from .layer_kinds import facts, fill, make_input, make_layer, run, with_weight

TYPES = {"oft": OFT, "boft": BOFT}
EVEN = ["linear", "linear-2d-input", "conv1d", "conv2d-1x1", "conv2d-3x3-stride-2", "conv3d"]
OPTIONS = {
    "plain": CreateOptions(),
    "constrained": CreateOptions(constraint=0.0625),
    "rescaled": CreateOptions(rescale=True),
    "both": CreateOptions(constraint=0.0625, rescale=True),
}
every_type = pytest.mark.parametrize("kind_of_rotation", list(TYPES))
every_even_kind = pytest.mark.parametrize("kind", EVEN)
every_option = pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
Close = Callable[..., None]


def make(name: str, shape: tuple[int, ...], rank: int = 4, **options: Any) -> Rotation:
    generator = torch.Generator().manual_seed(3)
    adapter = TYPES[name].create(shape, rank, 1.0, options=CreateOptions(**options))
    fill(adapter, generator)
    return adapter


def shape_of(kind: str) -> tuple[int, ...]:
    return tuple(make_layer(kind).weight.shape)


@every_type
@every_even_kind
def test_a_rotation_keeps_all_lengths_and_angles(
    kind_of_rotation: str, kind: str, assert_close: Close
) -> None:
    weight = make_layer(kind, torch.float64).weight
    adapter = make(kind_of_rotation, shape_of(kind)).double()
    turned = (weight + adapter.delta(weight)).detach().flatten(1)
    flat = weight.flatten(1)
    assert not torch.allclose(turned, flat, atol=0.1)
    assert_close(turned.t() @ turned, flat.t() @ flat)


def test_cayley_is_the_formula_of_the_paper(assert_close: Close) -> None:
    blocks = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(4, dtype=torch.float64)
    skew = blocks - blocks.transpose(1, 2)
    expected = (eye + skew) @ (eye - skew).inverse()
    assert_close(eye + cayley(blocks, 0.0), expected)
    assert_close(expected @ expected.transpose(1, 2), eye.expand(3, 4, 4))


def test_small_rotations_keep_their_digits() -> None:
    """1 + 1e-9 is 1 in float32, so a difference of R and 1 would be 0."""
    blocks = torch.tensor([[[0.0, 1e-9], [0.0, 0.0]]])
    assert cayley(blocks, 0.0)[0, 0, 1].item() == pytest.approx(2e-9)


@every_type
@pytest.mark.parametrize("rescale", [False, True])
def test_bf16_is_rounded_once(kind_of_rotation: str, rescale: bool) -> None:
    """A rotation by 1e-3, whose cosines are 1 in bf16, adds what it should to each output."""
    adapter = make(kind_of_rotation, (32, 32), rank=4, rescale=rescale).double()
    with torch.no_grad():
        adapter.blocks.mul_(3e-3)
        if adapter.rescale is not None:
            adapter.rescale.copy_(1.0 + 3e-3 * (adapter.rescale - 1.0))
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(64, 32, generator=generator).bfloat16()
    layer = facts(nn.Linear(32, 32, bias=False))
    exact = base.double() + adapter.delta(base.double().t()).t()
    found = adapter.float()(base, base.clone(), layer).double()
    assert (exact - base.double()).abs().max() > 2e-3
    half_step = torch.finfo(torch.bfloat16).eps / 2
    allowed = half_step * exact.abs() + 2e-4  # and a few percent of the change itself
    assert ((found - exact).abs() <= allowed).all()


@pytest.mark.parametrize("size", [0.5, 2.0])
def test_the_limit_is_on_all_blocks_together(size: float, assert_close: Close) -> None:
    blocks = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    skew = blocks - blocks.mT
    blocks = size * blocks / skew.norm()  # ‖Q‖ = size
    assert_close(cayley(blocks, 1.0), cayley(blocks / max(1.0, size), 0.0), torch.float32)


@every_type
def test_the_limit_is_alpha_times_the_outputs(kind_of_rotation: str, assert_close: Close) -> None:
    """The host leaves out the number of outputs, here 8, and so would limit ‖Q‖ to 0.25."""
    limited = make(kind_of_rotation, (8, 6), constraint=0.25).double()
    norm = (limited.blocks - limited.blocks.mT).norm()
    assert norm > 2.0
    weight = make_layer("linear", torch.float64).weight[:8, :6]
    free = make(kind_of_rotation, (8, 6)).double()
    with torch.no_grad():
        free.blocks.mul_(2.0 / norm)
    assert_close(limited.delta(weight), free.delta(weight), torch.float32)
    with torch.no_grad():
        free.blocks.mul_(0.125)
    assert not torch.allclose(limited.delta(weight), free.delta(weight), rtol=0.1)


@every_type
@every_even_kind
def test_the_bias_is_not_rotated(kind_of_rotation: str, kind: str, assert_close: Close) -> None:
    """LyCORIS' bypass mode turns the whole output; with a large bias that shows."""
    layer, x = make_layer(kind), make_input(kind)
    layer.bias.fill_(10.0)
    adapter = make(kind_of_rotation, shape_of(kind))
    out = run(layer, adapter, x)
    assert_close(out, with_weight(layer, adapter.delta(layer.weight), x))
    unbiased = facts(layer)
    object.__setattr__(unbiased, "bias", lambda: None)
    assert (adapter(x, layer(x), unbiased) - out).abs().max() > 1.0


@every_type
def test_rescale_scales_what_is_rotated(kind_of_rotation: str, assert_close: Close) -> None:
    weight = make_layer("linear").weight
    adapter = make(kind_of_rotation, shape_of("linear"), rescale=True)
    plain = TYPES[kind_of_rotation].from_tensors(
        {name: t for name, t in adapter.tensors().items() if name != "rescale"}, adapter.shape
    )
    gain = adapter.tensors()["rescale"]
    assert gain.shape == (10, 1) and not torch.equal(gain, torch.ones(10, 1))
    rotated = weight + plain.delta(weight)
    assert_close(weight + adapter.delta(weight), gain * rotated)


@every_type
@every_even_kind
def test_only_the_output_is_kept_for_the_backward_pass(kind_of_rotation: str, kind: str) -> None:
    """Not what each stage makes of it."""
    layer, x = make_layer(kind), make_input(kind).requires_grad_()
    adapter = make(kind_of_rotation, shape_of(kind), rank=2)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = run(layer, adapter, x)
    alive = {t.data_ptr() for t in (x, *layer.parameters(), *adapter.parameters())}
    small = max(parameter.numel() for parameter in adapter.parameters())
    wide = [t for t in saved if t.data_ptr() not in alive and t.numel() > small]
    assert all(t.numel() == out.numel() for t in wide)
    assert len({t.data_ptr() for t in wide}) <= 1


# how they start


@every_type
def test_they_start_at_zero_with_no_limit(kind_of_rotation: str) -> None:
    """Whatever alpha a user gives: for other types it is a scale, and here it is none."""
    adapter = TYPES[kind_of_rotation].create((8, 6), 4, 16.0)
    tensors = adapter.tensors()
    assert not tensors["oft_blocks"].any()
    assert tensors["alpha"].item() == 0.0 == adapter.alpha
    rescaled = TYPES[kind_of_rotation].create((8, 6, 3), 4, 1.0, options=OPTIONS["both"])
    assert torch.equal(rescaled.tensors()["rescale"], torch.ones(8, 1, 1))
    assert rescaled.tensors()["alpha"].item() == 0.0625


@pytest.mark.parametrize(
    ("out", "rank", "blocks"),
    [
        (320, 16, (20, 16)),
        (320, 30, (16, 20)),
        (12, 100, (1, 12)),
        (10, 1, (5, 2)),
        (13, 4, (1, 13)),
    ],
)
def test_ofts_rank_is_the_size_of_its_blocks(out: int, rank: int, blocks: tuple[int, int]) -> None:
    adapter = OFT.create((out, 6), rank, 1.0)
    assert adapter.tensors()["oft_blocks"].shape == (*blocks, blocks[1])
    assert adapter.rank == blocks[1]


# files


@every_type
def test_every_misfit_is_told(kind_of_rotation: str) -> None:
    tensors = make(kind_of_rotation, (8, 6, 3, 3), rescale=True).tensors()
    tensors |= {"alpha": torch.ones(2), "rescale": torch.ones(7, 1, 1, 1)}
    with pytest.raises(ValueError) as error:
        TYPES[kind_of_rotation].from_tensors(tensors, (12, 6, 3, 3))
    text = str(error.value)
    assert "expected (N, B, B) with N · B = 12" in text or "N · B = 12, an even B" in text
    assert "rescale is (7, 1, 1, 1), expected (12, 1, 1, 1)" in text
    assert "alpha has 2 values, expected 1" in text
    with pytest.raises(ValueError, match="the layer has 1 output"):
        TYPES[kind_of_rotation].create((1, 6), 4, 1.0)


def test_they_are_told_by_the_axes_of_their_blocks() -> None:
    assert type_of_tensors({"oft_blocks": (2, 4, 4), "alpha": ()}) is OFT
    assert type_of_tensors({"oft_blocks": (2, 2, 4, 4), "alpha": ()}) is BOFT
    assert type_of_tensors({"oft_blocks": (16,)}) is OFT  # which says what is wrong with it
    with pytest.raises(ValueError, match=r"oft_blocks is \(16,\), expected \(N, B, B\)"):
        OFT.from_tensors({"oft_blocks": torch.zeros(16)}, (8, 4))


@every_type
def test_without_alpha_there_is_no_limit(kind_of_rotation: str) -> None:
    tensors = make(kind_of_rotation, (8, 6)).tensors()
    del tensors["alpha"]
    assert TYPES[kind_of_rotation].from_tensors(tensors, (8, 6)).alpha == 0.0


@pytest.mark.parametrize("terms", [0, 2, 5])
@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_of_inputs_that_are_rotated(terms: int, blocks: int, assert_close: Close) -> None:
    """Also of one block for all inputs, and of a series: closed form against autograd."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(blocks, 6, generator=generator, dtype=torch.float64)
    adapter = InputOFT(0.1 * values, terms, (10, 12))
    weight, grad = torch.randn(2, 10, 12, generator=generator, dtype=torch.float64)
    adapter.delta(weight).backward(grad)
    (found,) = adapter.delta_gradients(weight, grad, adapter.built(weight))
    assert_close(found, adapter.values.grad)


# against LyCORIS


@pytest.fixture(scope="module")
def lycoris_module() -> Iterator[Callable[[nn.Module, Rotation], Any]]:
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule

    def module(layer: nn.Module, adapter: Rotation) -> Any:
        cls = DiagOFTModule if isinstance(adapter, OFT) else ButterflyOFTModule
        tensors = adapter.tensors()
        theirs = cls(
            "x",
            layer,
            lora_dim=adapter.rank,
            constraint=tensors["alpha"].item(),
            rescaled="rescale" in tensors,
        )
        theirs.oft_blocks.data.copy_(tensors["oft_blocks"])
        if "rescale" in tensors:
            theirs.rescale.data.copy_(tensors["rescale"])
        theirs.apply_to()
        return theirs

    yield module


@every_type
@every_even_kind
@every_option
def test_rotations_equal_lycoris(
    kind_of_rotation: str,
    kind: str,
    options: CreateOptions,
    lycoris_module: Callable[[nn.Module, Rotation], Any],
    assert_close: Close,
) -> None:
    """Its module's forward; LyCORIS cuts into no more blocks than they are large, hence rank 2."""
    layer, x = make_layer(kind), make_input(kind)
    adapter = TYPES[kind_of_rotation].create(shape_of(kind), 2, 1.0, options=options)
    fill(adapter, torch.Generator().manual_seed(3))
    theirs = lycoris_module(make_layer(kind), adapter)
    assert theirs.oft_blocks.shape == adapter.tensors()["oft_blocks"].shape
    assert_close(run(layer, adapter, x), theirs(x))
    expected, _ = theirs.get_diff_weight()
    assert_close(adapter.delta(layer.weight), expected)


@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_strength_scales_the_change_once(
    strength: float, lycoris_module: Callable[[nn.Module, Rotation], Any], assert_close: Close
) -> None:
    """The host applies it twice."""
    weight, adapter = make_layer("linear").weight, make("oft", (10, 12), rank=2)
    theirs = lycoris_module(make_layer("linear"), adapter)
    expected, _ = theirs.get_diff_weight(strength)
    assert_close(strength * adapter.delta(weight), expected)
    assert not torch.allclose(strength**2 * adapter.delta(weight), expected)
