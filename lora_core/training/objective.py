"""The training objective: which noise levels, which loss, which weight.

    loss = mean over the batch of  w(σ) · mean (prediction - target)²

in the model's own terms (noise, v or noise - x0), which a `Denoiser` defines.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import TrainOptions


class Denoiser(Protocol):
    """A model family as the loop sees it. x are latents (B, ...) in model space, σ is (B,)."""

    device: torch.device
    is_flow: bool
    patch_size: int  # latent pixels along the side of an image token

    def sigma(self, level: Tensor) -> Tensor:
        """Noise level in (0, 1), uniform over the model's timesteps, to σ."""

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t, the latent with noise of strength σ."""

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The model's prediction, float32."""

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect prediction is."""

    def coefficients(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of x0 = c_skip · x_t + c_out · prediction, broadcastable to `like`."""


def draw_levels(
    options: TrainOptions, latent_shape: torch.Size, denoiser: Denoiser, generator: torch.Generator
) -> Tensor:
    """Noise levels (B,) in (0, 1) for a batch of latents.

    uniform, or logit-normal sigmoid(N(0, 1)) (Stable Diffusion 3, https://arxiv.org/abs/2403.03206,
    section 3.1). Flow models are then shifted, t' = k·t / (1 + (k-1)·t) (same paper, section
    5.3.2), with k = `timestep_shift` or, at 0, Flux's by image size (`resolution_shift`).
    """
    batch = latent_shape[0]
    if options.timestep_sampling == "logit-normal":
        level = torch.randn(batch, generator=generator).sigmoid()
    else:
        level = torch.rand(batch, generator=generator)
    if denoiser.is_flow:
        shift = options.timestep_shift or resolution_shift(latent_shape, denoiser.patch_size)
        level = shift * level / (1.0 + (shift - 1.0) * level)
    return level


def resolution_shift(latent_shape: torch.Size, patch_size: int) -> float:
    """e^μ, with μ linear in the number of image tokens: 256 -> 0.5, 4096 -> 1.15.

    A token is patch_size x patch_size latent pixels. From black-forest-labs/flux
    src/flux/sampling.py `get_lin_function` and `time_shift`.
    """
    tokens = (latent_shape[-1] / patch_size) * (latent_shape[-2] / patch_size)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return math.exp(mu)


def loss_weight(options: TrainOptions, denoiser: Denoiser, sigma: Tensor, like: Tensor) -> Tensor:
    """w(σ), (B,), for a loss in prediction space.

    min-SNR-γ (https://arxiv.org/abs/2303.09556) is min(SNR, γ) on the x0 error for every model.
    The x0 error is c_out times the prediction's, so w = min(SNR, γ) · c_out². SNR is the ratio of
    x0's and the noise's shares of x_t, squared: 1/σ² for eps and v models, (1/σ - 1)² for flow.
    """
    if options.loss_weighting == "none":
        return torch.ones_like(sigma)
    _, c_out = denoiser.coefficients(sigma, like)
    ones, zeros = torch.ones_like(c_out), torch.zeros_like(c_out)
    snr = (denoiser.noisy(ones, zeros, sigma) / denoiser.noisy(zeros, ones, sigma)).square()
    return (snr.clamp(max=options.min_snr_gamma) * c_out.square()).flatten()


def weighted_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Scalar: mean over the batch of weight · mean squared error, in float32."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (weight.to(error.device) * error).mean()
