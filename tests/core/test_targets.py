"""Which layers presets and patterns choose, on real paths of the host's model families."""

from __future__ import annotations

import pytest

from lora_weave.lora_core.targets import PRESETS, Target, beside, matches, select, shapes

# Paths as in the host's modules (named_modules of its UNets, DiTs and text encoders).
SD15 = "diffusion_model.input_blocks.1.1.transformer_blocks.0"
ATTENTION = [
    f"{SD15}.attn1.to_q",
    f"{SD15}.attn2.to_out.0",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv",  # SD3
    "diffusion_model.double_blocks.0.img_attn.proj",  # Flux
    "diffusion_model.layers.3.attention.out",  # Lumina 2
    "diffusion_model.blocks.0.self_attn.q",  # Wan
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "text_encoders.hydit_clip.transformer.bert.encoder.layer.0.attention.self.query",
    "text_encoders.hydit_clip.transformer.bert.encoder.layer.0.attention.output.dense",
    "diffusion_model.double_layers.0.attn.w2q",  # AuraFlow
    "diffusion_model.double_stream_blocks.0.block.attn1.to_q_t",  # HiDream
    "diffusion_model.blocks.block0.blocks.0.block.attn.to_q.0",  # Cosmos
    "diffusion_model.down_blocks.0.2.attention.attn.to_q",  # Stable Cascade
    "diffusion_model.transformer_blocks.0.audio_attn1.to_q",  # LTX 2
    "diffusion_model.single_blocks.0.linear1",  # Flux: attention and feed-forward in one
]
FEED_FORWARD = [
    f"{SD15}.ff.net.0.proj",
    "diffusion_model.joint_blocks.0.context_block.mlp.fc1",
    "diffusion_model.double_blocks.0.txt_mlp.2",
    "diffusion_model.layers.3.feed_forward.w1",
    "diffusion_model.blocks.0.ffn.0",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_0",
    "text_encoders.hydit_clip.transformer.bert.encoder.layer.0.intermediate.dense",
    "text_encoders.hydit_clip.transformer.bert.encoder.layer.0.output.dense",
    "diffusion_model.double_layers.0.mlpC.c_fc1",  # AuraFlow
    "diffusion_model.double_layers.0.mlpX.c_proj",
    "diffusion_model.double_stream_blocks.0.block.ff_i.experts.0.w1",  # HiDream
    "diffusion_model.double_stream_blocks.0.block.ff_t.w1",
    "diffusion_model.blocks.0.mlp_y.w1",  # Mochi
    "diffusion_model.blocks.block0.blocks.2.block.layer1",  # Cosmos
    "diffusion_model.blocks.0.mlp.layer1",  # Cosmos Predict 2
    "diffusion_model.blocks.7.moe.shared_experts.net.0.proj",  # Hunyuan3D 2.1
    "diffusion_model.down_blocks.0.0.channelwise.0",  # Stable Cascade
    "diffusion_model.transformer_blocks.0.audio_ff.net.0.proj",  # LTX 2
]
OTHER_LINEAR = [
    "diffusion_model.time_embed.0",
    "diffusion_model.double_blocks.0.img_mod.lin",
    "diffusion_model.t_embedder.mlp.0",
    "diffusion_model.mlp_t5.0",  # HunyuanDiT: the text's way in
    "diffusion_model.blocks.0.adaln_modulation_self_attn.1",  # Cosmos Predict 2
    "diffusion_model.blocks.0.adaln_modulation_mlp.1",
    "diffusion_model.double_layers.0.modC.1",
    "diffusion_model.down_blocks.0.2.kv_mapper.1",
    "text_encoders.clip_l.transformer.text_projection",
]
CONV = ["diffusion_model.input_blocks.0.0", "diffusion_model.input_blocks.1.1.proj_in"]
LINEAR = ATTENTION + FEED_FORWARD + OTHER_LINEAR
LAYERS = [Target(path, (8, 8)) for path in LINEAR] + [Target(path, (8, 8, 3, 3)) for path in CONV]
EXPECTED = {
    "attention": ATTENTION,
    "attention + feed-forward": ATTENTION + FEED_FORWARD,
    "all linear": LINEAR,
    "all linear + conv": LINEAR + CONV,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    assert select(LAYERS, preset) == EXPECTED[preset]


def test_order_is_the_models() -> None:
    assert select(LAYERS[::-1], "all linear") == LINEAR[::-1]


def test_convolutions_named_as_attention_are_no_linear_layers() -> None:
    layers = [Target("unet.0.attn.to_q", (8, 8, 1, 1)), Target("unet.0.attn.to_k", (8, 8))]
    assert select(layers, "attention") == ["unet.0.attn.to_k"]


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.attn2.to_q", "attn2", True),
        ("a.attn2.to_q", "attn2.to_q", True),
        ("a.attn2.to_q", "a.attn2.to_q", True),
        ("a.attn2.to_q", "attn", False),  # whole parts only
        ("a.attn2.to_q", "attn*", True),
        ("a.attn2.to_q", "attn?", True),
        ("a.attn2.to_q", "*to_q", True),
        ("a.attn2.to_q", "ATTN2", False),
        ("input_blocks.4.1", "input_blocks.4", True),
        ("input_blocks.4.1", "blocks.4", False),
        ("input_blocks.41.1", "input_blocks.4", False),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) == expected


