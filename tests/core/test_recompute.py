"""Gradients through blocks that write into their inputs, with and without recomputing them.

Each block exists twice: as the host's families write it (`x += ...`), and out of place, which
autograd alone gets right and which is the reference, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, adapter_type
from lora_weave.lora_core.training.protection import Gradients, copies_before_writes
from lora_weave.lora_core.training.recompute import recomputed, repeated_blocks

from .tiny import attached_to, layers_of

WIDTH, RANK = 5, 2
Grads = dict[str, Tensor]


class Block(nn.Module):
    """Two layers; `use` calls the block as a model of its kind does."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.in_place = in_place

    def inner(self, x: Tensor) -> Tensor:
        return self.second(gelu(self.first(x)))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.in_place:
            x += y
            return x
        return x + y

    def use(self, x: Tensor) -> Tensor:
        return self(x)


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.inner(x))


class Shifted(Block):
    """Keeps no value that it writes over, so that autograd allows it; the output is another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.inner(x + 0.1)).tanh()

    def use(self, x: Tensor) -> Tensor:
        return self(x * 1.0)


class Flux(Block):
    """Two streams in keywords, a modulation, two outputs; Flux's double blocks are so."""

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, mask: Tensor | None = None) -> Any:
        img = self.add(img, vec * self.inner(img))
        txt = self.add(txt, self.inner(txt + img) * vec)
        return img, txt

    def use(self, x: Tensor) -> Tensor:
        img, txt = self(img=x[:, :3].clone(), txt=x[:, 3:].clone(), vec=x.mean(dim=1, keepdim=True))
        return torch.cat((img, txt), dim=1)


