"""PEFT's and LyCORIS' ΔW for an adapter's tensors, where each of them can be trusted.

Where not, and by how much each is off, is in `test_known_bugs.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .samples import Sample

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def peft_applies(sample: Sample) -> bool:
    """LoRA without a core, DoRA on it along the out axis; LoHa and LoKr up to Conv2d.

    Not a whole LoKr, which PEFT scales by alpha / rank, nor a Tucker one on Conv1d, on which its
    Kronecker product raises for some strides.
    """
    names, name = sample.tensors.keys(), sample.case.name
    if name == "lora":
        return sample.magnitude != "in" and "lora_mid.weight" not in names
    if sample.magnitude is not None or len(sample.shape) > 4:
        return False
    if name == "lokr":
        is_whole = {"lokr_w1", "lokr_w2"} <= names
        return not is_whole and not ("lokr_t2" in names and len(sample.shape) == 3)
    return name == "loha"


def peft_delta(sample: Sample) -> Tensor:
    import peft

    name, tensors = sample.case.name, sample.tensors
    common = {"r": sample.rank, "target_modules": ["layer"]}
    alpha = sample.alpha
    configs = {
        "lora": lambda: peft.LoraConfig(
            **common, lora_alpha=alpha, use_dora=sample.magnitude is not None
        ),
        "loha": lambda: peft.LoHaConfig(**common, alpha=alpha, use_effective_conv2d=True),
        "lokr": lambda: peft.LoKrConfig(**common, alpha=alpha, use_effective_conv2d=True),
    }
    layer = plain_layer(sample)
    model = peft.get_peft_model(nn.ModuleDict({"layer": layer}), configs[name]())
    theirs: Any = model.base_model.model["layer"].to(sample.dtype).eval()
    if name == "lora":
        theirs.lora_A["default"].weight.data = tensors["lora_down.weight"]
        theirs.lora_B["default"].weight.data = tensors["lora_up.weight"]
        if sample.magnitude is not None:
            magnitude = theirs.lora_magnitude_vector["default"].weight
            magnitude.data = tensors["dora_scale"].reshape(magnitude.shape)
            return weight_of(theirs, sample) - sample.weight
    else:
        for label in theirs.adapter_layer_names:
            parameters = getattr(theirs, label)
            parameters.clear()
            if label in tensors:
                parameters["default"] = nn.Parameter(_with_2d_kernel(tensors[label]))
    return theirs.get_delta_weight("default").detach()


def lycoris_function_applies(sample: Sample) -> bool:
    """Plain changes; not LoKr's Tucker form, whose rank it reads from the wrong axis."""
    known = sample.case.name in ("lora", "loha", "lokr")
    return known and sample.magnitude is None and "lokr_t2" not in sample.tensors


def lycoris_function_delta(sample: Sample) -> Tensor:
    from lycoris.functional import locon, loha, lokr

    tensors, scale = sample.tensors, sample.alpha / sample.rank
    functions = {
        "lora": (locon, ("lora_down.weight", "lora_up.weight", "lora_mid.weight"), scale),
        "loha": (
            loha,
            ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2"),
            torch.tensor(scale, dtype=sample.dtype),
        ),
        "lokr": (
            lokr,
            ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            sample.alpha,
        ),
    }
    module, labels, gamma = functions[sample.case.name]
    change = module.diff_weight(*(tensors.get(label) for label in labels), gamma=gamma)
    return change.reshape(sample.shape)


def lycoris_module_applies(sample: Sample) -> bool:
    return sample.case.name in ("lora", "loha", "lokr")


def lycoris_module_delta(sample: Sample) -> Tensor:
    """By the module's forward at multiplier 1: its other ways to a weight are wrong."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    modules = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
    options = sample.case.options
    theirs = modules[sample.case.name](
        "layer",
        plain_layer(sample),
        lora_dim=sample.rank,
        alpha=sample.alpha,
        use_tucker=options.tucker,
        factor=options.factor,
        decompose_both=options.decompose_both,
        weight_decompose=sample.magnitude is not None,
        wd_on_out=sample.magnitude != "in",
    ).to(sample.dtype)
    named = dict(theirs.named_parameters())
    tensors = {n: t for n, t in sample.tensors.items() if n != "alpha"}
    assert named.keys() == tensors.keys()
    for name, parameter in named.items():
        tensor = tensors[name]
        if name == "dora_scale" and sample.magnitude == "1d":
            tensor = tensor.reshape(parameter.shape)
        assert parameter.shape == tensor.shape, name
        parameter.data = tensor
    return weight_of(theirs, sample) - sample.weight


def plain_layer(sample: Sample) -> nn.Module:
    """A layer with the sample's weight, without bias, stride, padding and dilation."""
    out, into, *kernel = sample.shape
    if kernel:
        layer = CONVOLUTIONS[len(sample.shape)](into, out, tuple(kernel), bias=False)
    else:
        layer = nn.Linear(into, out, bias=False)
    layer.weight = nn.Parameter(sample.weight.clone(), requires_grad=False)
    return layer


def weight_of(module: nn.Module, sample: Sample) -> Tensor:
    """The weight that a module without a bias has, from its outputs for one 1 at every place."""
    out, *rest = sample.shape
    places = torch.eye(sample.weight[0].numel(), dtype=sample.dtype).reshape(-1, *rest)
    with torch.no_grad():
        return module(places).reshape(-1, out).t().reshape(sample.shape)


def _with_2d_kernel(tensor: Tensor) -> Tensor:
    """PEFT keeps the core of a Conv1d as that of a Conv2d."""
    return tensor[..., None] if tensor.ndim == 3 else tensor
