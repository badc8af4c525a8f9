"""Blending rules, Gram matrices and cosines against dense float64."""

import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.blend import RULES, blend, shares
from lora_weave.lora_core.similarity import NeedsWeight, cosines, gram

STRENGTHS = [0.5, -1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("off", [0.5, -1.0, 0.0, 2.0]),
        ("sum to 1", [1 / 7, -2 / 7, 0.0, 4 / 7]),
        ("max to 1", [0.25, -0.5, 0.0, 1.0]),
        ("rms to 1", [s / (5.25 / 4) ** 0.5 for s in STRENGTHS]),
    ],
)
def test_rules(rule, expected):
    assert blend(STRENGTHS, rule) == pytest.approx(expected)
    assert blend(STRENGTHS, rule, 0.5) == pytest.approx([s / 2 for s in expected])
    assert blend([0.0, 0.0], rule) == [0.0, 0.0]
    assert blend([], rule) == []


def test_equal_energy():
    norms = [1.0, 2.0, 0.0, 4.0]
    found = blend(STRENGTHS, "equal energy", 2.0, norms)
    sizes = [abs(s * norm) for s, norm in zip(found, norms, strict=True)]
    mean = ((1 + 4 + 16) / 3) ** 0.5
    assert sizes == pytest.approx([2 * mean * 0.5, 2 * mean, 0.0, 2 * mean * 2.0])
    assert blend([0.7], "equal energy", 1.0, [5.0]) == pytest.approx([0.7])
    with pytest.raises(ValueError, match="needs the norm"):
        blend(STRENGTHS, "equal energy")


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="unknown weight blending 'most'; known: off, sum to 1"):
        blend([1.0], "most")
    assert set(RULES) == {"off", "sum to 1", "max to 1", "rms to 1", "equal energy"}


def test_shares():
    assert shares([1.0, -3.0, 0.0]) == [0.25, 0.75, 0.0]
    assert shares([0.0]) == [0.0]


SHAPES = {"a": (24, 20), "b": (16, 8, 3, 3), "c": (20, 24)}


def lora(name: str, seed: int, paths=SHAPES):
    made = {}
    for path in paths:
        generator = torch.Generator().manual_seed(seed)
        adapter = ADAPTERS[name].create(SHAPES[path], 4, 3.0, generator=generator)
        for parameter in adapter.parameters():
            parameter.data.normal_(0.0, 0.1, generator=generator)
        made[path] = adapter
    return made


def weight(path: str) -> torch.Tensor:
    return torch.randn(SHAPES[path], generator=torch.Generator().manual_seed(len(path)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_gram_against_dense_float64(name):
    loras = [lora("lora", 0), lora(name, 1), lora(name, 2, ["a", "c"]), lora("full", 3, ["b"])]
    strengths = [lambda path, s=s: s * (0.5 if path == "b" else 1.0) for s in (1.0, -0.7, 2.0, 0.3)]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for path in SHAPES:
        dense = torch.zeros(4, torch.Size(SHAPES[path]).numel(), dtype=torch.float64)
        for index, adapters in enumerate(loras):
            if path in adapters:
                change = adapters[path].delta(weight(path)).detach().double().flatten()
                dense[index] = strengths[index](path) * change
        expected += dense @ dense.t()
    found = gram(loras, strengths, weight)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    sizes = expected.diagonal().sqrt()
    assert torch.allclose(cosines(found), expected / (sizes[:, None] * sizes), atol=1e-5)


def test_loras_are_never_made_dense(monkeypatch):
    kind = ADAPTERS["lora"]

    def refuse(self, weight):
        raise AssertionError("a dense change was built")

    monkeypatch.setattr(kind, "delta", refuse)
    found = gram([lora("lora", 0), lora("lora", 1)], [lambda path: 1.0] * 2)
    assert found.diagonal().min() > 0


def test_types_that_depend_on_the_weight_say_so():
    with pytest.raises(NeedsWeight, match="a: the change of a oft depends on the base weight"):
        gram([lora("oft", 0)], [lambda path: 1.0])


def test_cosines_beside_nothing_are_zero():
    assert cosines(torch.zeros(2, 2).double()).tolist() == [[0, 0], [0, 0]]
