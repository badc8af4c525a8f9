"""What adapter_config.json says of PEFT's (IA)³ and OFT, in tensors that their types read.

These two have no alpha. (IA)³ lists the layers whose inputs it scales (`feedforward_modules`), and
OFT has the way from a block to a rotation (PEFT tuners/ia3/config.py, tuners/oft/config.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters.ia3 import PEFT_FACTOR
from .adapters.oft_input import MAX_TERMS, TERMS, VALUES
from .name_patterns import whole_names

Settings = Mapping[str, object]
OFT, IA3 = "OFT", "IA3"  # as `peft_type` has them


def problems(kind: str, settings: Settings) -> list[str]:
    """Settings that can't be read, each with its name."""
    return _oft_problems(settings) if kind == OFT else _ia3_problems(settings)


def added_tensors(
    kind: str, settings: Settings, name: str, found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors to add to those `found` of the module that the base calls `name`, or in their place.

    Only for settings without problems.
    """
    if kind == IA3 and PEFT_FACTOR in found:
        modules = settings.get("feedforward_modules")
        if isinstance(modules, str):
            return {"on_input": torch.tensor(int(whole_names(modules)(name)))}
        if isinstance(modules, list):
            return {"on_input": torch.tensor(int(name.endswith(tuple(modules))))}
    if kind == OFT and VALUES in found:
        is_series = settings["use_cayley_neumann"]
        terms = torch.tensor(settings["num_cayley_neumann_terms"] if is_series else 0)
        limited = (
            _limited(found[VALUES], settings["eps"]) if settings.get("coft") else found[VALUES]
        )
        return {TERMS: terms, VALUES: limited}
    return {}


def _limited(values: Tensor, eps: object) -> Tensor:
    """Blocks whose ‖Q‖ is at most eps / √N, as PEFT's `_project_batch` makes them for coft."""
    assert isinstance(eps, (int, float))
    if values.ndim != 2 or not values.numel():
        return values
    limit = eps / math.sqrt(len(values))
    norms = math.sqrt(2.0) * torch.linalg.vector_norm(values.float(), dim=1, keepdim=True)
    return torch.where(norms <= limit, values.float(), values.float() * (limit / norms))


def _oft_problems(settings: Settings) -> list[str]:
    found = []
    is_series = settings.get("use_cayley_neumann")
    if not isinstance(is_series, bool):  # the default differs between PEFT's versions
        found.append(f"use_cayley_neumann is {_shown(is_series)}, expected true or false")
    terms = settings.get("num_cayley_neumann_terms")
    is_count = isinstance(terms, int) and not isinstance(terms, bool) and 2 <= terms <= MAX_TERMS
    if is_series is True and not is_count:
        found.append(
            f"num_cayley_neumann_terms is {_shown(terms)}, expected a number from 2 to {MAX_TERMS}"
        )
    eps = settings.get("eps")
    is_real = isinstance(eps, (int, float)) and not isinstance(eps, bool) and 0 < eps < 1e9
    if settings.get("coft") and not is_real:
        found.append(f"eps is {_shown(eps)}, expected a number above 0")
    return found


def _ia3_problems(settings: Settings) -> list[str]:
    modules = settings.get("feedforward_modules")
    if isinstance(modules, str):
        try:
            whole_names(modules)
        except ValueError as error:
            return [f"feedforward_modules: {error}"]
    names = modules if isinstance(modules, list) else []
    if modules is not None and not isinstance(modules, (str, list)):
        return [f"feedforward_modules is {_shown(modules)}, expected names or a pattern"]
    return ["feedforward_modules has entries that are no names"] * any(
        not isinstance(name, str) for name in names
    )


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:80]
