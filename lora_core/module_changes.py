"""What the tensors that a file has for one module say: a change of its weight, and of its bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import ADAPTERS, Adapter, Bias, BiasGain, type_of_tensors
from .adapters.ia3 import IA3, PEFT_FACTOR
from .adapters.lora import LoRA
from .tensor_names import BIAS_CHANGE, BIAS_GAIN, ROW_MAGNITUDE, UP_BIAS

Shape = tuple[int, ...]


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
    problems = [text for name, tensor in tensors.items() if (text := _unfit(name, tensor))]
    if problems:
        return Changes(None, None, problems)
    owned = {name: t.detach().to(torch.float32, copy=True) for name, t in tensors.items()}
    bias_names = (BIAS_CHANGE, UP_BIAS, BIAS_GAIN)
    of_bias = {name: owned.pop(name) for name in bias_names if name in owned}
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


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    By the smallest and largest, which NaN passes through: a sixth of the time of `isfinite`.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8 has no order of its own in torch
        tensor = tensor.float()
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
