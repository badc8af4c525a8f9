"""LoRAs of every model of the host are taken for their own family or for none, not for another."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from lora_weave.lora_core.host.models import key_map
from lora_weave.lora_core.key_map import KeyMap, LayerKey
from lora_weave.lora_core.recognition import recognise

from .meta_models import MODELS, build_meta

# Names that are another model's, too, with the same sizes: nothing in the file tells them apart.
SAME_AS_OTHERS = {
    ("Chroma", "diffusers"): "Flux",  # but for modulations, which few files have
    ("? Stable Video", "diffusers"): "SD2",  # the layers of images; those of time are not named
}
SPELLINGS = {
    "comfyui": lambda layer: [layer.path],
    "kohya": lambda layer: [layer.kohya],
    "diffusers": lambda layer: list(layer.diffusers),
}
PAIRS = {"kohya": ("lora_up.weight", "lora_down.weight")}


@pytest.fixture(scope="module")
def keymaps() -> dict[str, KeyMap]:
    return {}


@pytest.fixture(params=MODELS)
def keymap(request: pytest.FixtureRequest, keymaps: dict[str, KeyMap]) -> KeyMap:
    if request.param not in keymaps:
        keymaps[request.param] = key_map(build_meta(request.param), None)
    return keymaps[request.param]


@pytest.fixture
def model(keymap: KeyMap, keymaps: dict[str, KeyMap]) -> str:
    """The name in MODELS."""
    return next(name for name, found in keymaps.items() if found is keymap)


def shapes_of(layers: Iterator[LayerKey], spelling: str) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of a LoRA of rank 4 on the layers, or on their parts."""
    up, down = PAIRS.get(spelling, ("lora_B.weight", "lora_A.weight"))
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        ones = (1,) * (len(layer.shape) - 2)
        for name in SPELLINGS[spelling](layer):
            _, _, rows = layer.slices.get(name, (0, 0, layer.shape[0]))
            shapes[f"{name}.{up}"] = (rows, 4, *ones)
            shapes[f"{name}.{down}"] = (4, *layer.shape[1:])
    return shapes


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_all_layers(keymap: KeyMap, model: str, spelling: str) -> None:
    shapes = shapes_of(iter(keymap.layers.values()), spelling)
    label = model.partition(" ")[0]
    expected = None if label == "?" else keymap.label
    assert label in ("?", keymap.label) or keymap.label.startswith(label)
    if not shapes:  # nobody knows diffusers' names for it here
        assert spelling == "diffusers"
        return
    assert recognise(shapes) == SAME_AS_OTHERS.get((model, spelling), expected)


@pytest.mark.parametrize("words", ["attn|attention", "mlp|ff|feed_forward", "to_q|qkv|_q$|[.]q$"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_some_layers(keymap: KeyMap, model: str, spelling: str, words: str) -> None:
    """Fewer names may tell nothing, but nothing wrong."""
    layers = (layer for layer in keymap.layers.values() if re.search(words, layer.path))
    shapes = shapes_of(layers, spelling)
    others = {SAME_AS_OTHERS.get((model, spelling))}
    others |= {"Flux"} if model == "Chroma" else set()
    expected = set() if model.startswith("?") else {keymap.label}
    assert recognise(shapes) in {None} | others | expected
