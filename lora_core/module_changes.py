"""What the tensors that a file has for one module say: a change of its weight, and of its bias."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import ADAPTERS, Adapter, Bias, BiasGain, type_of_tensors
from .adapters.ia3 import IA3, PEFT_FACTOR
from .adapters.lokr import PAIRS, LoKr
from .adapters.lora import LoRA
from .adapters.replacement import Replacement
from .tensor_names import (
    BIAS_CHANGE,
    BIAS_GAIN,
    NEW_SHAPE,
    NEW_WEIGHT,
    ROW_MAGNITUDE,
    UP_BIAS,
)

Shape = tuple[int, ...]
FLOAT32_MAX = torch.finfo(torch.float32).max
# Tensors that are multiplied with each other to make ΔW.
_FACTORS = (
    ("lora_up.weight", "lora_mid.weight", "lora_down.weight"),
    ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ("a1.weight", "a2.weight"),
    ("b1.weight", "b2.weight"),
)
_WHOLE_LOKR = PAIRS.keys()  # the names of its two blocks where neither is a product


@dataclass(frozen=True)
class Changes:
    """Adapters of a weight and of its bias, in float32, as own copies; None where there is none."""

    weight: Adapter | None
    bias: Adapter | None
    problems: list[str]


def changes_of(tensors: Mapping[str, Tensor], shape: Shape, *, has_bias: bool) -> Changes:
    """From {the adapter's name: tensor}, for a weight of `shape`.

    Nothing is given of tensors that have a problem.
    """
    tensors = dict(tensors)
    new_shape = tensors.pop(NEW_SHAPE, None)
    if _WHOLE_LOKR <= tensors.keys() and "alpha" in tensors and not is_finite(tensors["alpha"]):
        del tensors["alpha"]  # counts for nothing; lora_dim 100000, as LyCORIS has it, in float16
    problems = [text for name, tensor in tensors.items() if (text := _unfit(name, tensor))]
    if new_shape is not None and (wanted := tuple(new_shape.flatten().tolist())) != shape:
        problems.append(
            f"made for a layer of {wanted}, which the model has as {shape}; a control LoRA widens"
            " it, which only the host's own loader can do"
        )
    if problems:
        return Changes(None, None, problems)
    owned = {name: t.detach().to(torch.float32, copy=True) for name, t in tensors.items()}
    bias_names = (BIAS_CHANGE, UP_BIAS, BIAS_GAIN)
    of_bias = {name: owned.pop(name) for name in bias_names if name in owned}
    if not owned and not of_bias:
        return Changes(None, None, [])
    try:
        weight = _weight(owned, shape) if owned.keys() - {"alpha"} or not of_bias else None
        if has_bias and PEFT_FACTOR in tensors and isinstance(weight, IA3) and not weight.on_input:
            of_bias[BIAS_GAIN] = weight.weight.detach().flatten().clone()
        bias = _bias(of_bias, weight, shape, has_bias) if of_bias else None
    except ValueError as error:
        return Changes(None, None, [str(error)])
    return Changes(weight, bias, [])


def _weight(tensors: dict[str, Tensor], shape: Shape) -> Adapter:
    if ROW_MAGNITUDE in tensors:
        if "dora_scale" in tensors:
            raise ValueError(f"{ROW_MAGNITUDE} and dora_scale are both there")
        tensors["dora_scale"] = tensors.pop(ROW_MAGNITUDE).flatten()
    if NEW_WEIGHT in tensors and len(tensors) > 1:
        others = ", ".join(sorted(tensors.keys() - {NEW_WEIGHT}))
        raise ValueError(f"{others} does not go with {NEW_WEIGHT}")
    if NEW_WEIGHT in tensors:
        return Replacement.from_tensors(tensors, shape)
    kind = type_of_tensors({name: tensor.shape for name, tensor in tensors.items()})
    if kind is None:
        raise ValueError(_missing(tensors))
    if extra := sorted(tensors.keys() - kind.names() - {"alpha"}):
        raise ValueError(f"{', '.join(extra)} does not go with the type {kind.name}")
    return kind.from_tensors(tensors, shape)


def _bias(
    tensors: Mapping[str, Tensor], weight: Adapter | None, shape: Shape, has_bias: bool
) -> Adapter:
    """diff_b and ia3_b as they are; the bias of an up is scaled as its LoRA is (PEFT
    tuners/lora/layer.py).
    """
    if len(tensors) > 1:
        raise ValueError(f"{' and '.join(tensors)} are both there")
    if not has_bias:
        raise ValueError(f"{', '.join(tensors)} changes a bias, which the layer does not have")
    if BIAS_GAIN in tensors:
        return BiasGain.from_tensors(dict(tensors), shape[:1])
    if BIAS_CHANGE in tensors:
        return Bias.from_tensors(dict(tensors), shape[:1])
    if not isinstance(weight, LoRA):
        raise ValueError(f"{UP_BIAS} does not go without a LoRA")
    return Bias.from_tensors({BIAS_CHANGE: tensors[UP_BIAS] * weight.scale}, shape[:1])


def _missing(found: Iterable[str]) -> str:
    """What the form with the most tensors in common still lacks."""
    present = set(found)
    forms = [form for cls in ADAPTERS.values() for form in cls.forms]
    nearest = max(forms, key=lambda form: (len(form & present), -len(form - present)))
    lacking = ", ".join(sorted(nearest - present))
    return f"{lacking} is missing; there is only {', '.join(sorted(present))}"


def _unfit(name: str, tensor: Tensor) -> str:
    """Why a tensor can't be used whatever the layer; "" when it can. Single whole numbers can."""
    if not tensor.is_floating_point() and (tensor.numel() != 1 or tensor.is_complex()):
        return f"{name} is {tensor.dtype}, expected floating point"
    if tensor.numel() == 0:
        return f"{name} is empty: {tuple(tensor.shape)}"
    if not is_finite(tensor):
        bad = int((~tensor.float().isfinite()).sum())
        return f"{name} has {bad} of {tensor.numel()} values that are not finite (NaN or infinite)"
    return ""


def largest_change(adapter: Adapter) -> float:
    """A bound of the numbers that ΔW can have, over all ways to multiply its factors.

    max|F1| · max|F2| · ... · rank^(n-1) for n factors, times alpha / rank where that is above 1
    and counts; of other tensors max|T|. Not finite where one of them is not.
    """
    largest = {name: _largest(tensor) for name, tensor in adapter.tensors().items()}
    bounds = [0.0, *largest.values()]
    is_scaled = adapter.has_alpha and not (isinstance(adapter, LoKr) and adapter.is_whole)
    scale = max(abs(adapter.alpha) / adapter.rank, 1.0) if is_scaled else 1.0
    for names in _FACTORS:
        found = [largest[name] for name in names if name in largest]
        if found:
            bounds.append(math.prod(found) * float(adapter.rank) ** (len(found) - 1) * scale)
    return max(bounds, key=lambda bound: (not math.isfinite(bound), bound))


def _largest(tensor: Tensor) -> float:
    low, high = tensor.detach().aminmax()
    return max(-low.item(), high.item())


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    By the smallest and largest, which NaN passes through: a sixth of the time of `isfinite`.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8 has no order of its own in torch
        tensor = tensor.float()
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
