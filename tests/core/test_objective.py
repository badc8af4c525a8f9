"""Noise levels and loss weights against the papers' formulas, for every kind of prediction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.training.config import TrainOptions
from lora_weave.lora_core.training.objective import (
    draw_levels,
    loss_weight,
    resolution_shift,
    weighted_loss,
)

from .tiny import KINDS, TinyDenoiser, make_model

every_kind = pytest.mark.parametrize("kind", KINDS)
SQUARE_1024 = torch.Size((1, 16, 128, 128))  # latent of a 1024 px image
SQUARE_256 = torch.Size((1, 16, 32, 32))


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"timestep_sampling": "uniform", "loss_weighting": "min-snr"} | changes)


def draws(kind: str, count: int = 20_000, **changes: Any) -> Tensor:
    shape = torch.Size((count, *SQUARE_1024[1:]))
    generator = torch.Generator().manual_seed(0)
    denoiser = TinyDenoiser(kind, make_model())
    return draw_levels(options(**changes), shape, denoiser, generator).double()


def some_sigmas(kind: str) -> Tensor:
    if kind == "flow":
        return torch.tensor([0.001, 0.05, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)
    return torch.tensor([0.03, 0.2, 0.45, 1.0, 4.0, 14.6], dtype=torch.float64)


def snr(kind: str, sigma: Tensor) -> Tensor:
    return ((1 - sigma) / sigma) ** 2 if kind == "flow" else 1 / sigma**2


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 3, 3, generator=generator, dtype=torch.float64)


# the denoiser of these tests


@every_kind
def test_denoiser_gives_x0_back(kind: str) -> None:
    """The tests below lean on it: x0 = c_skip · x_t + c_out · target."""
    denoiser, sigma = TinyDenoiser(kind, make_model()), some_sigmas(kind)
    x0, noise = images(len(sigma), 0), images(len(sigma), 1)
    c_skip, c_out = denoiser.coefficients(sigma, x0)
    x_t = denoiser.noisy(x0, noise, sigma)
    torch.testing.assert_close(c_skip * x_t + c_out * denoiser.target(x0, noise, sigma), x0)


# weights


@every_kind
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_papers_weight_in_every_space(kind: str, gamma: float) -> None:
    """https://arxiv.org/abs/2303.09556, section 3.4: min(SNR, γ) on the x0 error, hence
    min(SNR, γ)/SNR for eps, min(SNR, γ)/(SNR + 1) for v, and σ² min(SNR, γ) for flow."""
    sigma = some_sigmas(kind)
    x0, noise, prediction = (images(len(sigma), seed) for seed in range(3))
    denoiser = TinyDenoiser(kind, make_model())
    held = snr(kind, sigma).clamp(max=gamma)
    textbook = {
        "eps": held / snr(kind, sigma),
        "v": held / (snr(kind, sigma) + 1),
        "flow": held * sigma**2,
    }[kind]
    weight = loss_weight(options(min_snr_gamma=gamma), denoiser, sigma, x0)
    torch.testing.assert_close(weight, textbook)

    x_t, target = denoiser.noisy(x0, noise, sigma), denoiser.target(x0, noise, sigma)
    c_skip, c_out = denoiser.coefficients(sigma, x0)
    x0_error = (c_skip * x_t + c_out * prediction - x0).square().mean(dim=(1, 2, 3))
    error = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weight * error, held * x0_error)


@every_kind
def test_no_weighting_is_one(kind: str) -> None:
    sigma = some_sigmas(kind)
    denoiser = TinyDenoiser(kind, make_model())
    weight = loss_weight(options(loss_weighting="none"), denoiser, sigma, images(len(sigma), 0))
    assert torch.equal(weight, torch.ones_like(sigma))


def test_weights_are_finite_at_the_ends() -> None:
    for kind in KINDS:
        denoiser = TinyDenoiser(kind, make_model())
        sigma = denoiser.sigma(torch.tensor([0.0, 1.0]))
        weight = loss_weight(options(), denoiser, sigma, images(2, 0))
        assert torch.isfinite(weight).all() and (weight >= 0).all()


def test_weighted_loss_is_the_mean_over_the_batch_of_weighted_means() -> None:
    prediction, target = images(3, 0), images(3, 1)
    weight = torch.tensor([1.0, 0.0, 2.5])
    means = [
        sum((p - t) ** 2 for p, t in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        / 36
        for a, b in zip(prediction, target, strict=True)
    ]
    by_hand = (1.0 * means[0] + 0.0 * means[1] + 2.5 * means[2]) / 3
    loss = weighted_loss(prediction, target, weight)
    assert loss.shape == () and loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_loss_is_computed_in_float32() -> None:
    """A half-precision mean of squares would overflow here."""
    prediction = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    loss = weighted_loss(prediction, -prediction, torch.ones(1))
    assert loss.dtype == torch.float32 and loss.item() == 360_000.0


# levels


def test_uniform_levels() -> None:
    levels = draws("eps")
    assert 0 <= levels.min() < 1e-3 and 1 - 1e-3 < levels.max() < 1
    # 4 standard errors: 1/√(12 n) of the mean
    assert abs(levels.mean() - 0.5) < 4 / math.sqrt(12 * len(levels))


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_logit_normal_levels(kind: str) -> None:
    """Their logits are N(0, 1); shifted by k, N(ln k, 1), since logit(t') = logit(t) + ln k."""
    levels = draws(kind, timestep_sampling="logit-normal", timestep_shift=3.0)
    logits = levels.logit()
    expected = math.log(3.0) if kind == "flow" else 0.0  # only flow models are shifted
    error = 4 / math.sqrt(len(levels))
    assert abs(logits.mean() - expected) < error
    assert abs(logits.std() - 1) < error
    assert abs(((logits - logits.mean()) ** 3).mean()) < error * math.sqrt(6)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_shift_is_the_papers(shift: float) -> None:
    """https://arxiv.org/abs/2403.03206, section 5.3.2."""
    plain, shifted = draws("flow", timestep_shift=1.0), draws("flow", timestep_shift=shift)
    torch.testing.assert_close(shifted, shift * plain / (1 + (shift - 1) * plain))
    assert torch.equal(draws("eps", timestep_shift=shift), draws("eps"))


def test_automatic_shift_is_by_image_size() -> None:
    assert resolution_shift(SQUARE_1024, 2) == pytest.approx(math.exp(1.15))
    assert resolution_shift(SQUARE_256, 2) == pytest.approx(math.exp(0.5))
    wide = resolution_shift(torch.Size((1, 16, 64, 256)), 2)
    assert wide == pytest.approx(resolution_shift(SQUARE_1024, 2))  # equal number of tokens
    torch.testing.assert_close(draws("flow"), draws("flow", timestep_shift=math.exp(1.15)))


def test_automatic_shift_counts_the_models_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 of them for 1024 px also where a token is one pixel of a latent of half the size."""
    flux2 = torch.Size((1, 128, 64, 64))
    assert resolution_shift(flux2, 1) == pytest.approx(3.158, abs=1e-3)
    assert resolution_shift(flux2, 2) == pytest.approx(1.878, abs=1e-3)  # a quarter of them
    monkeypatch.setattr(TinyDenoiser, "patch_size", 4)
    torch.testing.assert_close(
        draws("flow"), draws("flow", timestep_shift=resolution_shift(SQUARE_1024, 4))
    )


def test_levels_follow_from_the_generator() -> None:
    assert torch.equal(draws("flow", count=5), draws("flow", count=5))