class Sliced(Block):
    """Writes into a part of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x[:, 1:] += self.inner(x)[:, 1:]
            return x
        return torch.cat((x[:, :1], (x + self.inner(x))[:, 1:]), dim=1)


@dataclasses.dataclass
class State:
    x: Tensor
    scales: list[Tensor]
    name: str = "state"


class Structured(Block):
    """Takes a dataclass with tensors and lists of them, and a dict with others."""

    def forward(self, state: State, options: dict[str, Any]) -> Tensor:
        x = self.add(state.x, self.inner(state.x) * state.scales[0])
        return self.add(x, options["shift"] * state.scales[1])

    def use(self, x: Tensor) -> Tensor:
        scales = [x.detach().mean(dim=1, keepdim=True), x.mean(dim=2, keepdim=True)]
        return self(State(x, scales), {"shift": x.sin(), "sizes": (1, 2)})


class Listed(Block):
    """Gives its outputs in a list and a dict."""

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return [self.add(x, y), {"y": y.cos()}, None, "a word"]

    def use(self, x: Tensor) -> Tensor:
        x, named, nothing, word = self(x)
        assert nothing is None and word == "a word"
        return x + named["y"]


class Twice(Block):
    """Takes the same tensor twice, and a scalar; its input is written over after it."""

    def forward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        return self.inner(x) * scale + y.sin()

    def use(self, x: Tensor) -> Tensor:
        out = self(x, x, 0.5)
        return self.add(x, out)


BLOCKS = [Residual, Shifted, Flux, Sliced, Structured, Listed, Twice]
every_block = pytest.mark.parametrize("kind", BLOCKS)
recompute_or_not = pytest.mark.parametrize("recomputing", [False, True], ids=["kept", "recomputed"])


class Net(nn.Module):
    def __init__(self, kind: type[Block], *, in_place: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(kind(in_place) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block.use(x)
        return self.head(x)


def make_net(kind: type[Block], *, in_place: bool) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(kind, in_place=in_place).double().requires_grad_(False)


def make_adapters(net: nn.Module, only: str = "", name: str = "lora") -> dict[str, Adapter]:
    """Adapters that change something, on the layers whose path begins with `only`."""
    generator = torch.Generator().manual_seed(1)
    adapters = {}
    for path, layer in layers_of(net).items():
        shape = tuple(layer.weight.shape)
        adapter = adapter_type(name).create(shape, RANK, 1.0, generator=generator).double()
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        adapters[path] = adapter
    return {path: adapter for path, adapter in adapters.items() if path.startswith(only)}


def make_input() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 6, WIDTH, generator=generator, dtype=torch.float64)


def grads_of(
    net: Net, adapters: dict[str, Adapter], *, x_grad: bool = False, recomputing: bool = False
) -> tuple[Grads, Gradients]:
    """The gradients of one step as the loop takes it, by parameter; and the Gradients used."""
    x = make_input().requires_grad_(x_grad)
    parameters = {f"{p}.{n}": v for p, a in adapters.items() for n, v in a.named_parameters()}
    gradients = Gradients()

    def forward_backward() -> Tensor:
        loss = net(x * 1.0).square().sum()
        loss.backward()
        return loss.detach()

    def forget() -> None:
        for tensor in (x, *parameters.values()):
            tensor.grad = None

    forget()
    blocks = recomputed(list(net.blocks)) if recomputing else nullcontext()
    with attached_to(net, adapters), blocks:
        gradients.compute(forward_backward, forget)
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    return grads | ({"x": x.grad} if x_grad else {}), gradients


def assert_equal(found: Grads, expected: Grads) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)


def largest_error(found: Grads, expected: Grads) -> float:
    return max(((found[n] - e).norm() / e.norm()).item() for n, e in expected.items())


# gradients


@every_block
@recompute_or_not
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_in_place_equals_out_of_place(kind: type[Block], recomputing: bool, name: str) -> None:
    adapters = make_adapters(make_net(kind, in_place=False), name=name)
    expected, _ = grads_of(make_net(kind, in_place=False), adapters, x_grad=True)
    net = make_net(kind, in_place=True)
    found, gradients = grads_of(net, adapters, x_grad=True, recomputing=recomputing)
    assert_equal(found, expected)
    if not any(adapter.acts_on_output for adapter in adapters.values()):  # they keep no input
        assert gradients.protected == (recomputing or kind is not Shifted)


@every_block
@recompute_or_not
@pytest.mark.parametrize("only", ["blocks.0", "blocks.1", "blocks"])
def test_adapters_inside_blocks_whose_inputs_need_no_gradient(
    kind: type[Block], recomputing: bool, only: str
) -> None:
    adapters = make_adapters(make_net(kind, in_place=False), only)
    expected, _ = grads_of(make_net(kind, in_place=False), adapters)
    found, _ = grads_of(make_net(kind, in_place=True), adapters, recomputing=recomputing)
    assert_equal(found, expected)


@every_block
@recompute_or_not
def test_out_of_place_needs_no_protection(kind: type[Block], recomputing: bool) -> None:
    net = make_net(kind, in_place=False)
    adapters = make_adapters(net)
    expected, _ = grads_of(net, adapters, x_grad=True)
    found, gradients = grads_of(net, adapters, x_grad=True, recomputing=recomputing)
    assert_equal(found, expected)
    assert not gradients.protected


def test_gradient_equals_finite_differences() -> None:
    """Along one direction; neither side knows of the out-of-place reference."""
    net = make_net(Flux, in_place=True)
    adapters = make_adapters(net)
    grads, _ = grads_of(net, adapters, recomputing=True)
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss_at(step: float) -> float:
        with torch.no_grad(), attached_to(net, adapters):
            torch._foreach_add_(parameters, direction, alpha=step)
            loss = net(make_input()).square().sum().item()
            torch._foreach_add_(parameters, direction, alpha=-step)
        return loss

    step = 1e-6
    slope = sum((g * d).sum().item() for g, d in zip(grads.values(), direction, strict=True))
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_torchs_own_checkpoint_is_wrong_here() -> None:
    """Why this module exists, and that these tests can fail: no error, another gradient."""
    adapters = make_adapters(make_net(Shifted, in_place=False))
    expected, _ = grads_of(make_net(Shifted, in_place=False), adapters)
    net = make_net(Shifted, in_place=True)

    def use(block: Block, x: Tensor) -> Tensor:
        # as the host's trainer calls it: the tensors lie in a tuple, where torch can't check them
        return checkpoint(lambda args: block(*args), (x * 1.0,), use_reentrant=False)

    for block in net.blocks:
        block.use = functools.partial(use, block)
    found, gradients = grads_of(net, adapters)
    assert not gradients.protected
    assert largest_error(found, expected) > 0.1


def test_torchs_own_protection_misses_slices() -> None:
    """Why `allow_mutation_on_saved_tensors` is not used: no error, another gradient."""
    adapters = make_adapters(make_net(Sliced, in_place=False))
    expected, _ = grads_of(make_net(Sliced, in_place=False), adapters)
    with allow_mutation_on_saved_tensors():
        found, gradients = grads_of(make_net(Sliced, in_place=True), adapters)
    assert not gradients.protected
    assert largest_error(found, expected) > 0.1


def test_inference_tensors_pass_into_recomputed_blocks() -> None:
    """Conditioning that the host made in inference mode can't be saved for a backward pass."""
    net = make_net(Residual, in_place=False)
    with torch.inference_mode():
        x = make_input()
    with attached_to(net, make_adapters(net)), recomputed(list(net.blocks)):
        assert net.blocks[0](x).requires_grad


def test_dicts_without_gradients_stay_the_same_object() -> None:
    """The host's transformer_options are written to by blocks and read by the model."""
    seen: list[dict[str, Any]] = []

    class Options(Block):
        def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
            seen.append(options)
            options["calls"] += 1
            return self.inner(x)

    block, options = Options(False), {"calls": 0, "mask": torch.ones(1)}
    with recomputed([block]):
        block(torch.ones(2, WIDTH), options).sum().backward()
    assert seen == [options, options] and all(one is options for one in seen)
    assert options["calls"] == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x[:, 1].mul_(2),
        lambda x: x.view(-1)[3:5].zero_(),
        lambda x: torch.sin(x.detach(), out=x.detach()),
        lambda x: torch._foreach_add_([x.detach()[0], x.detach()[1]], 1.0),
        lambda x: x.t().copy_(torch.ones(3, 2)),
    ],
    ids=["whole", "slice", "flat-slice", "out", "foreach", "transposed"],
)
def test_saved_tensors_are_copied_before_every_kind_of_write(write: Callable[..., Any]) -> None:
    x, weight = torch.arange(6.0).reshape(2, 3), torch.ones(3, requires_grad=True)
    with copies_before_writes():
        kept = x.clone()
        y = (kept * weight).sum() + (kept[:, 1:] * weight[1:]).sum()
        with copies_before_writes():  # an inner one must not hide writes from the outer
            write(kept)
        assert not torch.equal(kept, x)
        y.backward()
    assert weight.grad.tolist() == (x.sum(0) + torch.tensor([0, *x.sum(0)[1:]])).tolist()


