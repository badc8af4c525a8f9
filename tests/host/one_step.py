"""One training step with fixed inputs on a tiny model, for tests on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import Adapter, adapter_type
from lora_weave.lora_core.host.denoiser import HostDenoiser
from lora_weave.lora_core.host.models import ModelLayers

from .families import conditioning, latent

LEVELS = (0.3, 0.6)  # noise levels of the items, in (0, 1)


@dataclass(frozen=True)
class OneStep:
    """The inputs of a step, and its loss."""

    denoiser: HostDenoiser
    x_t: Tensor
    sigma: Tensor
    target: Tensor
    conditioning: list[dict[str, Any]]

    @classmethod
    def of(cls, patcher: Any, family: str, seed: int = 0) -> OneStep:
        """A batch of two items; to be called within `trainee(patcher)`."""
        denoiser = HostDenoiser(patcher)
        x0 = patcher.model.process_latent_in(latent(family, len(LEVELS), seed)).float()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + 1))
        sigma = denoiser.sigma(torch.tensor(LEVELS))
        return cls(
            denoiser=denoiser,
            x_t=denoiser.noisy(x0, noise, sigma),
            sigma=sigma,
            target=denoiser.target(x0, noise, sigma),
            conditioning=[
                denoiser.prepare(conditioning(family, seed + item), x0[item : item + 1], None)
                for item in range(len(x0))
            ],
        )

    def predict(self) -> Tensor:
        return self.denoiser.predict(self.x_t.clone(), self.sigma, self.conditioning)

    def loss(self) -> Tensor:
        """Mean squared error, summed up in float64."""
        return (self.predict().double() - self.target.double()).square().mean()

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()


def random_adapters(
    layers: ModelLayers,
    *,
    rank: int = 4,
    alpha: float = 4.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Adapter]:
    """A LoRA on every layer with both factors random; ΔW is about a tenth of the weight's size."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for path, layer in layers.facts.items():
        adapter = adapter_type("lora").create(layer.shape, rank, alpha, generator=generator)
        with torch.no_grad():
            adapter.up.normal_(std=0.1, generator=generator)
        adapters[path] = adapter.to(dtype)
    return adapters


def parameters_of(adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """Every factor by its name, such as "diffusion_model.out.2 up"."""
    return {
        f"{path} {name}": parameter
        for path, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }


def forget(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def sample(patcher: Any, family: str, steps: int = 2) -> Tensor:
    """Two latents by the host's own sampler, in inference mode as its executor runs it."""
    with torch.inference_mode():
        samples = latent(family, batch=2)
        return comfy.sample.sample(
            patcher,
            comfy.sample.prepare_noise(samples, seed=3),
            steps=steps,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            positive=conditioning(family),
            negative=conditioning(family, seed=100),
            latent_image=samples,
            disable_pbar=True,
            seed=3,
        )
