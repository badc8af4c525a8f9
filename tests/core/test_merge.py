"""A stack as one LoRA, against the dense sum in float64."""

import itertools

import numpy as np
import pytest
import torch

from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.blocks import BlockWeights
from lora_weave.lora_core.merge.combine import merge
from lora_weave.lora_core.merge.rank_rule import RankRule
from lora_weave.lora_core.similarity import NeedsWeight
from lora_weave.lora_core.stack import Entry

from .layer_kinds import cases, make_layer

PATH = "diffusion_model.input_blocks.4.1.proj_in"
STRENGTHS = (0.7, -0.4, 1.5)
MIXED = ("lora", "loha", "lokr", "full", "glora", "lora-tucker")
WEIGHT_DEPENDENT = ("lora", "lora+dora", "oft", "ia3")


def random_lora(shape, rank, seed, alpha=None) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    lora = LoRA.create(shape, rank, alpha or 0.5 * rank, generator=generator)
    with torch.no_grad():
        lora.up.normal_(generator=generator)
    return lora


def stack_of(*adapters, path=PATH):
    strengths = itertools.cycle(STRENGTHS)
    return [Entry({path: adapter}, next(strengths), 1.0) for adapter in adapters]


def dense_sum(stack, weight, path=PATH) -> torch.Tensor:
    """As the stack applies them: one after the other, in float64."""
    changed = weight.double()
    for entry in stack:
        delta = entry.adapters[path].double().delta(changed).detach()
        changed = changed + entry.strength(path) * delta.reshape(changed.shape)
        entry.adapters[path].float()
    return changed - weight.double()


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-6) -> None:
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", ["linear", "conv2d-3x3"])
@pytest.mark.parametrize("names", [MIXED, WEIGHT_DEPENDENT, ("lora", "lora", "lora")])
def test_without_a_rule_the_sum_is_exact(names, kind):
    weight = make_layer(kind).weight.detach()
    stack = stack_of(*(cases()[name].make(kind) for name in names))
    (merged,) = merge(stack, None, lambda _: weight).adapters.values()
    assert_same(merged.delta(weight).detach(), dense_sum(stack, weight))


def test_loras_stay_factors_where_that_is_smaller():
    """Of all ranks together, with the scale of each told apart."""
    shape = (40, 30, 3, 3)
    loras = [random_lora(shape, rank, rank) for rank in (2, 3, 5)]
    stack = stack_of(*loras)
    (merged,) = merge(stack).adapters.values()
    assert isinstance(merged, LoRA) and merged.rank == merged.alpha == 10
    assert_same(merged.delta(torch.zeros(shape)).detach(), dense_sum(stack, torch.zeros(shape)))
    ups = sum(s * 0.5 * one.up.detach().sum() for s, one in zip(STRENGTHS, loras, strict=True))
    assert merged.up.detach().sum() == pytest.approx(float(ups), rel=1e-4)
    large = stack_of(*(random_lora((10, 12), 4, seed) for seed in range(3)))
    assert isinstance(merge(large).adapters[PATH], Full)


def test_one_at_strength_1_is_itself():
    lora = random_lora((30, 20), 4, 0)
    (merged,) = merge([Entry({PATH: lora}, 1.0, 0.0)]).adapters.values()
    assert torch.equal(merged.up.detach(), lora.scale * lora.up.detach())
    assert torch.equal(merged.down.detach(), lora.down.detach())


@pytest.mark.parametrize("rank", [4, 12, 16])
def test_the_best_of_a_rank(rank):
    """Numpy's error; of the sum of the ranks nothing is lost, where a clamp would lose 17 %."""
    shape = (96, 160)
    stack = stack_of(*(random_lora(shape, 4, seed) for seed in range(4)))
    dense = dense_sum(stack, torch.zeros(shape)).numpy()
    merged = merge(stack, RankRule("rank", rank))
    found = merged.adapters[PATH].delta(torch.zeros(shape)).detach().double().numpy()
    sizes = np.linalg.svd(dense, compute_uv=False)
    optimum = np.sqrt((sizes[rank:] ** 2).sum())
    assert abs(np.linalg.norm(found - dense) - optimum) <= 1e-6 * np.linalg.norm(dense)
    assert merged.adapters[PATH].rank == rank
    kept = np.sqrt((sizes[:rank] ** 2).sum()) / np.linalg.norm(dense)
    assert merged.kept[PATH] == pytest.approx(kept, abs=1e-6)


def test_known_mistakes_of_other_tools_are_not_made():
    """A ratio on both factors, cross terms, and the alpha of the first for the sum of the ranks."""
    shape = (24, 20)
    first, second = random_lora(shape, 2, 1, alpha=2.0), random_lora(shape, 2, 2, alpha=1.0)
    zeros = torch.zeros(shape)
    one, two = (lora.delta(zeros).detach() for lora in (first, second))

    def merged(strengths) -> torch.Tensor:
        entries = [
            Entry({PATH: lora}, strength, 1.0)
            for lora, strength in zip((first, second), strengths, strict=True)
        ]
        return merge(entries).adapters[PATH].delta(zeros).detach()

    half = merged((0.5, 0.0))
    torch.testing.assert_close(half, 0.5 * one)
    projection = (half * one).sum() / one.square().sum()
    assert projection == pytest.approx(0.5, abs=1e-6)  # both factors scaled give 0.25
    torch.testing.assert_close(merged((0.7, 0.4)), 0.7 * one + 0.4 * two)
    ups, downs = first.up + second.up, first.down + second.down
    crossed = 0.7 * (ups @ downs).detach()
    assert (crossed - merged((0.7, 0.4))).norm() > 0.3 * crossed.norm()
    torch.testing.assert_close(merged((1.0, 1.0)), one + two)


def test_order_does_not_matter_for_types_that_do_not_need_the_weight():
    shape = (30, 20)
    stack = stack_of(*(random_lora(shape, rank, rank) for rank in (1, 2, 3)))
    zeros = torch.zeros(shape)
    wanted = merge(stack, RankRule("rank", 3)).adapters[PATH].delta(zeros)
    for other in itertools.permutations(stack):
        found = merge(other, RankRule("rank", 3)).adapters[PATH].delta(zeros)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_strengths_of_blocks_and_of_text_encoders():
    shape = (30, 20)
    lora, clip = random_lora(shape, 2, 1), random_lora(shape, 2, 2)
    text = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    blocks = BlockWeights.parse({"IN04": 0.5})
    entry = Entry({PATH: lora, text: clip}, 0.8, -0.3, blocks)
    merged = merge([entry, Entry({PATH: lora}, 0.0, 1.0)]).adapters
    zeros = torch.zeros(shape)
    torch.testing.assert_close(merged[PATH].delta(zeros), 0.4 * lora.delta(zeros))
    torch.testing.assert_close(merged[text].delta(zeros), -0.3 * clip.delta(zeros))


def test_problems_are_told_at_once():
    loras = [random_lora(shape, 2, 1) for shape in ((30, 20), (20, 30))]
    stack = [Entry({PATH: lora, f"{PATH}.other": lora}, 1.0, 1.0) for lora in loras]
    with pytest.raises(ValueError, match=r"different models") as raised:
        merge(stack)
    assert str(raised.value).count("(30, 20) and (20, 30)") == 2
    with pytest.raises(NeedsWeight, match=f"{PATH}: the change of a oft"):
        merge(stack_of(cases()["oft"].make("linear")), RankRule("rank", 1))
