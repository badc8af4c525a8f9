"""A small real model as a `Denoiser`, in each way that models predict, and a run on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import Adapter, Layer, adapter_type
from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.batches import BatchPlan
from lora_weave.lora_core.events import Event, Stepped
from lora_weave.lora_core.training.config import ResolvedConfig, TrainConfig, TrainOptions
from lora_weave.lora_core.training.defaults import ModelFacts, resolve
from lora_weave.lora_core.training.examples import Examples
from lora_weave.lora_core.training.loop import Training

from .layer_kinds import facts

KINDS = ["eps", "v", "flow"]
LATENT = (1, 4, 6, 6)
NUM_IMAGES = 3
WIDTH = 8


class TinyModel(nn.Module):
    """Convolution in, a residual linear block that knows σ and the caption, convolution out."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.level = nn.Linear(1, WIDTH)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.back = nn.Linear(2 * WIDTH, WIDTH)
        self.outward = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor, caption: Tensor) -> Tensor:
        h = self.inward(x)  # (B, W, H, W)
        h = h + (self.level(level[:, None]) + caption)[:, :, None, None]
        tokens = h.flatten(2).transpose(1, 2)  # (B, T, W)
        tokens = tokens + self.back(torch.nn.functional.gelu(self.hidden(tokens)))
        return self.outward(tokens.transpose(1, 2).reshape(h.shape))


class TinyDenoiser:
    """Implements `Denoiser` by the textbook's formulas: eps and v with x_t = x0 + σ n (SNR = 1/σ²),
    flow with x_t = (1 - σ) x0 + σ n."""

    device = torch.device("cpu")
    patch_size = 2

    def __init__(self, kind: str, model: nn.Module) -> None:
        self.kind, self.model, self.is_flow = kind, model, kind == "flow"

    def sigma(self, level: Tensor) -> Tensor:
        return level.clamp(1e-3, 1.0) if self.is_flow else 0.03 * (14.6 / 0.03) ** level

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        s = column(sigma, x0)
        return (1 - s) * x0 + s * noise if self.is_flow else x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        s = column(sigma, x0)
        if self.kind == "eps":
            return noise
        return (noise - s * x0) / (s**2 + 1).sqrt() if self.kind == "v" else noise - x0

    def coefficients(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        s = column(sigma, like)
        if self.kind == "v":
            return 1 / (s**2 + 1), -s / (s**2 + 1).sqrt()
        return torch.ones_like(s), -s

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Sequence[Tensor]) -> Tensor:
        scale = 1.0 if self.is_flow else (column(sigma, x_t) ** 2 + 1).rsqrt()
        return self.model(x_t * scale, sigma.log() / 4, torch.cat(list(conditioning)).to(x_t.dtype))


def column(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (like.ndim - 1))


def make_model(seed: int = 0) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModel().requires_grad_(False)


def make_adapters(model: nn.Module, name: str = "lora", rank: int = 4) -> dict[str, Adapter]:
    """One on every layer, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return {
        path: adapter_type(name).create(
            tuple(layer.weight.shape), rank, float(rank), generator=generator
        )
        for path, layer in layers_of(model).items()
    }


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {p: m for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@contextmanager
def attached_to(model: nn.Module, adapters: dict[str, Adapter]) -> Iterator[None]:
    layers = layers_of(model)
    all_facts: dict[str, Layer] = {path: facts(layer) for path, layer in layers.items()}
    with attached(layers, adapters, all_facts):
        yield


def make_config(
    kind: str = "eps", *, options: dict[str, Any] | None = None, **train: Any
) -> ResolvedConfig:
    """A resolved config of a short run that learns fast."""
    train = {"steps": 10, "learning_rate": 5e-3, "batch_size": 2, "rank": 4, **train}
    family = ModelFacts(family="tiny", is_flow=kind == "flow", max_sigma=14.6)
    return resolve(TrainConfig(**train), TrainOptions(**(options or {})), family, NUM_IMAGES)


def make_examples(config: ResolvedConfig, **changes: Any) -> Examples:
    """Three latents, a caption each, and the real plan of batches."""
    generator = torch.Generator().manual_seed(2)
    captions = torch.randn(NUM_IMAGES, 1, WIDTH, generator=generator)
    # far from the noise, so that there is something to learn
    latents = [2 * torch.randn(LATENT, generator=generator) + 3 for _ in range(NUM_IMAGES)]

    def conditioning(item: int, dropped: bool) -> Tensor:
        return torch.zeros(1, WIDTH) if dropped else captions[item]

    plan = BatchPlan(
        [(512, 512)] * NUM_IMAGES,
        [1] * NUM_IMAGES,
        config.train.batch_size,
        config.train.training_seed,
    )
    return dataclasses.replace(Examples(plan, latents, conditioning), **changes)


@dataclass
class TinyRun:
    """A model with adapters on it, and what trains them."""

    training: Training
    examples: Examples
    denoiser: TinyDenoiser
    model: nn.Module

    def events(self) -> Iterator[Event]:
        with attached_to(self.model, self.training.adapters):
            yield from self.training.steps(self.examples, self.denoiser)

    def finish(self) -> list[Stepped]:
        return [event for event in self.events() if isinstance(event, Stepped)]

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.training.parameters]

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": value.clone()
            for index, parameter in enumerate(self.training.parameters)
            for name, value in self.training.optimizer.state[parameter].items()
        }


def make_run(
    config: ResolvedConfig,
    kind: str = "eps",
    denoiser: type[TinyDenoiser] = TinyDenoiser,
    **examples: Any,
) -> TinyRun:
    """A fresh run, the same each time for the same arguments."""
    model = make_model()
    training = Training(config, make_adapters(model), torch.device("cpu"))
    return TinyRun(training, make_examples(config, **examples), denoiser(kind, model), model)


def same_bits(found: list[Tensor] | dict[str, Tensor], expected: Any) -> bool:
    """Equal tensors, in lists of one length or dicts of the same names."""
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(
            torch.equal(value, expected[name]) for name, value in found.items()
        )
    return all(map(torch.equal, found, expected)) and len(found) == len(expected)
