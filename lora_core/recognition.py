"""Which family of models a LoRA file is made for, and in whose dialect it is written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .key_map import MODEL, part_of
from .tensor_names import NamedTensors

Shapes = Mapping[str, Sequence[int]]  # {tensor name: shape}

# Families that names of modules tell; the first that matches any name wins. "." may be "_". ""
# stands for one that has no label here (AuraFlow) and would be taken for the next.
_NAMES = tuple(
    (label, re.compile(pattern.replace("~", "[._]"), re.MULTILINE))
    for label, pattern in (
        ("SD3", r"joint_blocks~"),
        ("Flux2", r"(double|single)_stream_modulation|to_qkv_mlp_proj|blocks~\d+~ff~linear_in"),
        ("Chroma", r"distilled_guidance_layer~"),
        ("", r"joint_transformer_blocks~|single_transformer_blocks~\d+~(ff~|attn~to_out~0)"),
        ("Flux", r"(double_blocks|single_blocks|single_transformer_blocks)~"),
        ("Qwen-Image", r"transformer_blocks~\d+~(img|txt)_(mlp|mod)"),
        ("Wan", r"(?<![a-z])blocks~\d+~((self|cross)_attn~([qkvo]|[kv]_img)|ffn~[02])$"),
        ("Wan", r"(?<![a-z_])blocks~\d+~(attn[12]~(to|add)_|ffn~net~)"),
        ("Z-Image", r"(?<!encoder.)layers~\d+~(attention~to_|adaLN_modulation~0)"),
        ("Lumina2", r"(?<!encoder.)layers~\d+~(attn~to_|adaLN_modulation~1|feed_forward~linear_)"),
        ("Lumina2", r"(?<!encoder.)layers~\d+~(attention|feed_forward)~"),
        ("SDXL", r"add_embedding~|label_emb~|attentions~\d~transformer_blocks~[2-9]~"),
        ("SDXL", r"(input|output)_blocks~\d~1~transformer_blocks~[2-9]~"),
    )
)
_JOINT = re.compile(r"transformer_blocks[._](\d{1,4})[._]attn[._]")  # SD3, Flux, Qwen-Image
_CROSS_ATTENTION = re.compile(r"attn2[._]")
_UNET = re.compile(r"(down|up|mid|input|output|middle)_block")
# Parts of models whose other layers are named as those of a family here.
_OTHERS = re.compile(
    r"cross_attn[._]|clip_img|speaker_embed"  # ACE-Step
    r"|time_stack|temporal_transformer_blocks"  # Stable Video Diffusion
)
# Flux-like blocks: their number in a model, and names that HunyuanVideo alone has for them.
_DOUBLE = re.compile(r"(?:double_blocks|(?<!single_)transformer_blocks)[._](\d{1,4})[._]")
_SINGLE = re.compile(r"single_(?:transformer_)?blocks[._](\d{1,4})[._]")
_HUNYUAN = re.compile(
    r"token_refiner|(img|txt)_mlp[._]fc[12]|(img|txt)_mod[._]linear"
    r"|blocks[._]\d+[._]modulation[._]linear"
)
# Layers that read a block's own width, alone or with others beside it.
_INNER = re.compile(
    r"attn[._](qkv|proj|to_[qkv]|add_[qkv]_proj|to_out[._]0|to_add_out)$|mlp[._](0|fc1)$|linear1$"
    r"|mod[._](lin|linear)$|modulation[._](lin|linear)$|proj_mlp$|norm\d?[._]linear$"
    r"|net[._]0[._]proj$"
)
_HUNYUAN_WIDTHS = {3072: "HunyuanVideo", 2048: "HunyuanVideo15", 3584: "HunyuanImage21"}
_FLUX_BLOCKS = (19, 38)  # double, single
# Widths that a family does not have, and one with such names does: Stable Video, SDXL's refiner,
# OmniGen2, HunyuanDiT and Hunyuan3D.
_NOT_OF = {"SDXL": {768, 1024, 1536}, "Lumina2": {2520}, "Wan": {1408, 2048}}
_CONTEXT_WIDTHS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}  # of the text that a UNet reads
_SD3_WIDTHS = {1536, 2432}
_Z_IMAGE_WIDTH = 3840
_FLUX_WIDTH = 3072
# Beginnings of what metadata calls the base (ss_base_model_version, modelspec.architecture).
_METADATA_NAMES = (
    ("SDXL", ("sdxl", "stable-diffusion-xl", "illustrious", "pony")),
    ("SD3", ("sd3", "stable-diffusion-3")),
    ("SD2", ("sd_v2", "stable-diffusion-v2", "sd2")),
    ("SD1.5", ("sd_v1", "stable-diffusion-v1", "sd1", "sd-v1")),
    ("Flux2", ("flux2", "flux.2", "flux-2")),
    ("Flux", ("flux",)),
    ("Chroma", ("chroma",)),
    ("HunyuanVideo", ("hunyuan_video", "hunyuan-video", "hunyuanvideo")),
    ("Lumina2", ("lumina2", "lumina-2", "lumina_2")),
    ("Z-Image", ("z_image", "z-image", "zimage")),
    ("Qwen-Image", ("qwen_image", "qwen-image", "qwenimage")),
    ("Wan", ("wan",)),
)
# Dialects by the beginning of a tensor's name; the first that matches.
_DIALECTS = tuple(
    (dialect, re.compile(pattern))
    for dialect, pattern in (
        ("XLabs", r".*(double|single)_blocks\.\d+\.processor\."),
        ("PEFT", r"(\w+\.)?base_model\.model\."),
        ("old diffusers", r".*\.processor\."),
        ("diffusers", r"(unet|transformer|text_encoder(_\d)?)\."),
        ("comfyui", r"(diffusion_model|text_encoders)\."),
        ("raw", r"model\.diffusion_model\."),
        ("OneTrainer", r"lora_transformer_"),
        ("kohya", r"(lora|oft)_(unet|te\d?)_|lora_prior_"),
        ("LyCORIS", r"lycoris_"),
        ("bare", r"[^.]+\."),
    )
)


def recognise(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> str | None:
    """The family that a file's {tensor name: shape} is made for, as a label; None if unknown.

    By names of modules and sizes of layers; metadata counts where these leave it open.
    """
    sizes = layer_sizes(shapes)
    named, by_metadata = _by_names(sizes), _by_metadata(metadata or {})
    if named == "Flux" and by_metadata == "Chroma":
        return by_metadata  # the same blocks, but for modulations, which few files have
    return named or _by_text_width(sizes) or by_metadata or _by_encoders(sizes)


def dialect_of(keys: Iterable[str]) -> str:
    """In whose spelling most of a file's tensors are named; "" where none is a LoRA's."""
    names = NamedTensors.of(keys)
    modules = [*names.modules, *(module for _, module, _ in names.foreign.values())]
    found = Counter(
        next((dialect for dialect, pattern in _DIALECTS if pattern.match(f"{module}.")), "bare")
        for module in modules
    )
    return found.most_common(1)[0][0] if found else ""


def _by_names(sizes: Mapping[str, tuple[int, int]]) -> str | None:
    text = "\n".join(sizes)
    widths = {width for name, (_, width) in sizes.items() if part_of(name) == MODEL}
    for label, pattern in _NAMES:
        if pattern.search(text):
            if label == "Flux":
                return _flux_like(sizes)
            if label == "Lumina2" and _Z_IMAGE_WIDTH in widths:
                return "Z-Image"
            return None if _NOT_OF.get(label, set()) & widths else label or None
    return _joint(sizes)


def _joint(sizes: Mapping[str, tuple[int, int]]) -> str | None:
    """Of the models whose blocks diffusers names alike, by width and number of the blocks."""
    text = "\n".join(sizes)
    joint = [(int(m[1]), size) for name, size in sizes.items() if (m := _JOINT.search(name))]
    if not joint or "attn1" in text or _OTHERS.search(text) or any(map(_is_cross, sizes)):
        return None
    widths = {width for _, (_, width) in joint} - {0}
    if widths & _SD3_WIDTHS:
        return "SD3"
    if widths != {_FLUX_WIDTH}:
        return None
    last = max(index for index, _ in joint)
    if last == _FLUX_BLOCKS[0]:
        return None  # HunyuanVideo has one such block more than Flux; Qwen-Image has 60
    return "Qwen-Image" if last > _FLUX_BLOCKS[0] else "Flux"


def _flux_like(sizes: Mapping[str, tuple[int, int]]) -> str | None:
    """Flux, Flux2 or one of Hunyuan's, by width, names and number of the blocks they share."""
    if any(_is_flux2(*item) for item in sizes.items()):
        return "Flux2"
    text = "\n".join(sizes)
    counts = [
        max((int(number) for number in pattern.findall(text)), default=-1) + 1
        for pattern in (_DOUBLE, _SINGLE)
    ]
    more = any(found > known for found, known in zip(counts, _FLUX_BLOCKS, strict=True))
    inner = [width for name, (_, width) in sizes.items() if width and _INNER.search(name)]
    if not inner:
        return "HunyuanVideo" if _HUNYUAN.search(text) else None if more else "Flux"
    width = Counter(inner).most_common(1)[0][0]
    if width == _FLUX_WIDTH and not more and not _HUNYUAN.search(text):
        return "Flux"
    return _HUNYUAN_WIDTHS.get(width)


