"""The names that LoRA files give to a live model's layers, in every dialect.

A module has the host's own name and mostly one of diffusers, which may mean only some rows of it.
A dialect is a prefix before one of the two, with "." or "_" between the words. All of it starts
from the live model's module names, so nothing has to be guessed from a file's underscores.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.utils

from ..key_map import SCALE, Slice

Shapes = Mapping[str, tuple[int, ...]]  # {layer path: shape}

UNET_PREFIX = "diffusion_model."
CLIP_PREFIX = "text_encoders."

_DOTTED = (
    *("", "unet.", "transformer.", "diffusion_model.", "model.diffusion_model."),
    *("base_model.model.", "unet.base_model.model.", "transformer.base_model.model."),
    "base_model.model.diffusion_model.",
)
_UNDERSCORED = ("lora_unet_", "lycoris_", "lora_transformer_", "oft_unet_", "lora_unet__")

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
_ENCODERS = ("clip_l", "clip_h", "clip_g", "t5xxl", "llama")  # in diffusers' order


@dataclass(frozen=True)
class Meaning:
    """What a name stands for: a layer, or the rows of it that `rows` gives.

    `swapped`: the whole layer, with the two halves of its rows in the other order.
    """

    path: str
    rows: Slice | None = None
    swapped: bool = False


Named = tuple[str, Meaning]


@dataclass
class Names:
    """{name: Meaning}, the first that comes for a name; one with two others is left out.

    `hosts` are the names that the host knows, too. `diffusers` are {layer path: the names that
    diffusers writes, which together make it whole}.
    """

    meanings: dict[str, Meaning] = field(default_factory=dict)
    hosts: set[str] = field(default_factory=set)
    diffusers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, names: Iterable[Named]) -> None:
        known, unclear = set(self.meanings), set()
        for name, meaning in names:
            if name not in known and self.meanings.setdefault(name, meaning) != meaning:
                unclear.add(name)
        for name in unclear:
            del self.meanings[name]

    def by_path(self) -> dict[str, dict[str, Meaning]]:
        """{layer path: {name: Meaning}}."""
        sorted_out: dict[str, dict[str, Meaning]] = defaultdict(dict)
        for name, meaning in self.meanings.items():
            sorted_out[meaning.path][name] = meaning
        return sorted_out


def unet_names(patcher: Any, shapes: Shapes) -> Names:
    """The names of a MODEL's layers, the host's own first."""
    model, names = patcher.model, Names()
    theirs = comfy.lora.model_lora_keys_unet(model, {})
    own = [(path.removeprefix(UNET_PREFIX), Meaning(path)) for path in shapes]
    own += _of_other_hosts(own)
    table = _host_table(model, shapes)
    diffusers = _diffusers(model, own, table, shapes)
    names.add(_meanings(theirs.items(), shapes))
    names.hosts = set(names.meanings)
    names.add(_in_dialects(own))
    names.add(_in_dialects((table | dict(diffusers)).items()))
    names.add(_old_processors(diffusers))
    if isinstance(model, comfy.model_base.Flux):
        names.add(_in_dialects(_xlabs(own, shapes)))
    prefix = "unet." if hasattr(model.diffusion_model, "input_blocks") else "transformer."
    for stem, meaning in diffusers:
        written = names.diffusers[meaning.path]
        if names.meanings.get(prefix + stem) == meaning and (meaning.rows or not written):
            written.append(prefix + stem)
    return names


def _of_other_hosts(own: Sequence[Named]) -> list[Named]:
    """Names of Flux's norms as hosts write them that call the weight "scale" (0.3.75), or don't."""
    return [
        (stem.removesuffix(SCALE) if stem.endswith(SCALE) else stem + SCALE, meaning)
        for stem, meaning in own
        if stem.removesuffix(SCALE).endswith(("norm.query_norm", "norm.key_norm"))
    ]


def clip_names(clip: Any, shapes: Shapes) -> Names:
    """The names of a CLIP's layers, the host's own first."""
    names = Names()
    theirs = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    names.add(_meanings(((name, CLIP_PREFIX + key) for name, key in theirs.items()), shapes))
    names.hosts = set(names.meanings)
    found = {path.split(".")[1] for path in shapes}
    encoders = sorted(found, key=lambda name: (name not in _ENCODERS, _order(name)))
    ours = []
    for path in shapes:
        encoder = path.split(".")[1]
        module = path.partition(".transformer.")[2]
        number = encoders.index(encoder) + 1
        if not module:
            continue
        for prefix, joint in _encoder_prefixes(encoder, number, len(encoders)):
            for stem in (module, module.removeprefix("text_model."), module.removeprefix("model.")):
                ours.append((prefix + stem.replace(".", joint), Meaning(path)))
        component = "text_encoder" if number == 1 else f"text_encoder_{number}"
        names.diffusers[path].append(f"{component}.{module}")
    names.add(dict.fromkeys(ours))
    return names


def _order(encoder: str) -> int:
    return _ENCODERS.index(encoder) if encoder in _ENCODERS else 0


def _encoder_prefixes(encoder: str, number: int, total: int) -> Iterator[tuple[str, str]]:
    """(prefix, what joins the words) of a text encoder's names; kohya's T5 is always the third."""
    numbers = {str(number), "3"} if encoder == "t5xxl" and total > 1 else {str(number)}
    for kind in ("lora", "lycoris", "oft"):
        for digit in sorted(numbers) + ([""] if number == 1 else []):
            yield f"{kind}_te{digit}_", "_"
    component = "text_encoder" if number == 1 else f"text_encoder_{number}"
    yield f"{component}.", "."
    yield f"{component}.base_model.model.", "."
    if total == 1:
        yield "base_model.model.", "."


def _meanings(table: Iterable[tuple[str, Any]], shapes: Shapes) -> Iterator[Named]:
    """The host's {name: weight key, or (weight key, rows or None[, function])} as Meanings."""
    for name, target in table:
        key, rows, *function = (target, None) if isinstance(target, str) else target
        path = key.removesuffix(".weight")
        if path not in shapes or (path == key and not path.endswith(SCALE)):
            continue
        if function and function[0] is not comfy.utils.swap_scale_shift:
            continue
        if rows is not None:
            rows = _live_rows(path, tuple(rows), shapes[path])
        yield name, Meaning(path, rows, bool(function))


