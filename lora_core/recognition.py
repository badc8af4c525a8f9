"""Which family of models a LoRA file is made for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Families that layer names alone tell; the first that matches any name wins.
_FAMILY_NAMES = (
    ("SD3", r"joint_blocks[._]"),
    ("Flux", r"(double_blocks|single_transformer_blocks)[._]"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"),
    ("SD3", r"transformer_blocks[._]\d+[._]attn[._]add_q_proj"),
    ("Wan", r"blocks[._]\d+[._](self|cross)_attn[._][qkvo]\."),
    ("Lumina2", r"(?<!encoder.)layers[._]\d+[._](attention|feed_forward)[._]"),
)
# Width of the text that a UNet's cross attention reads.
_CONTEXT_WIDTHS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}
_CROSS_ATTENTION = re.compile(
    r"attn2.*to_[kv].*(lora_down\.weight|lora_A(\.default)?\.weight|lora\.down\.weight|hada_w1_b)$"
)


def recognise(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The family that a LoRA file's {tensor name: shape} is made for, as a label; None if unknown.

    From the names of DiT blocks, or the text width in the shapes of a UNet's cross attention.
    """
    names = "\n".join(shapes)
    for label, pattern in _FAMILY_NAMES:
        if re.search(pattern, names):
            return label
    for name, shape in shapes.items():
        if _CROSS_ATTENTION.search(name) and len(shape) > 1 and shape[1] in _CONTEXT_WIDTHS:
            return _CONTEXT_WIDTHS[shape[1]]
    return "SDXL" if re.search(r"lora_te2_|text_encoder_2\.", names) else None
