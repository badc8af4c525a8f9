"""What the pack needs to know of a MODEL and a CLIP: their layers, names and base weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_sampling
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ..adapters import Layer
from ..key_map import BIAS, MODULATION, SCALE, KeyMap
from ..layer_names import key_map_of
from ..network import CLIP_PREFIX, UNET_PREFIX, Network
from . import layer_names

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
    return layers_by_path(root, prefix, layer_facts)


def layers_by_path(
    root: nn.Module, prefix: str, facts_of: Callable[[nn.Module], Layer | None]
) -> ModelLayers:
    """The modules that `facts_of` gives a Layer of, by the paths of their weights."""
    found = ModelLayers({}, {})
    for name, module in root.named_modules():
        layer = facts_of(module)
        if layer is not None:
            path = prefix + name + (SCALE if weight_name(module) == "scale" else "")
            found.modules[path], found.facts[path] = module, layer
    return found


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
    return replace(
        layer,
        shape=layer.shape[:1],
        channel_axis=1 if len(layer.shape) > 2 else layer.channel_axis,
        normalized=None,
    )


def base_weight(module: nn.Module) -> Callable[[], Tensor]:
    """A callable that gives the weight that the module computes with, patched or not, in float32.

    Dequantised, and times its scale, which some of the host's operations keep apart from it.
    """

    def weight() -> Tensor:
        if hasattr(module, "cast_bias_weight"):  # GGUF layers bring their own
            found = module.cast_bias_weight(dtype=torch.float32)[0]  # type: ignore[operator]
        elif hasattr(module, "comfy_cast_weights"):
            found = comfy.ops.cast_bias_weight(module, dtype=torch.float32)[0]
        else:
            found = getattr(module, weight_name(module) or "weight")
        return _converted(module, found)

    return weight


def _converted(module: nn.Module, stored: Tensor) -> Tensor:
    """A weight as the module stores it in float32: the numbers that it stands for."""
    if hasattr(module, "convert_weight"):  # comfy/ops.py scaled_fp8_ops, mixed_precision_ops
        stored = module.convert_weight(stored)  # type: ignore[operator]
    if hasattr(stored, "_qdata"):  # 0.33's quantised tensors call themselves float32 already
        stored = stored.dequantize()
    return stored.to(torch.float32)


def unpatched_weights(model: Any | None, clip: Any | None) -> Callable[[str], Tensor] | None:
    """A callable from any path of a key map, or of its bias, to what is there, in float32.

    As it is without any patch, hook or live stack, whichever clone of the model is loaded. None
    where neither a MODEL nor a CLIP is given; it raises KeyError for paths of the other one.
    """
    patchers: dict[str, Any] = {}
    if model is not None:
        patchers[UNET_PREFIX] = model
    if clip is not None:
        patchers[CLIP_PREFIX] = clip.patcher

    def weight(path: str) -> Tensor:
        patcher = patchers[CLIP_PREFIX if is_text_encoder(path) else UNET_PREFIX]
        key = patch_key(path)
        owner, _, name = key.rpartition(".")
        module = patcher.model.get_submodule(owner)
        if hasattr(module, "cast_bias_weight"):  # GGUF layers bring their own
            both = module.cast_bias_weight(dtype=torch.float32)
            return both[name == "bias"].to(torch.float32)
        stored = _stored(patcher, key)
        return _converted(module, stored) if name == "weight" else stored.to(torch.float32)

    return weight if patchers else None


def _stored(patcher: Any, key: str) -> Tensor:
    """The parameter as the file had it, which the host keeps while another is in its place."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    if key in patcher.object_patches_backup:
        return patcher.object_patches_backup[key]
    return comfy.utils.get_attr(patcher.model, key)


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
    """The names that LoRA files use for the layers of a live MODEL and CLIP: see `key_map_of`."""
    networks = []
    if patcher is not None:
        networks.append(model_network(patcher.model))
    if clip is not None:
        networks.append(encoder_network(clip.cond_stage_model))
    return key_map_of("text encoder" if patcher is None else family_name(patcher), networks)


_KEY_MAPS: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, KeyMap]]
_KEY_MAPS = WeakKeyDictionary()


def shared_key_map(patcher: Any | None, clip: Any | None) -> KeyMap:
    """`key_map`, made once for the modules of a MODEL and a CLIP, of which one may be None."""
    patchers = (patcher, None if clip is None else clip.patcher)
    given = [one.model for one in patchers if one is not None]
    known = _KEY_MAPS.setdefault(given[0], WeakKeyDictionary())
    if given[-1] not in known:
        known[given[-1]] = key_map(patcher, clip)
    return known[given[-1]]


def model_network(model: Any) -> Network:
    """What the host knows of the diffusion model of its `BaseModel`."""
    bare = _bare_network(model.diffusion_model, UNET_PREFIX)
    return replace(
        bare,
        hosts=layer_names.model_names(model, bare.shapes),
        table=layer_names.diffusers_table(model, bare.shapes),
        style=layer_names.diffusers_style(model),
    )


def encoder_network(encoders: Any) -> Network:
    """What the host knows of a CLIP's text encoders, its `cond_stage_model`."""
    bare = _bare_network(encoders, CLIP_PREFIX)
    return replace(bare, hosts=layer_names.encoder_names(encoders, bare.shapes))


def _bare_network(root: nn.Module, prefix: str) -> Network:
    layers, norms = _layers(root, prefix).shapes(), _norms(root, prefix)
    biases = {
        path
        for path in (*layers, *norms)
        if getattr(module_at(root, prefix, path), "bias", None) is not None
    }
    parameters = {
        prefix + name: tuple(parameter.shape)
        for name, parameter in root.named_parameters()
        if name.endswith(MODULATION)
    }
    embeddings = {
        prefix + name: tuple(module.weight.shape)
        for name, module in root.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return Network(
        layers=layers,
        norms=norms,
        biases=frozenset(biases),
        hosts={},
        parameters=parameters,
        embeddings=embeddings,
    )


def _norms(root: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the modules whose weight has one axis."""
    shapes = {}
    for path, module in root.named_modules():
        name = weight_name(module)
        if name is not None and getattr(module, name).ndim == 1:
            ending = SCALE if name == "scale" else ""
            shapes[prefix + path + ending] = tuple(getattr(module, name).shape)
    return shapes


def module_at(root: nn.Module, prefix: str, path: str) -> nn.Module:
    """The module of the layer, norm or bias at `path`, which begins with `prefix`.

    Raises AttributeError where there is none.
    """
    return root.get_submodule(path.removeprefix(prefix).removesuffix(BIAS).removesuffix(SCALE))


def family_name(patcher: Any) -> str:
    """The field's name of the model's family ("SD1.5", "SDXL", "Flux"), else the host's own."""
    model = patcher.model
    name = type(model).__name__
    if name == "BaseModel":  # SD1.x and SD2.x differ in the width of their text
        return "SD2" if model.model_config.unet_config.get("context_dim") == 1024 else "SD1.5"
    if name == "Lumina2" and layer_names.is_z_image(model):
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


def is_text_encoder(path: str) -> bool:
    """Whether a layer path is of a text encoder, not of the diffusion model."""
    return path.startswith(CLIP_PREFIX)


def patch_key(path: str) -> str:
    """The host's key of the weight at `path`, or of a layer's bias or a parameter itself."""
    key = path.removeprefix(CLIP_PREFIX)
    return key if key.endswith((BIAS, SCALE, MODULATION)) else f"{key}.weight"