def test_copies_are_made_once_and_only_of_what_is_written() -> None:
    x, weight = torch.ones(4), torch.ones(4, requires_grad=True)
    written, other = x * 1, x * 1
    with copies_before_writes():
        outs = [written * weight, written * weight, other * weight]
        written.add_(1)
        first, second, third = (out.grad_fn._saved_self for out in outs)
    assert first.data_ptr() == second.data_ptr() != written.data_ptr()
    assert third.data_ptr() == other.data_ptr()


# Gradients


def test_protects_from_the_first_failure_on() -> None:
    net = make_net(Residual, in_place=True)
    adapters = make_adapters(net)
    gradients, tries, forgotten = Gradients(), [], []

    def forward_backward() -> Tensor:
        tries.append(1)
        loss = net(make_input()).square().sum()
        loss.backward()
        return loss.detach()

    with attached_to(net, adapters):
        for expected_tries in (2, 3):
            gradients.compute(forward_backward, lambda: forgotten.append(1))
            assert (len(tries), len(forgotten)) == (expected_tries, 1)


def test_other_errors_pass_through() -> None:
    gradients = Gradients()

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gradients.compute(fail, lambda: None)
    assert not gradients.protected


# what recomputed() does to the blocks


@contextmanager
def unchanged(blocks: list[nn.Module]) -> Iterator[None]:
    """Asserts that the blocks' classes and `__dict__` are the same afterwards."""
    before = [(type(block), dict(block.__dict__)) for block in blocks]
    yield
    for block, (cls, items) in zip(blocks, before, strict=True):
        assert type(block) is cls
        assert list(block.__dict__) == list(items)
        assert all(block.__dict__[name] is value for name, value in items.items())


def test_classes_and_dicts_are_restored() -> None:
    net = make_net(Residual, in_place=True)
    blocks = list(net.blocks)
    with unchanged(blocks):
        with recomputed(blocks):
            assert all(isinstance(block, Residual) for block in blocks)
            assert all(type(block) is not Residual for block in blocks)
    with unchanged(blocks):
        with pytest.raises(KeyboardInterrupt), recomputed(blocks):
            raise KeyboardInterrupt
    with unchanged(blocks), recomputed([*blocks, *blocks]):
        pass


def test_hooks_and_plain_calls_work() -> None:
    block, x = Residual(False), torch.ones(2, WIDTH)
    expected, calls = block(x), []
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    with recomputed([block]):
        with torch.no_grad():
            assert torch.equal(block(x), expected)
        assert torch.equal(block(x), expected)
        assert inspect.signature(type(block).__mro__[1].forward) == inspect.signature(
            Residual.forward
        )
    handle.remove()
    assert calls == [1, 1]


def test_keeps_only_the_inputs_of_blocks() -> None:
    net = make_net(Residual, in_place=False)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    x = make_input()
    with attached_to(net, make_adapters(net, "blocks")), recomputed(list(net.blocks)):
        with hooks:
            out = net.stem(x)
            for block in net.blocks:
                out = block(out)
    assert [tensor.shape for tensor in saved] == [x.shape] * 3


# which blocks


class Named(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def resblock() -> nn.Module:
    return Named(conv=nn.Conv2d(2, 2, 1), norm=nn.GroupNorm(1, 2), out=nn.Conv2d(2, 2, 1))


def test_repeated_blocks_of_a_unet() -> None:
    res, attn, middle = resblock(), resblock(), resblock()
    unet = Named(
        time=nn.Linear(2, 2),
        input_blocks=nn.ModuleList(
            [nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Sequential(res, attn, nn.SiLU())]
        ),
        middle_block=nn.Sequential(middle),
    )
    assert repeated_blocks(unet) == [res, attn, middle]


def test_repeated_blocks_of_a_transformer() -> None:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))

    blocks = [Named(attn=Named(q=nn.Linear(2, 2)), mlp=mlp()) for _ in range(2)]
    experts = Named(inner=nn.ModuleList([resblock(), resblock()]))  # one block, lists inside it
    model = Named(
        inner=Named(blocks=nn.ModuleList([*blocks, experts])),
        final=Named(proj=nn.Linear(2, 2), norm=nn.LayerNorm(2)),
        small=nn.ModuleList([nn.Linear(2, 2), nn.SiLU()]),
    )
    assert repeated_blocks(model) == [*blocks, experts]
