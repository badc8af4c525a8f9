"""The adapters of a training as the node asks for them, on real models in this process."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.host.models import unet_layers
from lora_weave.lora_core.training.config import ResolvedConfig, TrainConfig, TrainOptions
from lora_weave.nodes.training_adapters import begin_adapters, new_adapters, unfit_options

from .families import build

SHAPES = {"a": (8, 6), "b": (8, 6, 3, 3)}


def config(algorithm: str = "lora", **options: object) -> ResolvedConfig:
    train = TrainConfig(algorithm=algorithm, rank=4, alpha=2.0)
    return ResolvedConfig(train=train, options=TrainOptions(**options))


@pytest.mark.parametrize("algorithm", ADAPTERS)
def test_every_type_is_made_on_every_layer_of_a_model(algorithm):
    shapes = unet_layers(build("SD1.5")).shapes()
    made = new_adapters(config(algorithm), shapes)
    assert list(made) == list(shapes)
    assert all(type(adapter) is ADAPTERS[algorithm] for adapter in made.values())


def test_rslora_is_written_into_alpha():
    for adapter in new_adapters(config(rslora=True), SHAPES).values():
        assert adapter.alpha == 2.0 * math.sqrt(4)
        assert adapter.scale == pytest.approx(2.0 / math.sqrt(4))


def test_options_of_the_types():
    tucker = new_adapters(config(tucker=True), SHAPES)
    assert [adapter.mid is not None for adapter in tucker.values()] == [False, True]
    lokr = new_adapters(config("lokr", lokr_factor=2), SHAPES)
    assert all(adapter.parts["lokr_w1"].shape == (2, 2) for adapter in lokr.values())


def test_the_start_of_a_layer_does_not_depend_on_the_other_layers():
    both, one = new_adapters(config(), SHAPES), new_adapters(config(), {"b": SHAPES["b"]})
    assert torch.equal(both["b"].down, one["b"].down)


@pytest.mark.parametrize(
    ("algorithm", "options", "said"),
    [
        (
            "full",
            {"dora": True},
            ["dora works with lora, loha and lokr only, the algorithm is full"],
        ),
        ("full", {"max_norm": 1.0}, ["max_norm works with lora, loha and lokr only"]),
        ("loha", {"lokr_factor": 8}, ["lokr_factor works with lokr only, the algorithm is loha"]),
        ("lora", {"decompose_both": True}, ["decompose_both works with lokr only"]),
        ("loha", {"initialisation": "pissa"}, ["initialisation pissa works with lora only"]),
        (
            "lora",
            {"initialisation": "pissa", "dora": True, "rank_dropout": 0.1},
            ["pissa does not go with dora", "pissa does not go with rank_dropout"],
        ),
    ],
)
def test_options_that_do_not_fit_are_told_together(algorithm, options, said):
    problems = "; ".join(unfit_options(config(algorithm, **options)))
    assert all(part in problems for part in said)
    with pytest.raises(ValueError, match=said[0]):
        new_adapters(config(algorithm, **options), SHAPES)


def test_layers_that_can_not_hold_a_type_are_named(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no way")

    monkeypatch.setattr(ADAPTERS["lora"], "create", refuse)
    with pytest.raises(ValueError, match="a: no way; b: no way"):
        new_adapters(config(), SHAPES)


@pytest.mark.parametrize("options", [{"dora": True}, {"initialisation": "pissa"}], ids=str)
def test_adapters_begin_at_the_weight_that_is_loaded(options):
    model = build("SD1.5")
    layers = unet_layers(model)
    made = new_adapters(config(**options), layers.shapes())
    begin_adapters(made, frozenset(made), layers.facts, config(**options).options)
    for path, adapter in made.items():
        weight = layers.facts[path].weight().detach()
        assert adapter.delta(weight).abs().max() <= 1e-6 * weight.abs().max()
        if adapter.magnitude is not None:
            norms = weight.flatten(1).norm(dim=1)
            torch.testing.assert_close(adapter.magnitude.flatten(), norms)


def test_adapters_that_go_on_are_left_as_they_are():
    layers = unet_layers(build("SD1.5"))
    made = new_adapters(config(), layers.shapes())
    begin_adapters(made, frozenset(), layers.facts, dataclasses.replace(TrainOptions(), dora=True))
    assert all(adapter.magnitude is None for adapter in made.values())