def test_include_narrows_and_exclude_takes_away() -> None:
    chosen = select(
        LAYERS, "attention", include="attn1.to_q, attn2\nsingle_blocks", exclude="to_out.*"
    )
    assert chosen == [f"{SD15}.attn1.to_q", "diffusion_model.single_blocks.0.linear1"]


def test_exclude_alone() -> None:
    assert select(LAYERS, "all linear + conv", exclude="diffusion_model.*") == [
        path for path in LINEAR if path.startswith("text_encoders.")
    ]


def test_every_pattern_without_a_match_is_told() -> None:
    with pytest.raises(ValueError) as error:
        select(LAYERS, "attention", include="attn1, atn2", exclude="proj_in")
    text = str(error.value)
    assert "'atn2'" in text and "'proj_in'" in text and "'attn1'" not in text
    assert f"{len(ATTENTION)} layers of 'attention'" in text


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer is left.*'attention'.*attn1"):
        select(LAYERS, "attention", include="attn1", exclude="attn1")


def test_unknown_preset_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown target preset 'all'; known: attention, "):
        select(LAYERS, "all")


def test_shapes_makes_targets() -> None:
    assert shapes({"a": (4, 3), "b": (4, 3, 1, 1)}) == [
        Target("a", (4, 3)),
        Target("b", (4, 3, 1, 1)),
    ]


# --- norms

ENCODER = "text_encoders.clip_l.transformer.text_model"
BLOCK = "diffusion_model.input_blocks.1.1"
NORMS = {  # path: a layer of its block
    f"{SD15}.norm2": f"{SD15}.attn1.to_q",
    f"{BLOCK}.norm": f"{SD15}.attn1.to_q",
    "diffusion_model.input_blocks.1.0.in_layers.0": "diffusion_model.input_blocks.1.0.emb_layers.1",
    "diffusion_model.out.0": "diffusion_model.out.2",
    "diffusion_model.txt_norm": "diffusion_model.img_in",  # Qwen-Image
    "diffusion_model.cap_embedder.0": "diffusion_model.cap_embedder.1",  # Lumina 2
    "diffusion_model.layers.3.attention.q_norm": "diffusion_model.layers.3.feed_forward.w1",
    "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale": (
        "diffusion_model.double_blocks.0.img_mlp.0"
    ),
    f"{ENCODER}.encoder.layers.0.layer_norm1": f"{ENCODER}.encoder.layers.0.mlp.fc1",
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_goes_with_the_layers_of_its_block(norm: str) -> None:
    assert beside([NORMS[norm]], [norm]) == [norm]
    others = [layer for layer in NORMS.values() if layer != NORMS[norm]]
    assert beside(others, [norm]) == []


def test_norms_beside_no_layer() -> None:
    """The last ones of text encoders, and a block's where the layers are in one within it."""
    layers = [f"{ENCODER}.encoder.layers.0.mlp.fc1", "text_encoders.clip_l.transformer.projection"]
    assert beside(layers, [f"{ENCODER}.final_layer_norm"]) == []
    first, second = (f"text_encoders.t5xxl.encoder.block.0.layer.{number}" for number in (0, 1))
    norms = [f"{first}.layer_norm", f"{second}.layer_norm"]
    assert beside([f"{first}.SelfAttention.q"], norms) == [norms[0]]


def test_patterns_hold_for_norms_too() -> None:
    layers, norms = LAYERS, list(NORMS)
    assert select(layers, "attention", norms=None) == ATTENTION
    everything = select(layers, "attention", norms=norms)
    assert everything[: len(ATTENTION)] == ATTENTION
    assert everything[len(ATTENTION) :] == [norms[0], norms[1], *norms[6:]]
    chosen = select(layers, "attention", include="attn1.to_q, norm2", norms=norms)
    assert chosen == [f"{SD15}.attn1.to_q", f"{SD15}.norm2"]
    chosen = select(layers, "attention", exclude="norm*", norms=norms)
    assert set(everything) - set(chosen) == {norms[0], norms[1], norms[7]}


@pytest.mark.parametrize("norms", [[], list(NORMS)], ids=["none", "excluded"])
def test_no_norm_left_is_an_error(norms: list[str]) -> None:
    with pytest.raises(ValueError, match="no norm is left to train: .*include='attn1'"):
        select(LAYERS, "attention", include="attn1", norms=norms)
