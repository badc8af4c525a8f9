"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import ResolvedConfig

MIN_WARMUP_STEPS = 10


def make_optimizer(
    config: ResolvedConfig, groups: Mapping[float, Sequence[nn.Parameter]]
) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) over the adapters' float32 parameters.

    `groups` are parameters by their share of the learning rate, kept as `lr_scale`. The fused
    kernel, because it takes `found_inf` and skips a step on the device itself.
    """
    return torch.optim.AdamW(
        [{"params": list(members), "lr_scale": scale} for scale, members in groups.items()],
        lr=config.train.learning_rate,
        weight_decay=config.options.weight_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )


def learning_rate_at(config: ResolvedConfig, step: int) -> float:
    """The learning rate of step `step` (from 0): warm-up, then constant, linear or cosine.

    Warm-up rises over max(warmup · steps, 10) steps, at most half of them; a falling schedule
    reaches `final_learning_rate` · learning rate at the last step.
    """
    options, steps = config.options, config.train.steps
    warmup = warmup_steps(config)
    if step < warmup:
        return config.train.learning_rate * (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return config.train.learning_rate
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    falling = 0.5 * (1.0 + math.cos(math.pi * progress))
    if options.schedule == "linear":
        falling = 1.0 - progress
    floor = options.final_learning_rate
    return config.train.learning_rate * (floor + (1.0 - floor) * falling)


def warmup_steps(config: ResolvedConfig) -> int:
    """Steps of warm-up: `warmup` · steps, at least 10, at most half of the steps; 0 for none."""
    share, steps = config.options.warmup, config.train.steps
    return min(max(round(share * steps), MIN_WARMUP_STEPS), steps // 2) if share > 0 else 0


class LossScale:
    """Dynamic loss scaling for fp16, kept on the device so that no step waits for the host.

    Halved when a gradient overflows, doubled after `GROWTH_STEPS` good steps
    (https://arxiv.org/abs/1710.03740, section 3.2). For other dtypes the scale is 1 and stays.
    """

    GROWTH_STEPS = 1000

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.tensor(2.0**13 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, bad: Tensor) -> None:
        """`bad` is a 0/1 float scalar: whether the step was skipped."""
        if not self.enabled:
            return
        self.good_steps = (self.good_steps + 1.0) * (1.0 - bad)
        grow = (self.good_steps >= self.GROWTH_STEPS).float()
        self.good_steps = self.good_steps * (1.0 - grow)
        self.scale = self.scale * (1.0 - 0.5 * bad) * (1.0 + grow)
