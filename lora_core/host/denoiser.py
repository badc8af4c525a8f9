"""The host's model as a `Denoiser`: one training step's forward, for every model family.

The host's `model_sampling` gives x0 from the model's output by a map that is affine in the output
for every prediction type (comfy/model_sampling.py `calculate_denoised`), so with

    c_skip = calculate_denoised(σ, 0, 1)      c_out = calculate_denoised(σ, 1, 0)
    prediction = (x0_pred - c_skip · x_t) / c_out      target = (x0 - c_skip · x_t) / c_out

eps, v, EDM, x0 and flow models need no code of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from .attention import differentiable_attention

FLOW_MIN_SIGMA = 1e-3  # the host's own first sigma (ModelSamplingDiscreteFlow, 1000 steps)


@dataclasses.dataclass(frozen=True)
class SizeConditioning:
    """What SDXL is told of an image: sizes in pixels, crop offset in the resized image."""

    original: tuple[int, int]  # (width, height)
    crop: tuple[int, int]  # (left, top)
    target: tuple[int, int]  # (width, height)


class HostDenoiser:
    """Implements `training.objective.Denoiser` over a MODEL that is loaded on its device."""

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher
        self._model = patcher.model
        self.device: torch.device = patcher.load_device
        self.patch_size = _patch_size(patcher.model.diffusion_model)
        # As patched in the graph, also while the model is not loaded.
        sampling = self.sampling = patcher.get_model_object("model_sampling")
        self.is_rectified = isinstance(sampling, comfy.model_sampling.CONST)
        self.is_flow = self.is_rectified or isinstance(sampling, comfy.model_sampling.COSMOS_RFLOW)
        # 0.33's CogVideoX: x_t = (x0 + σ · noise) / √(1 + σ²), though its noise_scaling is without
        # the division; the host's own sampler for it goes past that (comfy_extras/nodes_void.py).
        variance_preserving = getattr(comfy.model_sampling, "V_PREDICTION_DDPM", ())
        self._is_variance_preserving = isinstance(sampling, variance_preserving)

    def sigma(self, level: Tensor) -> Tensor:
        """Noise level in (0, 1) to σ, both (B,): the level itself for rectified flow, else the
        model's own table of σ at that share of its timesteps."""
        if self.is_rectified:
            return level.clamp(FLOW_MIN_SIGMA, 1.0)
        table = self.sampling.sigmas
        if self.is_flow:  # Cosmos: x_t = x0 + σ · noise, its flow time is σ / (σ + 1)
            lowest, highest = table[0].to(level.device), table[-1].to(level.device)
            return (level / (1.0 - level)).clamp(lowest, highest)
        index = (level * len(table)).long().clamp(max=len(table) - 1)
        return table.to(level.device)[index.to(level.device)]

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t (B, ...) from latents in model space, noise of the same shape and σ (B,)."""
        column = _column(sigma, x0)
        x_t = self.sampling.noise_scaling(column, noise.clone(), x0)
        return x_t / (1.0 + column.square()).sqrt() if self._is_variance_preserving else x_t

    def coefficients(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out), each (B, 1, ...), of x0 = c_skip · x_t + c_out · prediction."""
        column = _column(sigma, like)
        ones, zeros = torch.ones_like(column), torch.zeros_like(column)
        denoised = self.sampling.calculate_denoised
        return denoised(column, zeros, ones), denoised(column, ones, zeros)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What `predict` should give: noise, v or noise - x0, by the model's own type."""
        c_skip, c_out = self.coefficients(sigma, x0)
        return (x0 - c_skip * self.noisy(x0, noise, sigma)) / c_out

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Sequence[dict[str, Any]]) -> Tensor:
        """The model's prediction (B, ...) in float32; one prepared conditioning an item."""
        c_skip, c_out = self.coefficients(sigma, x_t)
        merged = _merge(conditioning)
        if merged is not None:
            x0 = self._denoise(x_t, sigma, merged)
        else:  # captions of lengths that can't share a batch
            parts = [_merge([one]) for one in conditioning]
            rows = [slice(row, row + 1) for row in range(len(parts))]
            x0 = torch.cat(
                [
                    self._denoise(x_t[row], sigma[row], part)
                    for row, part in zip(rows, parts, strict=True)
                ]
            )
        return (x0 - c_skip * x_t) / c_out

    def latent_in(self, latent: Tensor) -> Tensor:
        """A VAE's latent (1, C, ...) in the model's own space, float32, as an ordinary tensor."""
        return self._model.process_latent_in(latent.clone()).float()

    def prepare(
        self,
        conditioning: list[Any],
        latent: Tensor,
        size: SizeConditioning | None,
        guidance: float | None = None,
    ) -> dict[str, Any]:
        """The model's inputs for one item: from CONDITIONING, its latent (1, ...) and its size.

        `guidance` is what guidance-distilled models (Flux) are told; None leaves it to the host.

        Only the first entry counts, as there is one caption an image. Tensors are cloned, since
        the text encoder made them in inference mode.
        """
        embedding, options = conditioning[0]
        options = {name: _clone(value) for name, value in options.items()}
        if size is not None:
            names = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")
            options |= dict(zip(names, (*size.original, *size.crop, *size.target), strict=True))
        if guidance is not None:
            options["guidance"] = guidance
        entries = comfy.sampler_helpers.convert_cond([[_clone(embedding), options]])
        latent = latent.to(self.device)
        processed = comfy.samplers.process_conds(
            self._model,
            torch.zeros_like(latent),
            {"positive": entries},
            self.device,
            latent,
            None,
            0,
        )
        conds = processed["positive"][0]["model_conds"]
        return {
            name: cond.process_cond(batch_size=1, device=self.device, area=None)
            for name, cond in conds.items()
        }

    def _denoise(self, x_t: Tensor, sigma: Tensor, inputs: dict[str, Any] | None) -> Tensor:
        assert inputs is not None
        options = self._patcher.model_options.get("transformer_options", {}).copy()
        options["optimized_attention_override"] = differentiable_attention
        options["cond_or_uncond"] = [0]
        options["sigmas"] = sigma
        options["wrappers"] = self._patcher.wrappers
        options["callbacks"] = self._patcher.callbacks
        return self._model.apply_model(x_t, sigma, transformer_options=options, **inputs)


def _patch_size(network: torch.nn.Module) -> int:
    """Latent pixels along the side of an image token; 2, Flux's, for networks without tokens."""
    size: Any = getattr(network, "patch_size", getattr(network, "patch_spatial", 2))
    return size if isinstance(size, int) else size[-1]  # (time, height, width)


def _merge(conditioning: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One batch of inputs from one set an item, or None where they can't be concatenated."""
    first, *others = conditioning
    if any(other.keys() != first.keys() for other in others):
        return None
    merged = {}
    for name, cond in first.items():
        same = [other[name] for other in others]
        if not all(cond.can_concat(other) for other in same):
            return None
        merged[name] = cond.concat(same) if same else cond.cond
    return merged


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
