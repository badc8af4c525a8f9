"""AdamW whose bad steps are skipped on the device, learning-rate schedules, loss scale for fp16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import ResolvedConfig

MIN_WARMUP_STEPS = 10
FUSED_DEVICES = ("cpu", "cuda")  # torch's kernels for others (mps) take found_inf and ignore it


def make_optimizer(
    config: ResolvedConfig, groups: Mapping[float, Sequence[nn.Parameter]], *, fused: bool
) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) over the adapters' float32 parameters.

    `groups` are parameters by their share of the learning rate, kept as `lr_scale`. Before each
    step set `grad_scale`, which the gradients are divided by, and `found_inf`, 1 for a step that is
    to change nothing; both are float scalars on the device. `fused` for devices in FUSED_DEVICES.
    """
    members = [{"params": list(group), "lr_scale": scale} for scale, group in groups.items()]
    settings: dict[str, Any] = {
        "lr": config.train.learning_rate,
        "weight_decay": config.options.weight_decay,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }
    if fused:
        return torch.optim.AdamW(members, **settings, fused=True)
    return UnfusedAdamW(members, settings)


class UnfusedAdamW(torch.optim.Optimizer):
    """The fused AdamW by single operations, for devices whose kernel ignores `found_inf`.

    It has the fused one's state, and like that never waits for the device.
    """

    grad_scale: Tensor
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        good = 1.0 - self.found_inf
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    grad = parameter.grad / self.grad_scale
                    grad = torch.where(good.bool(), grad, 0.0)  # NaN times 0 would be NaN
                    self._update(parameter, grad, good, group)

    def _update(
        self, parameter: Tensor, grad: Tensor, good: Tensor, group: Mapping[str, Any]
    ) -> None:
        """Take the step if `good` is 1; if it is 0, every term that is added is 0."""
        rate, (beta1, beta2) = group["lr"], group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        steps = state["step"].add_(good).clamp(min=1.0)  # a bad first step must not divide by 0
        m.add_((grad - m) * (1.0 - beta1) * good)
        v.add_((grad.square() - v) * (1.0 - beta2) * good)
        m_share, v_share = (-torch.expm1(steps * math.log(beta)) for beta in (beta1, beta2))
        deviation = (v / v_share).sqrt() + group["eps"]  # shares are 1 - β^steps, without rounding
        change = m / m_share / deviation + group["weight_decay"] * parameter
        parameter.sub_(rate * good * change)


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
