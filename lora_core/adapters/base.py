"""What every adapter type is.

Letters in shapes: O out, I in, R rank, B batch, T tokens, K kernel (one size per spatial axis).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .add_change import add_dense, factors_are_cheaper
from .create_options import DEFAULT, CreateOptions
from .layer import Layer
from .low_rank import add_low_rank

Axes = Mapping[str, tuple[int, int]]  # see `Adapter.row_axes`


class Built(NamedTuple):
    """A dense ΔW, and the norms that a DoRA divided by to make it: its gradients need them."""

    change: Tensor
    norm: Tensor | None = None


class Adapter(nn.Module, abc.ABC):
    """A small trained change ΔW of one layer's frozen weight W.

    Class attributes say how a file names it: `forms` are the sets of tensors, without the layer's
    prefix, of which one has to be there, `optional` those that may be, `has_alpha` tells that
    "alpha" belongs to them. It scales the change by alpha / rank, unless `alpha_scales` says no.
    `trains_bias`: who trains the type trains the biases of its layers, too, each as a `Bias`.
    `help` is what the training node says of it.

    A type has to give `create`, `from_tensors`, `tensors` and `delta`. That is enough to train it:
    `forward` then takes the cheaper of `factors()` and the dense ΔW. A type that knows a better
    way has an `add` or a `forward` of its own.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    forms: ClassVar[tuple[frozenset[str], ...]]
    optional: ClassVar[frozenset[str]] = frozenset()
    has_alpha: ClassVar[bool] = True
    alpha_scales: ClassVar[bool] = True
    trains_bias: ClassVar[bool] = False

    shape: tuple[int, ...]
    rank: int
    alpha: float
    rank_mask: Tensor | None = None  # (R,), what rank dropout leaves of each rank in this step
    is_dropped: bool = False  # module dropout leaves the layer without its change in this step
    _dense: tuple[object, Built] | None = None  # what `dense` gave, and for which numbers

    @classmethod
    def names(cls) -> frozenset[str]:
        """All tensor names that the type knows, "alpha" included where it has one."""
        alpha = frozenset({"alpha"} if cls.has_alpha else ())
        return cls.optional.union(alpha, *cls.forms)

    @classmethod
    def accepts(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether tensors of these names and shapes are of this type."""
        return any(form <= shapes.keys() for form in cls.forms)

    @classmethod
    @abc.abstractmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """A new adapter for a weight of `shape`, whose ΔW is zero. float32, on the CPU.

        Raises ValueError for a shape or rank that the type can't hold.
        """

    @classmethod
    @abc.abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Adapter:
        """The adapter that a file holds for a layer of `shape`; named as in `forms`.

        Raises ValueError naming every tensor that does not fit, found and expected.
        """

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The named tensors of a file, "alpha" included, detached; the inverse of from_tensors."""

    @abc.abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in `weight`'s shape, alpha / rank included, in the adapter's own dtype.

        `weight` is W in that dtype where `needs_weight`; else only its shape counts.
        """

    @property
    def needs_weight(self) -> bool:
        """Whether ΔW depends on W, not on the adapter alone."""
        return False

    @property
    def acts_on_output(self) -> bool:
        """Whether `forward` changes `base_out` by itself and makes nothing of `x`.

        Several of them on one layer follow one another, where other types' changes add up.
        """
        return False

    def members(self) -> Sequence[Adapter]:
        """The adapters that it is made of: itself, or one for each of several runs of rows."""
        return (self,)

    def row_axes(self) -> Axes | None:
        """{tensor's name: (its axis along the layer's rows, rows for one step on it)}.

        Cut there, and with all other tensors as they are, it is an adapter of those rows with
        their part of ΔW. None where rows have no adapter of the type for themselves.
        """
        return None

    @property
    def needs_all_rows(self) -> bool:
        """Whether zeros on all of `row_axes` still change a row."""
        return False

    def built(self, weight: Tensor) -> Built:
        """`delta(weight)`, with what `delta_gradients` wants to know of its making."""
        return Built(self.delta(weight))

    def delta_gradients(
        self, weight: Tensor, grad: Tensor, built: Built
    ) -> tuple[Tensor | None, ...]:
        """The parameters' gradients, in their order, `grad` being that of ΔW, `built(weight)`.

        Here through `delta`, which builds ΔW again; a type with a closed form spares that.
        """
        with torch.enable_grad():
            change = self.delta(weight)
        return self.gradients_through([change], [grad])

    def gradients_through(
        self, made: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The parameters' gradients, in their order, by those of what is `made` of them."""
        return torch.autograd.grad(made, list(self.parameters()), grads, allow_unused=True)

    def weight_of(self, layer: Layer) -> Tensor:
        """What `delta` wants: W in the adapter's dtype, or where it is not needed its shape."""
        first = next(self.parameters())
        if self.needs_weight:
            return layer.weight().to(first.device, first.dtype)
        return first.new_empty(()).expand(layer.shape)

    @torch.no_grad()
    def dense(self, layer: Layer, dtype: torch.dtype) -> Built:
        """ΔW for a layer in `dtype`, kept until a parameter's version changes or `forget_dense`."""
        versions = [(p.data_ptr(), p._version) for p in self.parameters()]
        state = (layer, dtype, versions, id(self.rank_mask))
        if self._dense is None or self._dense[0] != state:
            change, norm = self.built(self.weight_of(layer))
            self._dense = (state, Built(change.to(dtype), norm))
        return self._dense[1]

    def last_factors(self) -> list[nn.Parameter]:
        """The parameters that start at zero and in which ΔW is linear (B of a LoRA); [] without.

        LoRA+ has a learning rate of its own for them, and a limit of the norm scales them.
        """
        return []

    def masked(self, factor: Tensor) -> Tensor:
        """A factor whose first axis is the rank, with `rank_mask` on it."""
        if self.rank_mask is None:
            return factor
        return factor * self.rank_mask.to(factor.dtype).view(-1, *[1] * (factor.ndim - 1))

    def forget_dense(self) -> None:
        """Drop what is kept of the parameters' values, to be built anew at the next `dense`.

        Versions alone do not tell that they changed: a fused optimizer writes without counting.
        """
        self._dense = None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(U, V) with ΔW.flatten(1) = U @ V exactly, or None where the type has no such form."""
        return None

    def scaled_factors(self) -> tuple[float, Tensor, Tensor]:
        """(s, U, V) with ΔW.flatten(1) = s · U @ V, without copies where the type can do so.

        Only for adapters that have `factors()`.
        """
        found = self.factors()
        assert found is not None, f"{self.name} has no factors"
        return 1.0, *found

    @property
    def factored_rank(self) -> int | None:
        """The number of columns of U, without computing it; None where `factors()` is None."""
        return None

    def is_factored(self, layer: Layer, base_out: Tensor) -> bool:
        """Whether `add` is there and takes fewer multiplications than a dense ΔW."""
        rank = self.factored_rank
        return rank is not None and factors_are_cheaper(rank, self.rank, layer, base_out)

    def add(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """`base_out` plus ΔW applied to `x`, without a dense ΔW. May write into `base_out`."""
        factors = self.factors()
        assert factors is not None, f"{self.name} has a factored rank and no factors"
        up, down = factors
        return add_low_rank(x, base_out, down, up, 1.0, layer)

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """`base_out` plus the change applied to `x`. May write into `base_out` in place."""
        if self.is_factored(layer, base_out):
            return self.add(x, base_out, layer)
        return add_dense(self, x, base_out, layer)
