"""The families' key maps are those of the host's own models, built on the meta device.

The files are made with 0.3.75. Newer hosts know more names, and their networks differ in norms;
see docs/families.md.
"""

from __future__ import annotations

import random
from functools import cache

import comfy.model_patcher
import comfyui_version
import pytest
import torch

from lora_weave.devtools import families, family_models
from lora_weave.lora_core.families import FAMILIES, variant_key_map, variants
from lora_weave.lora_core.host.models import encoder_network, family_name, model_network
from lora_weave.lora_core.key_map import SCALE, KeyMap, LayerKey, family_label
from lora_weave.lora_core.layer_names import key_map_of
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.network import Network

from .families import CPU

MADE_WITH = "0.3.75"
VARIANTS = [(label, variant) for label in FAMILIES for variant in variants(label)]
GONE = {"diffusion_model.norm_final"}  # from Lumina2 and Z-Image, in newer hosts


@cache
def encoders(label: str) -> Network:
    return encoder_network(family_models.encoders(label))


@cache
def live(label: str, variant: str) -> KeyMap:
    network = model_network(family_models.model(label, variant))
    return key_map_of(label, [network, encoders(label)])


@pytest.mark.parametrize("label, variant", VARIANTS)
def test_the_family_is_the_hosts(label: str, variant: str) -> None:
    model = family_models.model(label, variant)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    assert family_label(family_name(patcher)) == label


@pytest.mark.skipif(comfyui_version.__version__ != MADE_WITH, reason="the files are made with it")
@pytest.mark.parametrize("label, variant", VARIANTS)
def test_key_maps_are_those_of_live_models(label: str, variant: str) -> None:
    """Layers, shapes, every kind of name, norms and biases."""
    ours, theirs = variant_key_map(label, variant), live(label, variant)
    assert (ours.family, ours.layers, ours.biases) == (label, theirs.layers, theirs.biases)
    assert ours.parameters == theirs.parameters and bool(ours.parameters) == (label == "Wan")
    assert ours.embeddings == theirs.embeddings and ours.embeddings
    scaled = {path for path in theirs.norms if path.endswith(SCALE)}
    assert bool(scaled) == (label == "Flux")
    assert ours.norms.keys() == {path.removesuffix(SCALE) for path in theirs.norms}
    for path, norm in theirs.norms.items():
        mine = ours.norms[path.removesuffix(SCALE)]
        if path not in scaled:
            assert mine == norm
        assert set(names_of(mine)) == set(names_of(norm))
        assert (mine.shape, mine.diffusers) == (norm.shape, norm.diffusers)


@pytest.mark.skipif(comfyui_version.__version__ != MADE_WITH, reason="the files are made with it")
def test_the_files_are_up_to_date() -> None:
    stale = [
        path.name
        for path, text in families.wanted().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `python3 -m devtools.families`"


@pytest.mark.parametrize("label, variant", VARIANTS)
def test_key_maps_agree_with_every_host(label: str, variant: str) -> None:
    """No layer lacks, and no name means another layer or other rows than on this host."""
    ours, theirs = variant_key_map(label, variant), live(label, variant)
    assert ours.layers.keys() == theirs.layers.keys() and ours.biases == theirs.biases
    assert ours.parameters == theirs.parameters
    assert ours.embeddings.keys() == theirs.embeddings.keys()
    norms = {path.removesuffix(SCALE): norm for path, norm in theirs.norms.items()}
    assert norms.keys() <= ours.norms.keys()
    assert ours.norms.keys() - norms.keys() <= GONE
    for path, other in {**theirs.layers, **norms}.items():
        mine = ours.at(path)
        assert mine is not None and mine.shape == other.shape and mine.diffusers == other.diffusers
        assert {mine.kohya, *mine.aliases} <= {path, other.kohya, *other.aliases}
        assert mine.slices.items() <= other.slices.items()
        assert set(mine.swapped) <= set(other.swapped)
        if other.path.endswith(SCALE):  # a host that knows it by its path alone
            assert other.kohya == other.path
        elif mine.kohya != other.kohya:  # a newer host names language models, too
            assert mine.kohya == path and other.kohya.startswith("lora_te_")


@pytest.mark.parametrize("label", FAMILIES)
def test_a_file_is_read_as_by_the_live_key_map(label: str) -> None:
    """One name of each layer, drawn from all that it has; linear layers up to a fair size."""
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    variant = variants(label)[0]
    ours, theirs = variant_key_map(label, variant), live(label, variant)
    tensors = {}
    for layer in chance.sample(list(theirs.layers.values()), 60):
        name = chance.choice(names_of(layer))
        if ours.find(name) is None:  # a newer host's
            continue
        rows = layer.slices[name][2] if name in layer.slices else layer.shape[0]
        kernel = layer.shape[2:]
        tensors[f"{name}.lora_up.weight"] = torch.randn(
            rows, 1, *(1 for _ in kernel), generator=generator
        )
        tensors[f"{name}.lora_down.weight"] = torch.randn(
            1, layer.shape[1], *kernel, generator=generator
        )
    by_family = LoraFile.from_state_dict(tensors, ours)
    by_model = LoraFile.from_state_dict(tensors, theirs)
    assert by_family.adapters.keys() == by_model.adapters.keys()
    assert len(by_family.adapters) == len(tensors) // 2 > 30
    for path, adapter in by_model.adapters.items():
        mine = by_family.adapters[path].tensors()
        assert mine.keys() == adapter.tensors().keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in adapter.tensors().items())
    assert by_family.to_kohya(ours).keys() == by_family.to_kohya(theirs).keys() or (
        comfyui_version.__version__ != MADE_WITH
    )


def names_of(layer: LayerKey) -> list[str]:
    return [layer.path, layer.kohya, *layer.aliases, *layer.slices, *layer.swapped]


def test_every_family_that_has_a_file_has_models() -> None:
    assert tuple(family_models.FAMILIES) == FAMILIES
    for label, family in family_models.FAMILIES.items():
        assert tuple(family.variants) == variants(label)
        assert family.variant_classes.keys() <= family.variants.keys()
