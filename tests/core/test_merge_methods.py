"""Each way to merge against its formula, written out on dense float64 arrays, and PEFT's."""

import math

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lora_weave.lora_core.adapters import Bias
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.blocks import BlockWeights
from lora_weave.lora_core.merge.combine import merge
from lora_weave.lora_core.merge.methods import METHODS
from lora_weave.lora_core.merge.methods.pruning import kth_largest
from lora_weave.lora_core.merge.rank_rule import RankRule
from lora_weave.lora_core.stack import Entry

PATH = "diffusion_model.input_blocks.4.1.proj_in"
SHAPE = (24, 40)
STRENGTHS = (0.7, -0.4, 1.5)
RANDOM = ("DARE", "DARE TIES", "DELLA")


def loras(count: int, rank: int = 3, shape=SHAPE) -> list[LoRA]:
    """Not orthogonal to each other: they share a part."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn((shape[0], rank), generator=generator)
    made = []
    for number in range(count):
        up = shared + torch.randn((shape[0], rank), generator=generator)
        down = torch.randn((rank, shape[1]), generator=generator)
        made.append(LoRA(up, down + 0.1 * number, 0.5 * rank, shape, None))
    return made


def dense_of(adapter) -> np.ndarray:
    return adapter.delta(torch.zeros(adapter.shape)).detach().double().numpy()


def merged(name, adapters, strengths=STRENGTHS, rule=None, seed=0, **given) -> np.ndarray:
    stack = [Entry({PATH: one}, s, 1.0) for one, s in zip(adapters, strengths, strict=True)]
    found = merge(stack, rule, method=METHODS[name](**given), seed=seed)
    return dense_of(found.adapters[PATH])


def close(found, expected, tolerance=1e-5) -> None:
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# --- methods by inner products


def slerp(first, second, share) -> np.ndarray:
    cosine = (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = math.acos(cosine)
    parts = math.sin((1 - share) * angle) * first + math.sin(share * angle) * second
    return parts / math.sin(angle)


def karcher(changes, shares) -> np.ndarray:
    """By gradient descent on the sphere, not by anybody's formula: the mean's defining property."""
    norms = [np.linalg.norm(change) for change in changes]
    units = [change / norm for change, norm in zip(changes, norms, strict=True)]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    for _ in range(2000):
        mean /= np.linalg.norm(mean)
        pull = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            angle = math.acos(min(1.0, (mean * unit).sum()))
            tangent = unit - (mean * unit).sum() * mean
            pull += share * angle * tangent / max(np.linalg.norm(tangent), 1e-30)
        mean = mean + 0.2 * pull
    mean /= np.linalg.norm(mean)
    return sum(share * norm for share, norm in zip(shares, norms, strict=True)) * mean


@pytest.mark.parametrize("name", ["SLERP", "NuSLERP"])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.2, 0.6), (0.5, -0.5), (1.0, 0.0)])
def test_slerp(name, strengths):
    adapters = loras(2)
    first, second = map(dense_of, adapters)
    share = abs(strengths[1]) / (abs(strengths[0]) + abs(strengths[1]))
    expected = slerp(first, math.copysign(1.0, strengths[1]) * second, share)
    close(merged(name, adapters, strengths), expected)


def test_slerp_of_nearly_equal_changes():
    """A line from |cos| > 0.9995 on; NuSLERP stays on the arc."""
    (first,) = loras(1)
    second = LoRA(2.0 * first.up.detach(), first.down.detach() + 0.01, 1.5, SHAPE, None)
    one, other = dense_of(first), dense_of(second)
    cosine = (one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other))
    assert 0.9995 < cosine < 1
    close(merged("SLERP", [first, second], (1, 3)), 0.25 * one + 0.75 * other)
    close(merged("NuSLERP", [first, second], (1, 3)), slerp(one, other, 0.75), 1e-4)
    close(merged("NuSLERP", [first, first], (1, 3)), one)


def test_slerp_takes_two():
    for name in ("SLERP", "NuSLERP"):
        with pytest.raises(ValueError, match=f"{name} merges 2 LoRAs, there are 3"):
            merged(name, loras(3))


@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.2, 0.5, 1.3), (1.0, -1.0, 0.5)])
def test_karcher_mean(strengths):
    adapters = loras(3)
    shares = [abs(s) / sum(map(abs, strengths)) for s in strengths]
    turned = [math.copysign(1, s) * dense_of(a) for s, a in zip(strengths, adapters, strict=True)]
    close(merged("Karcher mean", adapters, strengths), karcher(turned, shares), 1e-4)


def test_karcher_mean_of_two_is_half_the_arc():
    adapters = loras(2)
    first, second = (dense / np.linalg.norm(dense) for dense in map(dense_of, adapters))
    length = sum(np.linalg.norm(dense_of(one)) for one in adapters) / 2
    close(merged("Karcher mean", adapters, (1, 1)), length * slerp(first, second, 0.5))


@pytest.mark.parametrize("name", ["sum", "normalised", "SLERP", "NuSLERP", "Karcher mean"])
def test_these_stay_in_factors(name, monkeypatch):
    """Nothing dense is made of any of them."""
    monkeypatch.setattr(LoRA, "delta", None)
    adapters = loras(2)
    stack = [Entry({PATH: one}, 1.0, 1.0) for one in adapters]
    found = merge(stack, method=METHODS[name]()).adapters[PATH]
    assert isinstance(found, LoRA) and found.rank == 6


# --- methods by element


def trimmed(change, density) -> np.ndarray:
    """The k largest elements, by sorting."""
    kept = np.zeros_like(change).ravel()
    order = np.argsort(-np.abs(change).ravel(), kind="stable")[: int(density * change.size)]
    kept[order] = change.ravel()[order]
    return kept.reshape(change.shape)


def elected(weighted) -> np.ndarray:
    total = np.sum(weighted, axis=0)
    sign = np.where(total >= 0, 1, -1)
    return np.sign(weighted) == sign


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_magnitude_prune(density):
    adapters = loras(3)
    expected = sum(
        s * trimmed(dense_of(one), density) for s, one in zip(STRENGTHS, adapters, strict=True)
    )
    close(merged("magnitude prune", adapters, density=density), expected)
    tensors = [torch.tensor(dense_of(one)) for one in adapters]
    peft = merge_utils.magnitude_prune(tensors, torch.tensor(STRENGTHS).double(), density)
    close(merged("magnitude prune", adapters, density=density), peft.numpy())


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), STRENGTHS])
def test_ties(density, strengths):
    adapters = loras(3)
    kept = np.stack([trimmed(dense_of(one), density) for one in adapters])
    weighted = kept * np.array(strengths)[:, None, None]
    agree = elected(weighted)
    counted = (agree * np.abs(strengths)[:, None, None]).sum(0)
    expected = (weighted * agree).sum(0) / np.where(counted > 0, counted, 1)
    found = merged("TIES", adapters, strengths, density=density)
    close(found, expected)
    if strengths == (1.0, 1.0, 1.0):
        tensors = [torch.tensor(dense_of(one)) for one in adapters]
        peft = merge_utils.ties(tensors, torch.ones(3).double(), density, "total")
        close(found, peft.numpy())


def test_a_negative_strength_subtracts_in_ties():
    """Divided by the strengths, not their sizes, it would be added."""
    (lora,) = loras(1)
    close(merged("TIES", [lora], (-0.5,), density=1.0), -dense_of(lora))


@pytest.mark.parametrize("name", ["DARE", "DARE TIES", "DELLA"])
def test_random_methods_keep_the_mean(name):
    """Over many draws; of one LoRA there is nothing to elect."""
    (lora,) = loras(1)
    dense = dense_of(lora)
    draws = [merged(name, [lora], (1.0,), seed=seed, density=0.4) for seed in range(600)]
    assert np.linalg.norm(np.mean(draws, axis=0) - dense) < 0.08 * np.linalg.norm(dense)
    shares = [np.count_nonzero(draw) / draw.size for draw in draws[:50]]
    assert np.mean(shares) == pytest.approx(0.4, abs=0.02)
    if name != "DELLA":
        kept = draws[0] != 0
        np.testing.assert_allclose(draws[0][kept], dense[kept] / 0.4, rtol=1e-5)


def test_dare_of_all_is_the_sum():
    adapters = loras(3)
    expected = sum(s * dense_of(one) for s, one in zip(STRENGTHS, adapters, strict=True))
    close(merged("DARE", adapters, density=1.0), expected)
    weighted = np.stack([s * dense_of(a) for s, a in zip(STRENGTHS, adapters, strict=True)])
    agreeing = (weighted * elected(weighted)).sum(0)
    close(merged("DARE TIES", adapters, density=1.0), agreeing)
    close(merged("DELLA", adapters, density=1.0), agreeing)


def test_della_keeps_large_elements_more_often():
    (lora,) = loras(1)
    dense = np.abs(dense_of(lora))
    draws = [merged("DELLA", [lora], (1.0,), seed=s, density=0.5, epsilon=0.4) for s in range(400)]
    often = np.mean([draw != 0 for draw in draws], axis=0)
    ranks = dense.argsort(1).argsort(1) / (dense.shape[1] - 1)
    assert np.abs(often - (0.1 + 0.8 * ranks)).mean() < 0.03


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_gives_the_same_whatever_else_is_merged(name, seed):
    adapters = loras(2)
    alone = merged(name, adapters, (1, 1), seed=seed)
    stack = [Entry({"a": one, PATH: one, "b": one}, 1.0, 1.0) for one in adapters]
    beside = merge(stack, method=METHODS[name](), seed=seed).adapters
    assert np.array_equal(dense_of(beside[PATH]), alone)
    assert not np.array_equal(dense_of(beside["a"]), alone)
    assert not np.array_equal(merged(name, adapters, (1, 1), seed=seed + 2), alone)


def test_breadcrumbs():
    """Neither the 5 % largest nor what is below the share kept."""
    (lora,) = loras(1)
    dense = dense_of(lora)
    found = merged("breadcrumbs", [lora], (1.0,), density=0.5, gamma=0.05)
    order = np.argsort(-np.abs(dense).ravel())
    left = np.zeros(dense.size)
    places = order[int(0.05 * dense.size) : int(0.05 * dense.size) + int(0.5 * dense.size)]
    left[places] = dense.ravel()[places]
    close(found, left.reshape(dense.shape))
    full = merged("breadcrumbs", [lora], (1.0,), density=1.0, gamma=0.05)
    close(full, dense)


def test_sce():
    adapters = loras(3)
    changes = np.stack([s * dense_of(a) for s, a in zip(STRENGTHS, adapters, strict=True)])
    variance = changes.var(0)
    kept = np.zeros(variance.size)
    kept[np.argsort(-variance.ravel())[: int(0.3 * variance.size)]] = 1
    changes = changes * kept.reshape(variance.shape)
    energy = (changes**2).mean((1, 2))
    weights = (energy / energy.sum())[:, None, None] * elected(changes)
    expected = (weights * changes).sum(0) / np.maximum(weights.sum(0), 1e-30)
    close(merged("SCE", adapters, density=0.3), expected)


# --- all of them


@pytest.mark.parametrize("name", list(METHODS))
def test_one_at_strength_1_is_itself(name):
    given = {"density": 1.0} if "density" in METHODS[name].parameters else {}
    (lora,) = loras(1)
    close(merged(name, [lora], (1.0,), **given), dense_of(lora))


@pytest.mark.parametrize("name", list(METHODS))
def test_a_rank_gives_the_best_of_the_exact_result(name):
    count = METHODS[name].most or 3
    exact = merged(name, loras(count), STRENGTHS[:count])
    found = merged(name, loras(count), STRENGTHS[:count], RankRule("rank", 2))
    sizes = np.linalg.svd(exact, compute_uv=False)
    optimum = np.sqrt((sizes[2:] ** 2).sum())
    assert np.linalg.norm(found - exact) <= optimum + 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(RANDOM)))
def test_order_does_not_matter(name):
    count = METHODS[name].most or 3
    adapters, strengths = loras(count), (0.7, 0.4, 1.5)[:count]
    close(merged(name, adapters[::-1], strengths[::-1]), merged(name, adapters, strengths))


@pytest.mark.parametrize("name", list(METHODS))
def test_layers_that_one_lora_lacks_norms_biases_and_blocks(name):
    """What is not there counts as no change; a block weight scales a LoRA's change."""
    first, second = loras(2)
    norm = Full(torch.arange(1.0, 7.0))
    bias = Bias(torch.arange(1.0, 7.0))
    whole = {PATH: first, "norm": norm, "bias": bias}
    stack = [Entry(whole, 1.0, 1.0, BlockWeights.parse({"IN04": 0.5})), Entry({PATH: second}, 1, 1)]
    found = merge(stack, method=METHODS[name](), seed=3).adapters
    assert isinstance(found["norm"], Full) and isinstance(found["bias"], Bias)
    assert all(
        adapter.delta(torch.zeros(6)).isfinite().all() for adapter in list(found.values())[1:]
    )
    halved = LoRA(0.5 * first.up.detach(), first.down.detach(), first.alpha, SHAPE, None)
    close(dense_of(found[PATH]), merged(name, [halved, second], (1, 1), seed=3))
    if name == "normalised":
        assert torch.equal(found["norm"].delta(torch.zeros(6)), 0.5 * norm.diff)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("TIES", {"density": 1.5}, "density is 1.5, expected 0 to 1"),
        ("sum", {"density": 0.5}, "sum has no density"),
        ("DELLA", {"density": 0.1, "epsilon": 0.2}, "difference has to be above 0"),
        ("SCE", {"density": math.nan}, "density is nan"),
    ],
)
def test_parameters_out_of_range(name, given, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](**given)


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 70000])
def test_the_kth_largest(size):
    generator = torch.Generator().manual_seed(size)
    sizes = torch.randn(size, generator=generator).abs()
    sizes[: size // 3] = sizes[-1]  # some alike
    sizes[size // 2 :: 5] = 0.0
    ordered = sizes.sort(descending=True).values
    for count in {1, 2, size // 2 + 1, size}:
        if count <= size:
            assert kth_largest(sizes, count) == ordered[count - 1]
