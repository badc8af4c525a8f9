"""Gradient checkpointing that is right for blocks which write into their inputs.

torch's own gives wrong gradients there without an error, because it recomputes from inputs that
were written over. Here a write is loud, and under protection blocks run on clones of their inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .protection import IN_PLACE_ERROR, PROTECTED, copies_before_writes


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the blocks keep only their inputs and compute again in the backward pass.

    A block's class is swapped for a subclass, so `isinstance` checks hold, its hooks work and its
    `__dict__` is untouched.
    """
    classes = [type(block) for block in blocks]
    try:
        for block in blocks:
            block.__class__ = _recomputing_class(type(block))  # type: ignore[arg-type]
        yield
    finally:
        for block, cls in zip(blocks, classes, strict=True):
            block.__class__ = cls


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks worth recomputing: the outermost members of lists and sequences with layers.

    UNets hold their ResBlocks and transformers in sequences within lists, DiTs hold blocks in
    lists. A member with fewer than two layers of weights (an activation, one projection) is not
    worth it.
    """
    found: list[nn.Module] = []
    for child in model.children():
        is_container = isinstance(child, (nn.ModuleList, nn.Sequential))
        found += _members(child) if is_container else repeated_blocks(child)
    return found


def _members(container: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for member in container.children():
        if isinstance(member, (nn.ModuleList, nn.Sequential)):
            found += _members(member)
        elif sum(1 for part in member.modules() if _has_matrix(part)) >= 2:
            found.append(member)
    return found


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


@functools.cache
def _recomputing_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(cls.forward, self)
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return _recompute(plain, args, kwargs)

    return type(f"Recomputing{cls.__name__}", (cls,), {"forward": forward})


def _recompute(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    # The values of kwargs apart from their dict, which is made anew for each call in any case.
    inputs = _take_tensors((args, list(kwargs.values())), tensors, _needs_gradient)
    call = _Call(forward, list(kwargs), inputs, PROTECTED.get())
    # A block whose inputs need no gradient may hold adapters that do: the switch makes autograd
    # call backward all the same.
    switch = torch.empty(0, requires_grad=True)
    outputs = _Recompute.apply(call, switch, *tensors)
    return _put_tensors(call.outputs, iter(outputs))


@dataclasses.dataclass
class _Call:
    """A block's call without its tensors: places stand for them in `inputs` and `outputs`."""

    forward: Callable[..., Any]
    names: list[str]
    inputs: Any
    protected: bool
    outputs: Any = None

    def __call__(self, given: Iterator[Tensor]) -> list[Tensor]:
        """Run the block on these tensors; the tensors among its outputs."""
        args, values = _put_tensors(self.inputs, given)
        outputs = self.forward(*args, **dict(zip(self.names, values, strict=True)))
        tensors: list[Tensor] = []
        self.outputs = _take_tensors(outputs, tensors, _has_tensor)
        return tensors


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, switch: Tensor, *tensors: Tensor) -> Any:
        """The call without a graph. Protected: on clones, so that nothing outside is written to."""
        ctx.call = call
        ctx.grads = [tensor.requires_grad for tensor in tensors]
        given = [t.detach().clone() if call.protected else t.detach() for t in tensors]
        versions = [tensor._version for tensor in tensors]
        with torch.no_grad():
            outputs = call(iter(given))
        # save_for_backward takes the version at the end of this function, so it can't tell.
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError(f"an input of a recomputed block was {IN_PLACE_ERROR}")
        ctx.save_for_backward(*tensors)
        return tuple(output.detach() for output in outputs)  # an object of its own for each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.grads, strict=True)
        ]
        protected = ctx.call.protected
        with torch.enable_grad(), copies_before_writes() if protected else nullcontext():
            # A leaf can't be written to in place; its clone can.
            outputs = ctx.call(iter([t.clone() for t in inputs] if protected else inputs))
            pairs = [
                (output, grad)
                for output, grad in zip(outputs, grads, strict=True)
                if output.requires_grad and grad is not None
            ]
            if pairs:
                torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return (None, None, *(tensor.grad for tensor in inputs))


class _Place:
    """Stands for a tensor that was taken out of a structure."""


def _take_tensors(value: Any, tensors: list[Tensor], opens: Callable[[Any], bool]) -> Any:
    """`value` with its tensors replaced by places, and appended to `tensors`.

    Looks into lists, tuples and dataclasses, and into dicts for which `opens` holds; other dicts
    (the host's transformer_options) stay the very same object.
    """

    def take(tensor: Any) -> Any:
        tensors.append(tensor.clone() if tensor.is_inference() else tensor)
        return _Place()

    return _mapped(value, Tensor, take, opens)


def _put_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    return _mapped(value, _Place, lambda place: next(tensors), _has_place)


def _mapped(
    value: Any, kind: type, change: Callable[[Any], Any], opens: Callable[..., bool]
) -> Any:
    """`value` with every `kind` in it changed; what holds none stays the same object."""
    if isinstance(value, kind):
        return change(value)
    if not any(isinstance(leaf, kind) for leaf in _leaves(value)):
        return value
    if isinstance(value, (list, tuple)):
        parts = [_mapped(part, kind, change, opens) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        if not opens(value):
            return value
        return {name: _mapped(part, kind, change, opens) for name, part in value.items()}
    fields = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(
        value, **{name: _mapped(getattr(value, name), kind, change, opens) for name in fields}
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and places in lists, tuples, dicts and dataclasses."""
    if isinstance(value, (Tensor, _Place)):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _leaves([getattr(value, field.name) for field in dataclasses.fields(value)])


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in _leaves(value))


def _needs_gradient(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _leaves(value))


def _has_place(value: Any) -> bool:
    return any(isinstance(leaf, _Place) for leaf in _leaves(value))
