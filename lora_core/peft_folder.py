"""Adapters as a folder that PEFT loads: the tensors' names and adapter_config.json.

A folder holds one type for one model: LoRAs, LoHas, (IA)³ or PEFT's own OFT. PEFT makes the blocks
of a LoKr by a rule of its own, and has no other type that files here hold. What is written in
float32 is read back bit for bit, but for (IA)³: PEFT's factor is 1 + w, which rounds w by 6e-8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .adapters import Adapter, Bias, BiasGain
from .adapters.ia3 import IA3, PEFT_FACTOR, peft_size
from .adapters.loha import CORES, LoHa
from .adapters.lora import LoRA
from .adapters.oft_input import VALUES, InputOFT
from .diffusers_format import lora_settings, lora_tensors, named_pieces, partly_dora, scale_settings
from .key_map import BIAS, KeyMap
from .lora_reading import LoraFileError, some
from .peft_config import CONFIG

_WRAPPER = "base_model.model."

Named = Mapping[str, Adapter]  # {module's name in the base: its adapter}
Folder = tuple[dict[str, Tensor], dict[str, object]]  # tensors without the wrapper, settings


def peft_folder(
    adapters: Mapping[str, Adapter], keymap: KeyMap
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of adapter_model.safetensors, and {adapter_config.json: its text}.

    Raises LoraFileError for layers without a name, for types that PEFT has not or not so, and for
    more than one type or model.
    """
    named, problems = named_pieces(adapters, keymap)
    weights = [(name, it) for name, it in named if not isinstance(it, (Bias, BiasGain))]
    kinds = {type(it) for _, it in weights}
    parts = sorted({name.partition(".")[0] for name, _ in weights})
    if len(kinds) != 1 or not kinds <= _WRITERS.keys():
        known, found = (
            ", ".join(sorted(it.__name__ for it in kind)) for kind in (_WRITERS.keys(), kinds)
        )
        problems.append(f"a PEFT folder holds one type of {known}, not {found or 'nothing'}")
    if len(parts) > 1:
        problems.append(f"a PEFT folder is for one model, not for {', '.join(parts)}")
    problems += _bias_problems(adapters, keymap)
    if not problems:
        modules = {name.partition(".")[2]: it for name, it in weights}
        try:
            tensors, settings = _WRITERS[kinds.pop()](modules)
        except ValueError as error:
            problems = [str(error)]
    if problems:
        raise LoraFileError("the LoRA can't be written for PEFT", problems)
    text = json.dumps(settings, indent=2, sort_keys=True)
    return {_WRAPPER + key: tensor for key, tensor in tensors.items()}, {CONFIG: text}


def _bias_problems(adapters: Mapping[str, Adapter], keymap: KeyMap) -> list[str]:
    """PEFT's (IA)³ of outputs scales biases as it does weights; nothing else there changes any."""
    unlike, others = [], []
    for path, adapter in adapters.items():
        gain = adapters.get(path + BIAS)
        if isinstance(adapter, (Bias, BiasGain)):
            owner = adapters.get(path.removesuffix(BIAS))
            others += [path] if not isinstance(adapter, BiasGain) or owner is None else []
        elif isinstance(adapter, IA3) and path in keymap.biases:
            wanted = None if adapter.on_input else adapter.weight.flatten()
            found = gain.diff if isinstance(gain, BiasGain) else None
            is_same = wanted is found is None
            if wanted is not None and found is not None:
                is_same = bool(torch.equal(wanted, found))
            unlike += [] if is_same else [path]
    problems = []
    if others:
        problems.append(f"PEFT has no changes of biases alone: {some(others)}")
    if unlike:
        problems.append(
            f"PEFT's (IA)³ of outputs scales the layer's bias, too, which this one leaves as it is:"
            f" {some(unlike)}"
        )
    return problems


