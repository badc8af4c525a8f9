"""What diffusers and XLabs call the parts of a network, where it differs from the host's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from .key_map import Slice
from .network import Meaning, Named, Network, Shapes

# What diffusers calls parts of a model where the host has no table of it: patterns, all applied.
_LUMINA2 = (  # its scripts/convert_lumina_to_diffusers.py
    (r"\.attention\.out$", ".attn.to_out.0"),
    (r"\.feed_forward\.w([123])$", r".feed_forward.linear_\1"),
    (r"\.adaLN_modulation\.1$", ".norm1.linear"),
    (r"^cap_embedder\.", "time_caption_embed.caption_embedder."),
    (r"^t_embedder\.mlp\.0$", "time_caption_embed.timestep_embedder.linear_1"),
    (r"^t_embedder\.mlp\.2$", "time_caption_embed.timestep_embedder.linear_2"),
)
_WAN = (  # its scripts/convert_wan_to_diffusers.py
    (r"\.self_attn\.([qkv])$", r".attn1.to_\1"),
    (r"\.cross_attn\.([qkv])$", r".attn2.to_\1"),
    (r"\.cross_attn\.([kv])_img$", r".attn2.add_\1_proj"),
    (r"\.self_attn\.o$", ".attn1.to_out.0"),
    (r"\.cross_attn\.o$", ".attn2.to_out.0"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
    (r"^head\.head$", "proj_out"),
)
_FLUX2 = (  # its scripts/convert_flux2_to_diffusers.py
    (r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."),
    (r"^single_blocks\.(\d+)\.linear1$", r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj"),
    (r"^single_blocks\.(\d+)\.linear2$", r"single_transformer_blocks.\1.attn.to_out"),
    (r"\.img_attn\.proj$", ".attn.to_out.0"),
    (r"\.txt_attn\.proj$", ".attn.to_add_out"),
    (r"\.img_mlp\.0$", ".ff.linear_in"),
    (r"\.img_mlp\.2$", ".ff.linear_out"),
    (r"\.txt_mlp\.0$", ".ff_context.linear_in"),
    (r"\.txt_mlp\.2$", ".ff_context.linear_out"),
    (r"^(.*_modulation.*)\.lin$", r"\1.linear"),
    (r"^img_in$", "x_embedder"),
    (r"^txt_in$", "context_embedder"),
    (r"^time_in\.in_layer$", "time_guidance_embed.timestep_embedder.linear_1"),
    (r"^time_in\.out_layer$", "time_guidance_embed.timestep_embedder.linear_2"),
    (r"^guidance_in\.in_layer$", "time_guidance_embed.guidance_embedder.linear_1"),
    (r"^guidance_in\.out_layer$", "time_guidance_embed.guidance_embedder.linear_2"),
    (r"^final_layer\.linear$", "proj_out"),
)
# Names that the host's table of Flux has for other writers than diffusers.
_NOT_FLUX1 = re.compile(
    r"(ff|ff_context)\.linear_(in|out)$|^single.*\.attn\.(to_out|to_qkv_mlp_proj)$"
)
_XLABS = (  # x-flux lora processors; the "_lora" of single blocks belongs to the tensor's name
    (r"\.img_attn\.(qkv|proj)$", r".processor.\1_lora1"),
    (r"\.txt_attn\.(qkv|proj)$", r".processor.\1_lora2"),
    (r"(single_blocks\.\d+)\.linear2$", r"\1.processor.proj"),
)


def diffusers(network: Network, own: Sequence[Named]) -> list[Named]:
    """What diffusers calls the layers, each name once; `own` are the names within the network."""
    table = network.table
    if network.style == "wan":
        return list(_renamed(own, _WAN))
    if network.style == "own":
        return list(own)
    if network.style == "lumina2":
        heads = _lumina_heads(own, network.shapes)
        return [*heads, *_renamed(_without_heads(own), _LUMINA2)]
    if network.style == "flux2":
        parts = [named for named in table.items() if named[1] != Meaning(named[1].path)]
        fused = [named for named in parts if not named[0].startswith("single")]
        paths = {meaning.path for _, meaning in fused}
        return [*fused, *_renamed([named for named in own if named[1].path not in paths], _FLUX2)]
    if network.style == "flux":
        return [named for named in table.items() if not _NOT_FLUX1.search(named[0])]
    return sorted(table.items())  # sorted: of two names for SDXL's size embedding, the right one


def live_rows(path: str, rows: Slice, shape: tuple[int, ...]) -> Slice:
    """The rows that a layer of `shape` really has, where the host's table takes them from sizes
    that most models have: k and v of grouped heads in Lumina2, Flux blocks of another mlp ratio.
    """
    axis, start, length = rows
    total, width = shape[:2]
    if path.endswith(".attention.qkv"):
        narrow = (total - width) // 2
        return [(0, 0, width), (0, width, narrow), (0, width + narrow, narrow)][start // length]
    if path.endswith(".linear1") and start == 3 * width:
        return axis, start, total - start
    return rows


def _lumina_heads(own: Sequence[Named], shapes: Shapes) -> Iterator[Named]:
    for stem, meaning in own:
        if stem.endswith(".attention.qkv"):
            for index, word in enumerate("qkv"):
                rows = live_rows(meaning.path, (0, index, 1), shapes[meaning.path])
                yield stem.replace("attention.qkv", f"attn.to_{word}"), Meaning(meaning.path, rows)


def _without_heads(own: Sequence[Named]) -> list[Named]:
    return [named for named in own if not named[0].endswith(".attention.qkv")]


def _renamed(own: Sequence[Named], patterns: Sequence[tuple[str, str]]) -> Iterator[Named]:
    for stem, meaning in own:
        name = stem
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        yield name, meaning


def xlabs(own: Iterable[Named], shapes: Shapes) -> Iterator[Named]:
    """XLabs' names of a Flux's layers; `own` are the names within the network."""
    for stem, meaning in own:
        for pattern, new in _XLABS:
            name = re.sub(pattern, new, stem)
            if name != stem:
                yield name, meaning
        if stem.startswith("single_blocks.") and stem.endswith(".linear1"):
            qkv = (0, 0, 3 * shapes[meaning.path][1])
            yield stem.replace("linear1", "processor.qkv"), Meaning(meaning.path, qkv)
