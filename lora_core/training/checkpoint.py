"""Write a Training's state to disk and read it back, bit for bit. safetensors and JSON only."""

from __future__ import annotations

import json
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
    for index, parameter in enumerate(training.parameters):
        tensors[f"parameter.{index}"] = parameter.detach()
        for name, value in training.optimizer.state[parameter].items():
            tensors[f"optimizer.{index}.{name}"] = value
    tensors["loss_scale.scale"] = training.loss_scale.scale
    tensors["loss_scale.good_steps"] = training.loss_scale.good_steps
    header = {"format": STATE_FORMAT, "step": training.step, "layers": list(training.adapters)}
    write_atomically(path, serialize(tensors, {"state": json.dumps(header)}))


def load_state(training: Training, path: Path) -> None:
    """Put a saved state into a fresh Training of the same config and layers.

    Raises ValueError naming the file where it is damaged or of other layers or shapes.
    """
    tensors, metadata = read_tensors(path)
    header: dict[str, Any] = json.loads(metadata.get("state", "{}"))
    if header.get("format") != STATE_FORMAT or header.get("layers") != list(training.adapters):
        raise ValueError(f"{path}: not the state of this run (other layers or format)")
    with torch.no_grad():
        for index, parameter in enumerate(training.parameters):
            parameter.copy_(_take(tensors, f"parameter.{index}", parameter.shape, path))
            prefix = f"optimizer.{index}."
            training.optimizer.state[parameter] = {
                name.removeprefix(prefix): value.to(parameter.device)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
        training.loss_scale.scale.copy_(tensors["loss_scale.scale"])
        training.loss_scale.good_steps.copy_(tensors["loss_scale.good_steps"])
    training.losses = tensors["losses"].tolist()
    training.step = int(header["step"])


def saved_losses(path: Path) -> list[float]:
    """The losses of a saved state, one a step."""
    tensors, _ = read_tensors(path)
    losses: list[float] = tensors["losses"].tolist()
    return losses


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size, path: Path) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != shape:
        shown = "nothing" if found is None else tuple(found.shape)
        raise ValueError(f"{path}: {name} should be {tuple(shape)}, found {shown}")
    return found