def _is_flux2(name: str, size: tuple[int, int]) -> bool:
    """Flux2's gated MLPs are 6 times as wide as the model, Flux's 4 times."""
    rows, width = size
    if not width:
        return False
    if re.search(r"single_blocks[._]\d+[._]linear1$", name):
        return rows == 9 * width
    if re.search(r"double_blocks[._]\d+[._](img|txt)_mlp[._]0$", name):
        return rows == 6 * width
    return bool(re.search(r"double_blocks[._]\d+[._](img|txt)_attn", name)) and width == 6144


def _by_text_width(sizes: Mapping[str, tuple[int, int]]) -> str | None:
    if _OTHERS.search("\n".join(sizes)):
        return None
    for name, (_, width) in sizes.items():
        if _is_text(name) and width in _CONTEXT_WIDTHS:
            return _CONTEXT_WIDTHS[width]
    return None


def _is_text(name: str) -> bool:
    """Whether a module reads the text of a UNet."""
    return _is_cross(name) and bool(_UNET.search(name))


def _is_cross(name: str) -> bool:
    """Whether a module makes keys or values of cross-attention."""
    return name.endswith(("to_k", "to_v")) and bool(_CROSS_ATTENTION.search(name))


def _by_metadata(metadata: Mapping[str, str]) -> str | None:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        said = metadata.get(key, "").lower()
        for label, beginnings in _METADATA_NAMES:
            if said.startswith(beginnings):
                return label
    return None


