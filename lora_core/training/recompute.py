"""Gradients that are right for blocks which write into their inputs, with and without recompute.

Many of the host's blocks do `x += ...` (Flux, text encoders). Autograd refuses that where the
old value was saved, and torch's own checkpointing then gives wrong gradients without an error,
because it recomputes from inputs that were written over. Here every such case is loud first, and
the step is then taken again under protection: `allow_mutation_on_saved_tensors` for the graph,
clones for a recomputed block's inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

_PROTECTED: ContextVar[bool] = ContextVar("protected", default=False)
_IN_PLACE_ERROR = "modified by an inplace operation"


class Gradients:
    """Runs a forward and backward, and protects against in-place writes once one was seen."""

    def __init__(self, *, recomputing: bool) -> None:
        self._recomputing = recomputing
        self.protected = False

    def compute(self, forward_backward: Callable[[], Tensor], forget: Callable[[], None]) -> Tensor:
        """The result of `forward_backward()`, which must accumulate gradients by `backward`.

        `forget()` drops the gradients of a try that failed; the second try repeats it all.
        """
        if not self.protected:
            try:
                return forward_backward()
            except RuntimeError as error:
                if _IN_PLACE_ERROR not in str(error):
                    raise
            forget()
            self.protected = True
        token = _PROTECTED.set(True)
        try:
            # A recomputed block opens the same context for itself; they can't be nested.
            with nullcontext() if self._recomputing else allow_mutation_on_saved_tensors():
                return forward_backward()
        finally:
            _PROTECTED.reset(token)


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, the blocks keep only their inputs and compute again in the backward pass.

    A block's class is swapped for a subclass, so `isinstance` checks hold, its hooks work and its
    `__dict__` is untouched.
    """
    classes = [type(block) for block in blocks]
    try:
        for block in blocks:
            block.__class__ = _recomputing_class(type(block))
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
    skeleton = _take_tensors((args, kwargs), tensors)
    # A block whose inputs need no gradient may hold adapters that do: the switch makes autograd
    # call backward all the same.
    switch = torch.empty(0, requires_grad=True)
    return _Recompute.apply(forward, skeleton, _PROTECTED.get(), switch, *tensors)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        skeleton: Any,
        protected: bool,
        switch: Tensor,
        *tensors: Tensor,
    ) -> Any:
        """`run` without a graph. Protected: on clones, so that nothing outside is written to."""
        ctx.run, ctx.skeleton, ctx.protected = run, skeleton, protected
        ctx.grads = [tensor.requires_grad for tensor in tensors]
        given = [tensor.detach().clone() if protected else tensor.detach() for tensor in tensors]
        versions = [tensor._version for tensor in tensors]
        args, kwargs = _put_tensors(skeleton, iter(given))
        with torch.no_grad():
            outputs = run(*args, **kwargs)
        # save_for_backward takes the version at the end of this function, so it can't tell.
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError(f"an input of a recomputed block was {_IN_PLACE_ERROR}")
        kept = [tensor.detach().clone() for tensor in tensors] if protected else tensors
        ctx.save_for_backward(*kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.grads, strict=True)
        ]
        guard = allow_mutation_on_saved_tensors() if ctx.protected else nullcontext()
        with torch.enable_grad(), guard:
            # A leaf can't be written to in place; its clone can.
            given = [tensor.clone() for tensor in inputs] if ctx.protected else inputs
            args, kwargs = _put_tensors(ctx.skeleton, iter(given))
            outputs = ctx.run(*args, **kwargs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [
                (output, grad)
                for output, grad in zip(outputs, grads, strict=True)
                if isinstance(output, Tensor) and output.requires_grad and grad is not None
            ]
            if pairs:
                torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return (None, None, None, None, *(tensor.grad for tensor in inputs))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a tensor that was taken out of a structure."""


def _take_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with its tensors replaced by places, and appended to `tensors`.

    Looks into lists, tuples and dataclasses, and into dicts that hold tensors needing a gradient;
    other dicts (the host's transformer_options) stay the very same object.
    """
    if isinstance(value, Tensor):
        tensors.append(value.clone() if value.is_inference() else value)
        return _Place()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)([_take_tensors(part, tensors) for part in value])
    if isinstance(value, dict) and any(_needs_gradient(part) for part in value.values()):
        return {name: _take_tensors(part, tensors) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: _take_tensors(getattr(value, name), tensors) for name in names}
        return dataclasses.replace(value, **parts)
    return value


def _put_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if isinstance(value, _Place):
        return next(tensors)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)([_put_tensors(part, tensors) for part in value])
    if isinstance(value, dict) and any(_has_place(part) for part in value.values()):
        return {name: _put_tensors(part, tensors) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: _put_tensors(getattr(value, name), tensors) for name in names}
        )
    return value


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, (list, tuple)):
        return any(_needs_gradient(part) for part in value)
    if isinstance(value, dict):
        return any(_needs_gradient(part) for part in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_needs_gradient(getattr(value, f.name)) for f in dataclasses.fields(value))
    return False


def _has_place(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_place(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_place(part) for part in value)
    return isinstance(value, _Place) or (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and any(_has_place(getattr(value, f.name)) for f in dataclasses.fields(value))
    )
