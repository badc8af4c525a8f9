"""What the presets choose in the host's own models and text encoders."""

from __future__ import annotations

import re

import pytest

from lora_weave.lora_core.host.models import clip_layers, unet_layers
from lora_weave.lora_core.targets import select, shapes

from .families import FAMILIES, build
from .text_encoders import TARGETS, build_clip

# In the blocks of all these models a linear layer is one of attention or feed-forward, but for:
OTHER_PARTS = frozenset(
    "adaLN_modulation distilled_guidance_layer emb_layers img_mod label_emb modC modCX modX "
    "modulation proj_in proj_out txt_mod".split()
)


@pytest.mark.parametrize("name", [*FAMILIES, *(f"CLIP {name}" for name in TARGETS)])
def test_presets_find_attention_and_feed_forward_in_every_block(name: str) -> None:
    found = unet_layers(build(name)) if name in FAMILIES else clip_layers(build_clip(name[5:]))
    layers = shapes(found.shapes())
    attention, both = select(layers, "attention"), select(layers, "attention + feed-forward")
    assert set(attention) < set(both)
    assert both == [
        layer.path
        for layer in layers
        if layer.is_linear
        and re.search(r"\.\d+\.", layer.path)  # not the last part: time_embed.0, mlp.2
        and not OTHER_PARTS & set(layer.path.split("."))
    ]
    feed_forward = {path for path in both if path not in attention}
    assert not [path for path in feed_forward if re.search("(?i)attn|attention", path)]
    assert not [path for path in attention if re.search("(?i)mlp|ffn|feed", path)]