def _by_encoders(sizes: Mapping[str, tuple[int, int]]) -> str | None:
    text = "\n".join(sizes)
    if re.search(r"lora_te3_|text_encoder_3\.", text):
        return "SD3"
    return "SDXL" if re.search(r"lora_te2_text_model|text_encoder_2\.text_model", text) else None


def layer_sizes(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """{module name: (rows, columns without the kernel) of its weight}, 0 where it isn't told."""
    names = NamedTensors.of(shapes)
    sizes = {}
    for module, found in names.modules.items():
        of = {name: tuple(shapes[key]) for name, key in found.items()}
        sizes[module] = (_side(of, 0), _side(of, 1))
    for _, module, _ in names.foreign.values():
        sizes.setdefault(module, (0, 0))
    return sizes


# Tensors that have a whole side of the weight: rows first, then columns.
_SIDES = (("lora_up.weight", "hada_w1_a", "diff"), ("lora_down.weight", "hada_w1_b", "diff"))
# Blocks of a LoKr whose sides multiply to that of the weight.
_BLOCKS = (
    (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")),
    (("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_b")),
)


def _side(shapes: Mapping[str, tuple[int, ...]], axis: int) -> int:
    for name in _SIDES[axis]:
        if len(shapes.get(name, ())) > axis:
            return shapes[name][axis]
    blocks = [next((shapes[n] for n in names if n in shapes), ()) for names in _BLOCKS[axis]]
    return math.prod(b[axis] for b in blocks) if all(len(b) > axis for b in blocks) else 0
