"""A change by its factors or as a dense ΔW: the same numbers, and the cheaper way is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import ADAPTERS, Adapter
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.dora import Decomposable
from lora_weave.lora_core.adapters.lora import LoRA

from .layer_kinds import ALPHA, KINDS, Case, cases, facts, fill, make_input, make_layer, run
from .rows import Rows

Close = Callable[..., None]
every_kind = pytest.mark.parametrize("kind", list(KINDS))


class FactoredRows(Rows):
    """A type with factors and nothing else: what `Adapter` itself makes of them."""

    def factors(self) -> tuple[Tensor, Tensor]:
        columns = self.delta(torch.empty(self.shape)).flatten(1).shape[1]
        ones = torch.ones(1, columns, dtype=self.values.dtype)
        return self.alpha * self.values[:, None], ones

    @property
    def factored_rank(self) -> int:
        return 1


def made(case: Case, kind: str) -> Adapter:
    return case.make(kind).double()


def factored_rows(kind: str) -> Adapter:
    adapter = FactoredRows.create(tuple(make_layer(kind).weight.shape), 1, ALPHA)
    fill(adapter, torch.Generator().manual_seed(3))
    return adapter.double()


def at_principal(kind: str) -> Adapter:
    """A LoRA that began at W's strongest directions, and was trained a little."""
    weight = make_layer(kind, torch.float64).weight
    lora = LoRA.create(tuple(weight.shape), 2, ALPHA).double()
    lora.begin_at_principal(weight)
    lora = lora.double()
    with torch.no_grad():
        for parameter in lora.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
            parameter.add_(0.3 * noise)
    return lora


def with_dropped_ranks(case: Case, kind: str) -> Adapter:
    adapter = made(case, kind)
    adapter.rank_mask = torch.tensor([0.0, *[2.0] * (adapter.rank - 1)])
    return adapter


def has_both(adapter: Adapter) -> bool:
    """Whether the type has an `add` beside its dense ΔW; DoRA on columns has none."""
    has_own = type(adapter).add is not Adapter.add
    return has_own or adapter.factored_rank is not None


BOTH: dict[str, Callable[[str], Adapter]] = {
    name: lambda kind, case=case: made(case, kind)
    for name, case in cases().items()
    if has_both(case.make("linear"))
} | {
    "rows": factored_rows,
    "pissa": at_principal,
    **{
        f"{name}-dropped": lambda kind, case=case: with_dropped_ranks(case, kind)
        for name, case in cases().items()
        if name in ("lora", "lora-tucker", "loha", "lora+dora")
    },
}


@contextmanager
def forced(kind: type[Adapter], factored: bool) -> Iterator[list[Adapter]]:
    """While it lasts all of the type take one path; yields those that asked for a dense ΔW."""
    asked: list[Adapter] = []
    dense = Adapter.dense

    def noted(self: Adapter, *args: object) -> Tensor:
        asked.append(self)
        return dense(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "is_factored", lambda *_: factored)
        patch.setattr(Adapter, "dense", noted)
        yield asked


@every_kind
@pytest.mark.parametrize("name", BOTH)
def test_both_ways_give_the_same(name: str, kind: str, assert_close: Close) -> None:
    """The output and the gradients of the input and of every parameter."""
    found = []
    for factored in (True, False):
        layer, adapter = make_layer(kind, torch.float64), BOTH[name](kind)
        x = make_input(kind, torch.float64).requires_grad_()
        with forced(type(adapter), factored) as asked:
            out = run(layer, adapter, x)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
            out.backward(grad.double())
        assert bool(asked) != factored
        parameters = [parameter.grad.flatten() for parameter in adapter.parameters()]
        found.append((out, x.grad, torch.cat(parameters)))
    for by_factors, dense in zip(*found, strict=True):
        assert_close(dense, by_factors, torch.float64)


def test_the_types_with_both_are_known() -> None:
    """Else the tests here would pass over a type whose `add` went missing."""
    known = {name.partition("-")[0].partition("+")[0] for name in BOTH}
    assert known == {"lora", "loha", "lokr", "glora", "rows", "pissa"}
    assert all(issubclass(ADAPTERS[name], Decomposable) for name in ("lora", "loha", "lokr"))


