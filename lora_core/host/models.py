"""What the pack needs to know of a MODEL and a CLIP: their layers, names and base weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import comfy.model_sampling
import comfy.ops
import torch
from torch import Tensor, nn

from ..adapters import Layer
from ..key_map import BIAS, SCALE, KeyMap, LayerKey
from .layer_names import (
    CLIP_PREFIX,
    UNET_PREFIX,
    Meaning,
    Names,
    Shapes,
    clip_names,
    is_z_image,
    unet_names,
)

# Of the UNets, Flux and Chroma, Qwen-Image, and Lumina2 with Z-Image (comfy/model_detection.py).
_WIDTH_NAMES = ("context_dim", "context_in_dim", "joint_attention_dim", "cap_feat_dim")


@dataclass(frozen=True)
class ModelLayers:
    """The adaptable layers or norms of a model: live modules and what adapters may know of them."""

    modules: dict[str, nn.Module]
    facts: dict[str, Layer]

    def __or__(self, other: ModelLayers) -> ModelLayers:
        return ModelLayers(self.modules | other.modules, self.facts | other.facts)

    def biases(self) -> ModelLayers:
        """The biases of those that have one, at `<path>.bias`."""
        owners = [
            path for path, one in self.modules.items() if getattr(one, "bias", None) is not None
        ]
        facts = {path + BIAS: _bias_facts(self.facts[path]) for path in owners}
        return ModelLayers({path + BIAS: self.modules[path] for path in owners}, facts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: layer.shape for path, layer in self.facts.items()}


def unet_layers(patcher: Any) -> ModelLayers:
    """Layers of a MODEL's diffusion model, by path `diffusion_model.<module path>`."""
    return _layers(patcher.model.diffusion_model, UNET_PREFIX)


def clip_layers(clip: Any) -> ModelLayers:
    """Layers of a CLIP's text encoders, by path `text_encoders.<module path>`."""
    return _layers(clip.patcher.model, CLIP_PREFIX)


def _layers(root: nn.Module, prefix: str) -> ModelLayers:
    modules: dict[str, nn.Module] = {}
    facts: dict[str, Layer] = {}
    for name, module in root.named_modules():
        layer = layer_facts(module)
        if layer is not None:
            modules[prefix + name] = module
            facts[prefix + name] = layer
    return ModelLayers(modules, facts)


def layer_facts(module: nn.Module) -> Layer | None:
    """The Layer of a Linear or a plain ConvNd, else None (grouped, transposed, odd padding).

    0.33's quantised Linear is no nn.Linear, so it is known by its features, not by its class.
    """
    if getattr(module, "weight", None) is None:
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        plain = not module.transposed and module.groups == 1 and module.padding_mode == "zeros"
        if not plain or isinstance(module.padding, str):
            return None
        return Layer(
            shape=(module.out_channels, module.in_channels, *module.kernel_size),
            weight=base_weight(module),
            bias=base_bias(module),
            stride=tuple(module.stride),
            padding=tuple(module.padding),
            dilation=tuple(module.dilation),
        )
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        return Layer(shape=shape, weight=base_weight(module), bias=base_bias(module))
    return None


def weight_name(module: nn.Module) -> str | None:
    """What the module calls its weight: "scale" in Flux's RMS norms of 0.3.75; None without one."""
    names = ("weight", "scale")
    return next((name for name in names if isinstance(getattr(module, name, None), Tensor)), None)


def _bias_facts(layer: Layer) -> Layer:
    """Those of the bias of a layer or norm."""
    return dataclasses.replace(
        layer,
        shape=layer.shape[:1],
        channel_axis=1 if len(layer.shape) > 2 else layer.channel_axis,
        normalized=None,
    )


def base_weight(module: nn.Module) -> Callable[[], Tensor]:
    """A callable that gives the module's weight in a floating dtype, dequantised if need be."""

    def weight() -> Tensor:
        if hasattr(module, "cast_bias_weight"):  # GGUF layers bring their own
            found = module.cast_bias_weight(dtype=torch.float32)[0]  # type: ignore[operator]
        elif hasattr(module, "comfy_cast_weights"):
            found = comfy.ops.cast_bias_weight(module, dtype=torch.float32)[0]
        else:
            found = getattr(module, weight_name(module) or "weight")
        if hasattr(found, "_qdata"):  # 0.33's quantised tensors call themselves float32 already
            found = found.dequantize()
        return found.to(torch.float32)

    return weight


def base_bias(module: nn.Module) -> Callable[[], Tensor | None]:
    """A callable that gives the module's bias in float32, None where it has none."""

    def bias() -> Tensor | None:
        found = getattr(module, "bias", None)
        if found is None:
            return None
        if hasattr(module, "cast_bias_weight"):  # GGUF layers bring their own
            found = module.cast_bias_weight(dtype=torch.float32)[1]  # type: ignore[operator]
        elif getattr(module, "bias_function", ()):  # patches that the host applies on the way
            found = comfy.ops.cast_bias_weight(module, dtype=torch.float32)[1]
        return found.to(torch.float32)

    return bias


