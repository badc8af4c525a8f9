"""The same adapter, with the same numbers, as PEFT, LyCORIS and the host train it.

Each function gives what runs an adapter's layer there, or None where that tool has no such
adapter. `layer` is a frozen layer of its own, which they change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trained:
    """A layer with an adapter: what it computes, and what is trained."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


Peer = Callable[[Any, nn.Module], "Trained | None"]


def peers() -> dict[str, Peer]:
    """What there is on this host, by name. The host must be importable."""
    from comfy.weight_adapter.base import WeightAdapterTrainBase

    found: dict[str, Peer] = {
        "PEFT": peft,
        "LyCORIS": lambda adapter, layer: lycoris(adapter, layer, bypass=False),
        "LyCORIS bypass": lambda adapter, layer: lycoris(adapter, layer, bypass=True),
        "host weights": host_weights,
    }
    if hasattr(WeightAdapterTrainBase, "h"):  # newer than 0.3.75
        found["host bypass"] = host_bypass
    return found


def peft(adapter: Any, layer: nn.Module) -> Trained | None:
    """`get_peft_model` on the layer alone, called without the model around it."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    if adapter.name not in ("lora", "loha", "lokr"):
        return None
    tensors = adapter.tensors()
    dora, core = "dora_scale" in tensors, {"hada_t1", "lokr_t2", "lora_mid.weight"} & set(tensors)
    alpha = adapter.scale * adapter.rank
    common = {"target_modules": ["layer"], "r": adapter.rank}
    if adapter.name == "lora" and not core:
        config = LoraConfig(lora_alpha=alpha, use_dora=dora, **common)
    elif adapter.name == "loha" and not dora:
        config = LoHaConfig(alpha=alpha, use_effective_conv2d=bool(core), **common)
    elif adapter.name == "lokr" and not dora:
        config = LoKrConfig(
            alpha=alpha,
            use_effective_conv2d=bool(core),
            decompose_both="lokr_w1_a" in tensors,
            decompose_factor=len(tensors.get("lokr_w1", tensors.get("lokr_w1_a"))),
            **common,
        )
    else:
        return None
    model = get_peft_model(nn.ModuleDict({"layer": layer}), config)
    module = model.base_model.model["layer"]
    names = {"lora_up.weight": "lora_B", "lora_down.weight": "lora_A"}
    names["dora_scale"] = "lora_magnitude_vector"
    targets = {name.split(".")[0]: value for name, value in module.named_parameters()}
    wanted = {names.get(name, name): value for name, value in tensors.items() if value.ndim}
    if any(targets[name].numel() != value.numel() for name, value in wanted.items()):
        return None  # cut into other blocks
    with torch.no_grad():
        for name, value in wanted.items():
            targets[name].copy_(value.reshape(targets[name].shape))
    return _trained(module, module.parameters())


def lycoris(adapter: Any, layer: nn.Module, *, bypass: bool) -> Trained | None:
    """A LyCORIS module put on the layer; by default it rebuilds the weight, or bypasses it."""
    from lycoris.modules import get_module, make_module

    tensors = adapter.tensors()
    if bypass and "dora_scale" in tensors:
        return None  # it leaves the magnitude out
    named = {f"layer.{name}": value for name, value in tensors.items()}
    algorithm, parts = get_module(named, "layer")
    if adapter.name == "ia3":
        parts = parts[:1]  # its maker takes the weight alone
    module = algorithm and make_module(algorithm, parts, "layer", layer)
    if module is None:
        return None
    module.bypass_mode = bypass
    module.apply_to()
    return _trained(layer, module.parameters())


def host_weights(adapter: Any, layer: nn.Module) -> Trained | None:
    """core's TrainLoraNode: the adapter is a function on the weight, run at each forward."""
    trained = _host_adapter(adapter)
    if trained is None:
        return None
    module = _host_layer(layer)
    module.weight_function = [trained]
    return _trained(module, trained.parameters())


def host_bypass(adapter: Any, layer: nn.Module) -> Trained | None:
    """core's TrainLoraNode in bypass mode: the adapter runs beside the layer."""
    from comfy.weight_adapter.bypass import BypassForwardHook

    trained = _host_adapter(adapter)
    if trained is None or adapter.name == "loha":  # its h is not implemented
        return None
    module = _host_layer(layer)
    hook = BypassForwardHook(module, trained)
    hook.inject()
    return _trained(module, trained.parameters())


def _host_adapter(adapter: Any) -> Any:
    """The host's own adapter for training, made from a file's tensors as it resumes from one."""
    from comfy.weight_adapter import adapter_maps

    tensors = adapter.tensors()
    if {"dora_scale", "lora_mid.weight"} & set(tensors):
        return None  # it trains neither
    named = {  # the host trains convolutions as flattened matrices
        f"layer.{name}": value.flatten(1) if name.startswith("lora_") else value
        for name, value in tensors.items()
        if value.ndim
    }
    for known in adapter_maps.values():
        loaded = known.load("layer", named, adapter.alpha, None)
        if loaded is not None:
            return loaded.to_train()
    return None


def _host_layer(layer: nn.Module) -> nn.Module:
    """The layer as the host's class for it."""
    import comfy.ops

    known = getattr(comfy.ops.disable_weight_init, type(layer).__name__)
    names = inspect.signature(type(layer)).parameters
    settings = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    module = known(**settings | {"bias": layer.bias is not None})
    module.load_state_dict(layer.state_dict())
    return module.requires_grad_(False)


def _trained(forward: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter]) -> Trained:
    return Trained(forward, [parameter for parameter in parameters if parameter.requires_grad])