def _live_rows(path: str, rows: Slice, shape: tuple[int, ...]) -> Slice:
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


def _host_table(model: Any, shapes: Shapes) -> dict[str, Meaning]:
    """The host's own table of diffusers' names for the model's family; empty where it has none."""
    kinds, tools = comfy.model_base, comfy.utils
    table = tools.unet_to_diffusers
    for kind, other in (
        (kinds.SD3, tools.mmdit_to_diffusers),
        (kinds.Flux, tools.flux_to_diffusers),
        (kinds.Lumina2, tools.z_image_to_diffusers),
        (kinds.AuraFlow, tools.auraflow_to_diffusers),
        (kinds.PixArt, tools.pixart_to_diffusers),
    ):
        if isinstance(model, kind):
            table = other
    targets = [
        (name.removesuffix(".weight"), _within(target))
        for name, target in table(model.model_config.unet_config).items()
    ]
    return dict(_meanings(targets, shapes))


def _within(target: Any) -> Any:
    """A target of the host's tables, whose keys are those within the diffusion model."""
    if isinstance(target, str):
        return UNET_PREFIX + target
    return (UNET_PREFIX + target[0], *target[1:])


def _diffusers(
    model: Any, own: Sequence[Named], table: Mapping[str, Meaning], shapes: Shapes
) -> list[Named]:
    """What diffusers calls the layers, each name once."""
    kinds = comfy.model_base
    if isinstance(model, kinds.WAN21):
        return list(_renamed(own, _WAN))
    if isinstance(model, kinds.QwenImage):
        return list(own)
    if isinstance(model, kinds.Lumina2) and not is_z_image(model):
        return [*_lumina_heads(own, shapes), *_renamed(_without_heads(own), _LUMINA2)]
    if isinstance(model, kinds.Flux2):
        parts = [named for named in table.items() if named[1] != Meaning(named[1].path)]
        fused = [named for named in parts if not named[0].startswith("single")]
        paths = {meaning.path for _, meaning in fused}
        return [*fused, *_renamed([named for named in own if named[1].path not in paths], _FLUX2)]
    if isinstance(model, kinds.Flux):
        return [named for named in table.items() if not _NOT_FLUX1.search(named[0])]
    return sorted(table.items())  # sorted: of two names for SDXL's size embedding, the right one


def is_z_image(model: Any) -> bool:
    """Whether a model of the host's class Lumina2 is a Z-Image."""
    return type(model.model_config).__name__ == "ZImage"


def _lumina_heads(own: Sequence[Named], shapes: Shapes) -> Iterator[Named]:
    for stem, meaning in own:
        if stem.endswith(".attention.qkv"):
            for index, word in enumerate("qkv"):
                rows = _live_rows(meaning.path, (0, index, 1), shapes[meaning.path])
                yield stem.replace("attention.qkv", f"attn.to_{word}"), Meaning(meaning.path, rows)


def _without_heads(own: Sequence[Named]) -> list[Named]:
    return [named for named in own if not named[0].endswith(".attention.qkv")]


def _renamed(own: Sequence[Named], patterns: Sequence[tuple[str, str]]) -> Iterator[Named]:
    for stem, meaning in own:
        name = stem
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        yield name, meaning


def _in_dialects(stems: Iterable[Named]) -> Iterator[Named]:
    """Each name with every prefix, joined by "." and by "_"."""
    for stem, meaning in stems:
        flat = stem.replace(".", "_")
        for prefix in _DOTTED:
            yield prefix + stem, meaning
        for prefix in _UNDERSCORED:
            yield prefix + flat, meaning


def _old_processors(stems: Iterable[Named]) -> Iterator[Named]:
    """diffusers before PEFT: attn1.processor.to_q, and to_out without its number."""
    for stem, meaning in stems:
        old = stem.replace(".to_", ".processor.to_")
        if old != stem:
            for prefix in ("", "unet."):
                yield prefix + old.replace(".to_out.0", ".to_out"), meaning


def _xlabs(own: Iterable[Named], shapes: Shapes) -> Iterator[Named]:
    for stem, meaning in own:
        for pattern, new in _XLABS:
            name = re.sub(pattern, new, stem)
            if name != stem:
                yield name, meaning
        if stem.startswith("single_blocks.") and stem.endswith(".linear1"):
            qkv = (0, 0, 3 * shapes[meaning.path][1])
            yield stem.replace("linear1", "processor.qkv"), Meaning(meaning.path, qkv)
