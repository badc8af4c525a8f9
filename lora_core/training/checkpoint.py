"""Write a Training's state to disk and read it back, bit for bit. safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomically
from ..safetensors_file import read_tensors, serialize
from .loop import Training

STATE_FORMAT = 1


def save_state(training: Training, path: Path) -> None:
    """Adapters, optimizer, loss scale, losses and step, in one safetensors file.

    Random numbers and the position in the data are functions of the step, so they need no place.
    Written to a temporary name, synced and renamed.
    """
    training.read()
    tensors: dict[str, Tensor] = {"losses": torch.tensor(training.losses, dtype=torch.float64)}
    optimizer: dict[str, list[str]] = {}
    for index, parameter in enumerate(training.parameters):
        state = training.optimizer.state[parameter]
        tensors[f"parameter.{index}"] = parameter.detach()
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        optimizer[str(index)] = sorted(state)
    tensors["loss_scale.scale"] = training.loss_scale.scale
    tensors["loss_scale.good_steps"] = training.loss_scale.good_steps
    header = {
        "format": STATE_FORMAT,
        "step": training.step,
        "layers": list(training.adapters),
        "optimizer": optimizer,  # names of its tensors, by index of the parameter
    }
    write_atomically(path, serialize(tensors, {"state": json.dumps(header)}))


def load_state(training: Training, path: Path) -> None:
    """Put a saved state into a fresh Training of the same config and layers.

    Raises ValueError naming the file, and changes nothing, where it is damaged or of another run.
    """
    tensors, metadata = read_tensors(path)
    header = _header(metadata)
    problems = _problems(training, header, tensors)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} is not a state of this run: " + "; ".join(problems[:8]) + more)
    with torch.no_grad():
        for index, parameter in enumerate(training.parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
            training.optimizer.state[parameter] = {
                name: value.to(parameter.device)
                for name, value in _optimizer_state(tensors, index).items()
            }
        training.loss_scale.scale.copy_(tensors["loss_scale.scale"])
        training.loss_scale.good_steps.copy_(tensors["loss_scale.good_steps"])
    training.losses = tensors["losses"].tolist()
    training.step = header["step"]


def saved_losses(path: Path) -> list[float]:
    """The losses of a saved state, one a step. Raises ValueError where it is damaged."""
    tensors, _ = read_tensors(path)
    if "losses" not in tensors:
        raise ValueError(f"{path} is not a state of a run: losses is missing")
    losses: list[float] = tensors["losses"].tolist()
    return losses


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save_state` wrote beside the tensors, or an empty one."""
    try:
        header = json.loads(metadata.get("state", ""))
    except json.JSONDecodeError:
        return {}
    return header if isinstance(header, dict) else {}


def _problems(
    training: Training, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[str]:
    """What keeps a state from fitting this Training."""
    if header.get("format") != STATE_FORMAT:
        return [f"its format is {header.get('format')}, expected {STATE_FORMAT}"]
    if header.get("layers") != list(training.adapters):
        return ["it has other layers"]
    step = header.get("step")
    if not isinstance(step, int) or step < 0:
        return [f"its step is {step!r}"]
    optimizer = header.get("optimizer")
    if not isinstance(optimizer, dict):
        return ["it does not name its optimizer's tensors"]
    shapes = {"losses": (step,), "loss_scale.scale": (), "loss_scale.good_steps": ()}
    for index, parameter in enumerate(training.parameters):
        shapes[f"parameter.{index}"] = tuple(parameter.shape)
        for name in optimizer.get(str(index), []):
            scalar = name == "step"
            shapes[f"optimizer.{index}.{name}"] = () if scalar else tuple(parameter.shape)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return [
        f"{name} is {found.get(name, 'missing')}, expected {shapes.get(name, 'none')}"
        for name in sorted(shapes.keys() | found.keys())
        if shapes.get(name) != found.get(name)
    ]


def _optimizer_state(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"optimizer.{index}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