def _lora(modules: Named) -> Folder:
    loras = {name: it for name, it in modules.items() if isinstance(it, LoRA)}
    tucker = [name for name, lora in loras.items() if lora.mid is not None]
    problems = [f"PEFT has no Tucker forms of a LoRA: {some(tucker)}"] if tucker else []
    tensors: dict[str, Tensor] = {}
    for name, lora in loras.items():
        try:
            tensors |= lora_tensors(name, lora)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    problems += partly_dora("the model", loras)
    if problems:
        raise ValueError("; ".join(problems))
    return tensors, lora_settings(loras)


def _loha(modules: Named) -> Folder:
    """Only of one rank, and on convolutions with a kernel all in the Tucker form or none."""
    lohas = {name: it for name, it in modules.items() if isinstance(it, LoHa)}
    has_kernel = [it for it in lohas.values() if math.prod(it.shape[2:]) > 1]
    tucker = {CORES[0] in it.parts for it in has_kernel}
    unfit = [
        name
        for name, it in lohas.items()
        if it.magnitude is not None
        or len(it.shape) > 4
        or it.parts["hada_w1_b"].shape[0] != it.parts["hada_w2_b"].shape[0]
        or (len(it.shape) == 3 and CORES[0] in it.parts)
    ]
    if unfit:
        raise ValueError(f"PEFT has no LoHa with DoRA, two ranks or on such a layer: {some(unfit)}")
    if len(tucker) > 1:
        raise ValueError("PEFT's LoHas of convolutions are all in the Tucker form or none")
    tensors = {
        f"{name}.{key}": tensor.detach()
        for name, it in lohas.items()
        for key, tensor in it.parts.items()
    }
    return tensors, {
        "peft_type": "LOHA",
        **scale_settings(lohas, "alpha"),
        "use_effective_conv2d": tucker == {True},
        "target_modules": sorted(lohas),
        "inference_mode": True,
    }


def _ia3(modules: Named) -> Folder:
    factors = {name: it for name, it in modules.items() if isinstance(it, IA3)}
    tensors = {
        f"{name}.{PEFT_FACTOR}": (1.0 + it.weight.detach()).reshape(
            peft_size(it.shape, it.on_input)
        )
        for name, it in factors.items()
    }
    inputs = [name for name, it in factors.items() if it.on_input]
    return tensors, {
        "peft_type": "IA3",
        "target_modules": _exactly(factors),
        "feedforward_modules": _exactly(inputs) if inputs else [],
        "inference_mode": True,
    }


def _oft(modules: Named) -> Folder:
    """Blocks of one size, or as many of them in every layer; settings are of all layers."""
    turns = {name: it for name, it in modules.items() if isinstance(it, InputOFT)}
    sizes, terms = ({getattr(it, key) for it in turns.values()} for key in ("rank", "terms"))
    counts = {len(it.values) for it in turns.values()}
    shared = {len(it.values) * it.rank < math.prod(it.shape[1:]) for it in turns.values()}
    if len(terms) > 1 or len(shared) > 1 or len(sizes) > 1 and (len(counts) > 1 or True in shared):
        raise ValueError(
            "PEFT's OFT has one block size or number of blocks for all layers, one number of terms,"
            f" and blocks shared in all layers or in none; here are sizes {sorted(sizes)}, numbers"
            f" {sorted(counts)} and terms {sorted(terms)}"
        )
    (term,) = terms
    tensors = {f"{name}.{VALUES}": it.values.detach() for name, it in turns.items()}
    return tensors, {
        "peft_type": "OFT",
        "r": 0 if len(sizes) == 1 else counts.pop(),
        "oft_block_size": sizes.pop() if len(sizes) == 1 else 0,
        "block_share": shared == {True},
        "use_cayley_neumann": term > 0,
        **({"num_cayley_neumann_terms": term} if term else {}),
        "coft": False,
        "bias": "none",
        "target_modules": _exactly(turns),
        "inference_mode": True,
    }


def _exactly(names: Iterable[str]) -> str:
    """A pattern of these names alone: of a name in a list, PEFT takes every other's ending, too."""
    return "|".join(re.escape(name) for name in sorted(names))


_WRITERS: dict[type[Adapter], Callable[[Named], Folder]] = {
    LoRA: _lora,
    LoHa: _loha,
    IA3: _ia3,
    InputOFT: _oft,
}
