"""Put adapters on the layers of a live module, and take them off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import BIASES, Adapter, Layer


@contextmanager
def attached(
    layers: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], facts: Mapping[str, Layer]
) -> Iterator[None]:
    """While the context lasts, each layer's output is its adapter's `forward`.

    By forward hooks, never by assigning `forward`: the host's own injections put back the
    forward that they remember and would drop ours. Several contexts nest and their changes add
    up, or follow one another where a type acts on the output. A bias changes after the weight of
    its layer, since such a type takes the model's own bias off the output. Raises ValueError,
    before anything is attached, for an adapter without a layer or of another shape.
    """
    known = layers.keys() & facts.keys()
    problems = [f"{path}: no such layer" for path in adapters if path not in known]
    problems += [
        f"{path}: the adapter is for {tuple(adapter.shape)}, the layer is {facts[path].shape}"
        for path, adapter in adapters.items()
        if path in known and tuple(adapter.shape) != tuple(facts[path].shape)
    ]
    if problems:
        raise ValueError("adapters that do not fit the model:\n" + "\n".join(problems))
    handles = []
    biases = tuple(BIASES.values())
    try:
        for path, adapter in sorted(adapters.items(), key=lambda one: isinstance(one[1], biases)):
            handles.append(layers[path].register_forward_hook(_hook(adapter, facts[path])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(adapter: Adapter, layer: Layer) -> Any:
    def add_change(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if adapter.is_dropped:
            return output
        x = args[0]
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return adapter(x, output, layer)
        # Autocast takes x to the dtype of the layer's output. So do we, and then switch it off: it
        # would cast inside of the adapters' own functions, whose backward runs without it.
        with torch.autocast(kind, enabled=False):
            return adapter(x.to(output.dtype), output, layer)

    return add_change
