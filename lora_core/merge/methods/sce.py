"""Elements where the changes differ most, each change weighed by its energy: SCE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import ElementMethod, Parameter
from .pruning import largest
from .signs import agreeing


class Sce(ElementMethod):
    """D = Σ e_i a_i m ∘ v_i / Σ e_i a_i with v_i = s_i ΔW_i and e_i = mean(v_i²) / Σ mean(v²).

    Select: m is 1 at the elements whose variance over the changes is largest, a share density of
    those that vary. Calculate: the energies are of what is selected. Erase: a_i is 1 where the sign
    agrees. FuseChat, https://arxiv.org/abs/2408.07990 (section 3.3).
    """

    name = "SCE"
    help = "the elements in which the LoRAs differ most, the stronger LoRA counting more."
    parameters = {
        "density": Parameter(0.1, 0.001, 1.0, "the share of the varying elements that is kept.")
    }

    def combine(
        self, changes: Tensor, strengths: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        for change, strength in zip(changes, strengths, strict=True):
            change.mul_(strength)
        density = self.given["density"]
        if density < 1.0 and len(changes) > 1:
            variance = changes.var(0, correction=0)
            share = density * float(variance.count_nonzero()) / variance.numel()
            changes.mul_(largest(variance, share))
        energy = changes.square().flatten(1).mean(1)
        if not energy.any():
            return changes.sum(0)
        weights = (energy / energy.sum()).view(-1, *[1] * (changes.ndim - 1)) * agreeing(changes)
        return (weights * changes).sum(0) / weights.sum(0).clamp(min=1e-30)