def key_map(patcher: Any | None, clip: Any | None) -> KeyMap:
    """The names that LoRA files use for the layers of a live MODEL and CLIP.

    See `layer_names`. Which of them is kohya's: sd-scripts write diffusers block names for SD1.x
    and SD2.x, the original names for every other model, and text encoders as lora_te where there
    is one, lora_te1 to 3 where there are more (sd-scripts networks/lora.py `create_modules`,
    sdxl_train_network.py).
    """
    family, named = "text encoder", _Named()
    if patcher is not None:
        family = family_name(patcher)
        kind = "diffusers" if family in ("SD1.5", "SD2") else "original"
        root = patcher.model.diffusion_model
        named.add(root, UNET_PREFIX, kind, lambda shapes: unet_names(patcher, shapes))
    if clip is not None:
        encoders = {path.split(".")[1] for path in clip_layers(clip).facts}
        kind = "numbered" if len(encoders) > 1 else "single"
        root = clip.cond_stage_model
        named.add(root, CLIP_PREFIX, kind, lambda shapes: clip_names(clip, shapes))
    return KeyMap(family, named.layers, named.norms, frozenset(named.biases))


@dataclass
class _Named:
    """The parts of a KeyMap."""

    layers: dict[str, LayerKey] = field(default_factory=dict)
    norms: dict[str, LayerKey] = field(default_factory=dict)
    biases: set[str] = field(default_factory=set)

    def add(
        self, root: nn.Module, prefix: str, kind: str, names_of: Callable[[Shapes], Names]
    ) -> None:
        layers, norms = _layers(root, prefix).shapes(), _norms(root, prefix)
        keys = _layer_keys({**layers, **norms}, names_of({**layers, **norms}), kind)
        self.layers |= {path: keys[path] for path in layers}
        self.norms |= {path: keys[path] for path in norms}
        self.biases |= {
            path
            for path in keys
            if getattr(_module_at(root, prefix, path), "bias", None) is not None
        }


def _norms(root: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the modules whose weight has one axis."""
    shapes = {}
    for path, module in root.named_modules():
        name = weight_name(module)
        if name is not None and getattr(module, name).ndim == 1:
            ending = SCALE if name == "scale" else ""
            shapes[prefix + path + ending] = tuple(getattr(module, name).shape)
    return shapes


def _module_at(root: nn.Module, prefix: str, path: str) -> nn.Module:
    """The module of a layer or norm at `path`, which begins with `prefix`."""
    return root.get_submodule(path.removeprefix(prefix).removesuffix(SCALE))


def family_name(patcher: Any) -> str:
    """The field's name of the model's family ("SD1.5", "SDXL", "Flux"), else the host's own."""
    model = patcher.model
    name = type(model).__name__
    if name == "BaseModel":  # SD1.x and SD2.x differ in the width of their text
        return "SD2" if model.model_config.unet_config.get("context_dim") == 1024 else "SD1.5"
    if name == "Lumina2" and is_z_image(model):
        return "Z-Image"
    return _FAMILY_OF_CLASS.get(name, name)


def conditioning_width(patcher: Any) -> int | None:
    """The width of the text conditioning that a MODEL takes, where its config tells."""
    config = patcher.model.model_config.unet_config
    embedder = (config.get("context_embedder_config") or {}).get("params", {})  # SD3
    named = [config.get(name) for name in _WIDTH_NAMES] + [embedder.get("in_features")]
    return next((width for width in named if isinstance(width, int)), None)


def prediction_type(patcher: Any) -> str:
    """What the model predicts, as it is patched: "epsilon", "v", "flow", or "other" (EDM, x0)."""
    sampling, kinds = patcher.get_model_object("model_sampling"), comfy.model_sampling
    if isinstance(sampling, (kinds.CONST, kinds.COSMOS_RFLOW)):
        return "flow"
    if isinstance(sampling, (kinds.EDM, kinds.X0)):
        return "other"
    return "v" if isinstance(sampling, kinds.V_PREDICTION) else "epsilon"


_FAMILY_OF_CLASS = {"QwenImage": "Qwen-Image", "WAN21": "Wan"}
_KOHYA_PREFIXES = {  # kind of naming: prefixes of kohya's name among the host's, best first
    "diffusers": (
        *("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks"),
        *("lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding"),
    ),
    "single": ("lora_te_", "lora_te1_"),
    # The host knows Flux's T5 as lora_te2 (OneTrainer) and as lora_te3, which is kohya's.
    "numbered": ("lora_te3_", "lora_te2_", "lora_te1_"),
}


def _layer_keys(shapes: Shapes, names: Names, kind: str) -> dict[str, LayerKey]:
    meanings = names.by_path()
    layers = {}
    for path, shape in shapes.items():
        named = meanings.get(path, {})
        whole = [name for name, meaning in named.items() if meaning == Meaning(path)]
        kohya = _kohya_name(path, [name for name in whole if name in names.hosts], kind)
        layers[path] = LayerKey(
            path=path,
            shape=shape,
            kohya=kohya,
            aliases=tuple(name for name in whole if name not in (path, kohya)),
            slices={name: meaning.rows for name, meaning in named.items() if meaning.rows},
            swapped=tuple(name for name, meaning in named.items() if meaning.swapped),
            diffusers=tuple(names.diffusers.get(path, ())),
        )
    return layers


def _kohya_name(path: str, names: Collection[str], kind: str) -> str:
    """kohya's name among those that the host knows, so that it reads our files; else the path."""
    for prefix in _KOHYA_PREFIXES.get(kind, ()):
        for name in names:
            if name.startswith(prefix):
                return name
    original = "lora_" + path.replace("diffusion_model.", "unet_", 1).replace(".", "_")
    return original if original in names else path


def is_text_encoder(path: str) -> bool:
    """Whether a layer path is of a text encoder, not of the diffusion model."""
    return path.startswith(CLIP_PREFIX)


def patch_key(path: str) -> str:
    """The key under which the host's patcher holds the weight at `path`, or a layer's bias."""
    key = path.removeprefix(CLIP_PREFIX)
    return key if key.endswith((BIAS, SCALE)) else f"{key}.weight"
