"""What the loop trains on: latents and conditioning of each image, drawn by seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import ResolvedConfig
from .objective import Denoiser, draw_levels, loss_weight


class BatchOrder(Protocol):
    """Which items make up a batch; a function of the index alone, so resuming needs no state."""

    def batch(self, index: int) -> list[int]: ...


@dataclass(frozen=True)
class Examples:
    """The encoded dataset. Latents are (1, C, ...) in model space, one an item, on any device.

    `conditioning(item, dropped)` gives what `Denoiser.predict` takes for the item's caption, or
    for the empty one.
    """

    plan: BatchOrder
    latents: Sequence[Tensor]
    conditioning: Callable[[int, bool], Any]


@dataclass(frozen=True)
class Batch:
    """One forward's input: x_t and σ, and the target and weight of its loss."""

    x_t: Tensor
    sigma: Tensor
    conditioning: list[Any]
    target: Tensor
    weight: Tensor


def draw_batch(config: ResolvedConfig, examples: Examples, denoiser: Denoiser, index: int) -> Batch:
    """The `index`-th batch of the run. All randomness comes from (seed, index)."""
    generator = torch.Generator().manual_seed(seed_of(config.train.training_seed, "batch", index))
    items = examples.plan.batch(index)
    latents = torch.cat([examples.latents[item] for item in items]).float()
    level = draw_levels(config.options, latents.shape, denoiser, generator)
    noise = torch.randn(latents.shape, generator=generator)
    dropped = torch.rand(len(items), generator=generator) < config.options.caption_dropout
    conditioning = [
        examples.conditioning(item, drop)
        for item, drop in zip(items, dropped.tolist(), strict=True)
    ]
    x0, noise = _to_device(latents, denoiser.device), _to_device(noise, denoiser.device)
    sigma = denoiser.sigma(_to_device(level, denoiser.device))
    return Batch(
        x_t=denoiser.noisy(x0, noise, sigma),
        sigma=sigma,
        conditioning=conditioning,
        target=denoiser.target(x0, noise, sigma),
        weight=loss_weight(config.options, denoiser, sigma, x0),
    )


def seed_of(seed: int, purpose: str, index: int) -> int:
    """An independent 63-bit seed for each purpose and index, by SHA-256."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for the device: from pinned memory where there is such a thing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
