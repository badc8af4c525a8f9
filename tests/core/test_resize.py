"""Changes by fewer directions: numpy's decomposition of the dense change is the optimum."""

import math
import threading
import time

import numpy as np
import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.adapters.bias import Bias
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.merge.in_parallel import each_layer
from lora_weave.lora_core.merge.rank_rule import RankRule
from lora_weave.lora_core.merge.resize import resize
from lora_weave.lora_core.merge.truncation import of_dense, of_factors, of_kronecker
from lora_weave.lora_core.similarity import NeedsWeight

from .layer_kinds import cases, make_layer

ALL = {name: case for name, case in cases().items() if not case.make("linear").needs_weight}
WITH_WEIGHT = sorted(set(cases()) - set(ALL))


def optimum(dense: np.ndarray, rank: int) -> float:
    """The least distance of a matrix of that rank."""
    sizes = np.linalg.svd(dense, compute_uv=False)
    return float(np.sqrt((sizes[rank:] ** 2).sum()))


def assert_best(up, down, dense: torch.Tensor, rank: int) -> None:
    dense = dense.double().flatten(1).numpy()
    found = up.double().flatten(1).numpy() @ down.double().flatten(1).numpy()
    assert up.shape[1] <= rank
    distance = np.linalg.norm(dense - found)
    assert distance <= optimum(dense, rank) + 1e-6 * np.linalg.norm(dense)


@pytest.mark.parametrize("kind", ["linear", "conv2d-3x3"])
@pytest.mark.parametrize("rank", [1, 2, 3, 100])
@pytest.mark.parametrize("name", list(cases()))
def test_the_best_of_each_rank_for_every_type(name, kind, rank):
    adapter = cases()[name].make(kind)
    weight = make_layer(kind).weight.detach()
    resized = resize({"layer": adapter}, RankRule("rank", rank), lambda _: weight)
    lora = resized.adapters["layer"]
    dense = adapter.delta(weight).detach()
    assert_best(lora.up.detach(), lora.down.detach(), dense, rank)
    assert lora.shape == adapter.shape and lora.scale == 1.0
    lost = (dense - lora.delta(weight).detach()).double().norm() / dense.double().norm()
    assert resized.kept["layer"] == pytest.approx(math.sqrt(max(0, 1 - lost**2)), abs=1e-5)


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_a_type_that_depends_on_the_weight_asks_for_it(name):
    adapter = cases()[name].make("linear")
    with pytest.raises(NeedsWeight, match="layer: the change of"):
        resize({"layer": adapter}, RankRule("rank", 2))


def test_changes_of_norms_and_biases_stay():
    bias = Bias.from_tensors({"diff_b": torch.ones(4)}, (4,))
    norm = Full.from_tensors({"diff": torch.ones(4)}, (4,))
    resized = resize({"a": bias, "b": norm}, RankRule("rank", 1))
    assert isinstance(resized.adapters["a"], Bias) and isinstance(resized.adapters["b"], Full)
    assert not resized.kept
    for adapter in resized.adapters.values():
        assert torch.equal(adapter.delta(torch.zeros(4)), torch.ones(4))


SIZES = torch.tensor([8.0, 4, 2, 0.5, 0.25, 0.125, 0, 0])
ENERGY = float(SIZES.square().sum())


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("rank", 3, 3),
        ("rank", 100, 6),  # the others are zero
        ("ratio", 4, 3),  # 8, 4, 2
        ("ratio", 1, 1),
        ("ratio", 3.9, 2),
        ("energy", 64 / ENERGY, 1),  # exactly the first
        ("energy", 64.1 / ENERGY, 2),
        ("energy", 1, 6),
        ("frobenius", 0.8, 1),
        ("frobenius", math.sqrt(80 / ENERGY), 2),
        ("frobenius", math.sqrt(80.1 / ENERGY), 3),
        ("frobenius", 1, 6),
    ],
)
def test_rules(kind, value, kept):
    """No direction more than it takes, and none less."""
    assert RankRule(kind, value).choose(SIZES) == kept
    assert RankRule(kind, value, largest=2).choose(SIZES) == min(kept, 2)


