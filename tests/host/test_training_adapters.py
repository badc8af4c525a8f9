"""The adapters of a training as the node asks for them, on real models in this process."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS, Bias
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.adapters.pieces import Pieces
from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.inplace import in_place
from lora_weave.lora_core.host.models import key_map, unet_layers
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.lora_model import LoraModel
from lora_weave.lora_core.training.config import ResolvedConfig, TrainConfig, TrainOptions
from lora_weave.nodes.training_adapters import (
    begin_adapters,
    chosen_layers,
    make_adapters,
    new_adapters,
    trained_layers,
    unfit_options,
)
from lora_weave.nodes.training_check import Request

from .families import build
from .test_fused import attention_dora
from .text_encoders import build_clip

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
        ("oft", {"rank_dropout": 0.1}, ["rank_dropout works with lora, loha and lokr only"]),
        ("glora", {"lora_plus_ratio": 2.0}, ["lora_plus_ratio works with lora, loha and lokr"]),
        ("boft", {"rslora": True}, ["rslora works with lora, loha, lokr and glora only"]),
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


# --- norms and biases

UNET = "diffusion_model.input_blocks.1.1"
BLOCK = f"{UNET}.transformer_blocks.0"


def request(model, config, clip=None, start_from=None) -> Request:
    return Request(
        model=model,
        clip=clip,
        vae=None,
        dataset=None,
        config=config.train,
        options=config.options,
        start_from=start_from,
    )


def chosen(algorithm: str, clip=None, **options: object) -> set[str]:
    settings = config(algorithm, **options)
    return set(chosen_layers(request(build("SD1.5"), settings, clip), settings))


def test_full_trains_the_biases_of_its_layers():
    found, without = chosen("full"), chosen("lora")
    assert found - without == {f"{path}.bias" for path in without} & trainable("SD1.5")
    assert f"{BLOCK}.attn1.to_out.0.bias" in found and f"{BLOCK}.attn1.to_q.bias" not in found


def trainable(family: str) -> set[str]:
    return set(trained_layers(build(family), None).facts)


@pytest.mark.parametrize("algorithm", ["lora", "full"])
def test_norms_of_the_blocks_that_are_trained(algorithm):
    norms = chosen(algorithm, norms=True) - chosen(algorithm)
    weights = {path for path in norms if not path.endswith(".bias")}
    assert norms == weights | {f"{path}.bias" for path in weights}
    assert {f"{BLOCK}.norm1", f"{BLOCK}.norm2", f"{UNET}.norm"} <= weights
    assert not any("in_layers" in path or ".out." in path for path in weights)
    everything = chosen(algorithm, norms=True, targets="all linear + conv")
    assert {path for path in trainable("SD1.5") if "norm" in path} <= everything
    assert {"diffusion_model.input_blocks.1.0.in_layers.0", "diffusion_model.out.0"} <= everything


def test_include_and_exclude_hold_for_norms():
    found = chosen("lora", norms=True, include="attn2, norm2", exclude="middle_block")
    assert {path.split(".")[-2] for path in found if path.endswith(".bias")} == {"norm2"}
    assert f"{BLOCK}.norm2" in found and f"{BLOCK}.attn2.to_q" in found
    assert not any("middle_block" in path for path in found)
    with pytest.raises(ValueError, match="no norm is left to train"):
        chosen("lora", norms=True, include="attn2")


def test_norms_of_text_encoders():
    """Those of its blocks, not the last one."""
    without = chosen("lora", build_clip("SD1"), norms=True)
    with_text = chosen("lora", build_clip("SD1"), norms=True, text_encoder=True) - without
    norms = {path for path in with_text if "norm" in path and not path.endswith(".bias")}
    encoder = "text_encoders.clip_l.transformer.text_model.encoder.layers"
    assert norms == {f"{encoder}.{block}.layer_norm{n}" for block in range(3) for n in (1, 2)}


def test_a_model_without_norms_of_the_kind_is_told():
    settings = config(norms=True, include="context_embedder", targets="all linear")
    with pytest.raises(ValueError, match="no norm is left"):
        chosen_layers(request(build("SD3"), settings), settings)


@pytest.mark.parametrize("algorithm", ADAPTERS)
def test_norms_and_biases_get_the_change_itself(algorithm):
    layers = trained_layers(build("SD1.5"), None)
    for path, adapter in new_adapters(config(algorithm), layers.shapes()).items():
        kind = Full if layers.facts[path].normalized else ADAPTERS[algorithm]
        assert type(adapter) is (Bias if path.endswith(".bias") else kind)
        if type(adapter) is not ADAPTERS[algorithm]:
            assert not any(parameter.any() for parameter in adapter.parameters())


@pytest.mark.parametrize("family", ["SD1.5", "Flux"])
def test_norms_and_biases_of_another_lora_are_trained_further(family):
    model = build(family)
    keymap, layers = key_map(model, None), trained_layers(model, None)
    before = new_adapters(config("full"), layers.shapes())
    for adapter in before.values():
        for parameter in adapter.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    kept = dict(list(before.items())[::3])
    start = LoraModel.from_file(LoraFile(kept), keymap, provenance="x")
    settings = config("lora", norms=True)
    made, new = make_adapters(request(model, settings, start_from=start), settings, keymap)
    assert made.keys() - new == kept.keys()
    assert new == set(chosen_layers(request(model, settings), settings)) - kept.keys()
    for path, adapter in kept.items():
        assert type(made[path]) is type(adapter)
        pairs = zip(made[path].parameters(), adapter.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    with attached(layers.modules, made, layers.facts):
        assert sum(len(module._forward_hooks) for module in set(layers.modules.values())) == len(
            made
        )


def test_a_dora_of_flux_s_attention_alone_is_trained_further(tmp_path):
    """On its rows, and written as it came."""
    model = build("Flux")
    keymap, layers = key_map(model, None), trained_layers(model, None)
    tensors, _ = attention_dora(model, "diffusers")
    start = LoraModel.from_file(LoraFile.from_state_dict(tensors, keymap), keymap)
    settings = config("lora", targets="attention")
    made, new = make_adapters(request(model, settings, start_from=start), settings, keymap)
    path = "diffusion_model.single_blocks.0.linear1"
    pieces, module = made[path], layers.modules[path]
    assert isinstance(pieces, Pieces) and path not in new
    before = pieces.tensors()
    x = torch.randn(2, 5, pieces.shape[1])
    facts = {path: layers.facts[path]}
    with in_place(module), attached({path: module}, {path: pieces}, facts):
        module(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in pieces.parameters())
    LoraFile(made).save(tmp_path / "x.safetensors", keymap)
    again = LoraFile.read(tmp_path / "x.safetensors", keymap).adapters[path].tensors()
    assert before.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_a_norm_of_an_unknown_kind_is_not_trained_further():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64))

    model = build("SD1.5")
    model.model.diffusion_model.out[0] = Odd()
    keymap, path = key_map(model, None), "diffusion_model.out.0"
    start = LoraModel.from_file(
        LoraFile({path: Full.create((64,), 1, 1.0)}), keymap, provenance="x"
    )
    settings = config(norms=True, targets="all linear + conv")
    with pytest.raises(ValueError, match=rf"that can't be trained \(1\): {path}"):
        make_adapters(request(model, settings, start_from=start), settings, keymap)
    assert path not in chosen_layers(request(model, settings), settings)


def test_embeddings_are_not_trained_further():
    model, clip = build("SD1.5"), build_clip("SD1")
    keymap = key_map(model, clip)
    path, layer = next(iter(keymap.embeddings.items()))
    table = LoraFile({path: ADAPTERS["lora"].create(layer.shape, 1, 1.0)})
    start = LoraModel.from_file(table, keymap, provenance="x")
    settings = config(text_encoder=True)
    asked = request(model, settings, clip, start)
    with pytest.raises(ValueError, match=rf"embeddings or .* can't be trained \(1\): {path}"):
        make_adapters(asked, settings, keymap)
    assert path not in chosen_layers(asked, settings)