SQUARE, CONV = (320, 320), (320, 320, 3, 3)
# (type, rank, options, the layer's shape, positions, whether factors are cheaper): the numbers of
# multiplications on either side of `is_cheaper`, in millions, factors first.
ROWS = [
    ("lora", 64, {}, SQUARE, 4096, True),  # 168 < 426
    ("lora", 166, {}, SQUARE, 4096, True),  # 435 < 436
    ("lora", 167, {}, SQUARE, 4096, False),  # 438 > 437
    ("lora", 320, {}, SQUARE, 319, True),  # 65.3 < 65.4
    ("lora", 320, {}, SQUARE, 320, False),  # 65.5 = 65.5
    ("lora", 309, {}, CONV, 4096, True),  # 4050 < 4060
    ("lora", 310, {}, CONV, 4096, False),  # 4063 > 4061
    ("lora", 167, {"tucker": True}, SQUARE, 4096, False),  # no kernel, so no core
    ("lora", 309, {"tucker": True}, CONV, 4096, True),  # 4330 < 4335
    ("lora", 310, {"tucker": True}, CONV, 4096, False),  # 4355 > 4337
    ("glora", 83, {}, SQUARE, 4096, True),  # 435 < 436
    ("glora", 84, {}, SQUARE, 4096, False),  # 440 > 437
    ("glora", 154, {}, CONV, 4096, True),  # 4037 < 4059
    ("glora", 155, {}, CONV, 4096, False),  # 4063 > 4061
    ("loha", 8, {}, SQUARE, 4096, True),  # 168 < 420
    ("loha", 12, {}, SQUARE, 4096, True),  # 377 < 421
    ("loha", 13, {}, SQUARE, 4096, False),  # 443 > 421
    ("loha", 13, {}, SQUARE, 180, True),  # 19.5 < 19.8
    ("loha", 13, {}, SQUARE, 240, False),  # 26.0 > 25.9
    ("loha", 16, {}, CONV, 1024, True),  # 839 < 958
    ("loha", 18, {}, CONV, 1024, False),  # 1062 > 960
    ("lokr", 400, {}, SQUARE, 4096, True),  # blocks 16 x 16 and 20 x 20: 47 < 420
    ("lokr", 400, {"factor": 1}, SQUARE, 319, True),  # a w2 as large as W: 32.77 < 32.77
    ("lokr", 400, {"factor": 1}, SQUARE, 320, False),  # 32.87 = 32.87
    ("lokr", 8, {"factor": 1}, SQUARE, 4096, True),  # 21 < 420
    ("lokr", 400, {}, (317, 320), 19, True),  # blocks 1 x 16 and 317 x 20: 2.024 < 2.029
    ("lokr", 400, {}, (317, 320), 20, False),  # 2.130 = 2.130
]


def test_pissa_counts_what_it_began_at() -> None:
    """Its change is of twice the rank that is trained."""
    generator = torch.Generator().manual_seed(0)
    for rank, factored in ((83, True), (84, False)):
        lora = LoRA.create(SQUARE, rank, 1.0)
        lora.begin_at_principal(torch.randn(SQUARE, generator=generator))
        assert lora.is_factored(facts(nn.Linear(320, 320)), torch.empty(4096, 320)) == factored


@pytest.mark.parametrize(("name", "rank", "options", "shape", "positions", "factored"), ROWS)
def test_the_cheaper_way_is_taken(
    name: str,
    rank: int,
    options: dict[str, int],
    shape: tuple[int, ...],
    positions: int,
    factored: bool,
) -> None:
    adapter = ADAPTERS[name].create(shape, rank, 1.0, options=CreateOptions(**options))
    layer = nn.Linear(*reversed(shape)) if len(shape) == 2 else nn.Conv2d(*shape[1::-1], shape[2:])
    size = (positions, shape[0]) if len(shape) == 2 else (2, shape[0], positions // 2, 1)
    assert adapter.is_factored(facts(layer), torch.empty(size)) == factored