def test_nothing_is_left_of_nothing():
    zeros = torch.zeros(6, 5)
    for kind, value in (("rank", 3), ("energy", 0.9), ("ratio", 2), ("frobenius", 0.5)):
        found = of_dense(zeros, RankRule(kind, value))
        assert found.up.shape == (6, 1) and found.kept == 1.0
        assert not (found.up @ found.down).any() and found.down.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("rank", 0),
        ("rank", 2.5),
        ("energy", 0),
        ("energy", 1.1),
        ("ratio", 0.5),
        ("ratio", math.inf),
    ]
    + [("frobenius", math.nan), ("size", 1)],
)
def test_numbers_that_a_rule_can_not_have(kind, value):
    with pytest.raises(ValueError, match=kind):
        RankRule(kind, value)
    with pytest.raises(ValueError, match="largest rank is 0"):
        RankRule("rank", 1, largest=0)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (96, 96)])
def test_dense_changes(shape):
    """Also where no direction is much larger than the next."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for rank in (2, 8, 30):
        found = of_dense(dense, RankRule("rank", rank))
        assert_best(found.up, found.down, dense, rank)
    every = of_dense(dense, RankRule("energy", 0.9))
    rank = every.up.shape[1]
    assert_best(every.up, every.down, dense, rank)
    sizes = np.linalg.svd(dense.numpy(), compute_uv=False) ** 2
    assert sizes[:rank].sum() / sizes.sum() >= 0.9 > sizes[: rank - 1].sum() / sizes.sum()


def test_a_large_dense_change_by_a_sketch():
    """Within 0.003 % of the best, the same each time, and nobody's random numbers are taken."""
    generator = torch.Generator().manual_seed(4)
    left = torch.linalg.qr(torch.randn((700, 600), generator=generator))[0]
    right = torch.linalg.qr(torch.randn((600, 600), generator=generator))[0]
    dense = left * (0.97 ** torch.arange(600)) @ right
    state = torch.get_rng_state()
    first, again = (of_dense(dense, RankRule("rank", 16)) for _ in range(2))
    assert torch.equal(first.up, again.up) and torch.equal(torch.get_rng_state(), state)
    error = np.linalg.norm(dense.numpy() - (first.up @ first.down).numpy())
    assert error <= optimum(dense.numpy(), 16) * 1.00003
    share = 1 - (error / np.linalg.norm(dense.numpy())) ** 2
    assert first.kept == pytest.approx(math.sqrt(share), abs=1e-4)


def test_factors_of_any_size_and_rank():
    """Also of a rank above the layer's sides, and rows that depend on each other."""
    generator = torch.Generator().manual_seed(2)
    for rows, rank, columns in ((5, 8, 7), (30, 4, 9), (4, 3, 50)):
        up = torch.randn((rows, rank), generator=generator)
        down = torch.randn((rank, columns), generator=generator)
        up[:, 1] = up[:, 0]
        for kept in (1, 2, 5):
            found = of_factors(up, down, RankRule("rank", kept))
            assert_best(found.up, found.down, up @ down, kept)
            ratio = found.up.norm(dim=0) / found.down.norm(dim=1)
            torch.testing.assert_close(ratio, torch.ones_like(ratio))  # √S on both sides


def test_a_kronecker_product_is_never_built():
    """A LoKr of the size of Flux's layers; dense it would take half a minute and 150 MB."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn((16, 16), generator=generator)
    second = torch.randn((768, 192), generator=generator)
    found = of_kronecker(first, second, RankRule("rank", 8))
    sizes = np.linalg.svd(first.numpy(), compute_uv=False)[:, None] * np.linalg.svd(
        second.numpy(), compute_uv=False
    )
    best = np.sort(sizes.ravel())[::-1][:8]
    np.testing.assert_allclose(found.up.norm(dim=0) * found.down.norm(dim=1), best, rtol=1e-5)


def test_progress_is_told_and_may_stop():
    told = []
    made = each_layer(str.upper, ["a", "b", "c"], lambda done, of: told.append((done, of)))
    assert list(made.items()) == [("a", "A"), ("b", "B"), ("c", "C")]
    assert told == [(1, 3), (2, 3), (3, 3)]
    begun = []

    def slow(path: str) -> None:
        begun.append(path)
        time.sleep(0.001)

    def stop(done: int, of: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        each_layer(slow, [str(number) for number in range(1000)], stop)
    assert len(begun) < 1000


def test_threads_started_later_have_all_threads():
    before = torch.get_num_threads()
    each_layer(lambda path: torch.get_num_threads(), ["a", "b"])
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *found] == [before, before]


def test_every_type_is_there():
    assert set(ADAPTERS) <= {case.type.name for case in cases().values()}
