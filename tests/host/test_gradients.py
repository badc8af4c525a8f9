"""Gradients of the training loss are those of finite differences, for every family of the host.

Flux-type blocks write into their inputs, which makes torch's checkpointing silently wrong there:
each family is therefore checked with and without recomputation.
"""

from contextlib import contextmanager

import pytest
import torch

from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.encode import encode_caption
from lora_weave.lora_core.host.models import clip_layers, unet_layers
from lora_weave.lora_core.host.trainee import trainee
from lora_weave.lora_core.training.protection import Gradients
from lora_weave.lora_core.training.recompute import recomputed, repeated_blocks

from .families import FAMILIES, build
from .one_step import OneStep, forget, parameters_of, random_adapters
from .text_encoders import build_clip

EPSILON = 1e-4  # of each factor


@contextmanager
def one_step(family: str, dtype: torch.dtype):
    """(step, factors by name, recomputed blocks) of a tiny model with a LoRA on every layer."""
    patcher = build(family, dtype=dtype)
    with trainee(patcher):
        layers = unet_layers(patcher)
        adapters = random_adapters(layers, dtype=dtype)
        with attached(layers.modules, adapters, layers.facts):
            blocks = repeated_blocks(patcher.model.diffusion_model)
            yield OneStep.of(patcher, family), parameters_of(adapters), blocks


def gradients(backward, factors, blocks=()):
    """{factor name: gradient}, computed as the training loop does; zero where there is none."""
    forget(factors.values())
    with recomputed(blocks):
        Gradients().compute(backward, lambda: forget(factors.values()))
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in factors.items()}


def directions(grads, factors):
    """Two changes, as long as each factor: along its gradient, and the same with random signs.

    Nothing cancels in the first: a factor with a wrong gradient shows by its share of the sum. A
    factor without a gradient changes along itself, so that a gradient that is missing shows too.
    """
    along = {}
    for name, factor in factors.items():
        change = grads[name] if grads[name].any() else factor.detach()
        along[name] = change * factor.detach().norm() / change.norm()
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (len(along),), generator=generator) * 2 - 1
    return along, {n: s * d for (n, d), s in zip(along.items(), signs.tolist(), strict=True)}


@torch.no_grad()
def finite_difference(loss, factors, direction, epsilon=EPSILON):
    """The loss's derivative along `direction`, {factor name: change}."""
    values = []
    for sign in (1, -2):
        for name, change in direction.items():
            factors[name].add_(change, alpha=sign * epsilon)
        values.append(loss())
    for name, change in direction.items():
        factors[name].add_(change, alpha=epsilon)
    return (values[0] - values[1]) / (2 * epsilon)


def derivative(grads, direction):
    return sum((g * direction[name]).sum() for name, g in grads.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_differences(family):
    """In float64, but for the model's output, which the host rounds to float32."""
    with one_step(family, torch.float64) as (step, factors, blocks):
        plain = gradients(step.backward, factors)
        again = gradients(step.backward, factors, blocks)
        along, mixed = directions(plain, factors)
        total = derivative(plain, along)
        for direction in (along, mixed):
            expected = finite_difference(step.loss, factors, direction)
            # Observed: 1e-5 of the total.
            assert abs(derivative(plain, direction) - expected) < 5e-5 * total
            assert abs(derivative(again, direction) - expected) < 5e-5 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_gradients_are_the_same(family):
    """Also in float32, factor by factor; and those are the ones of float64, rounded."""
    with one_step(family, torch.float32) as (step, factors, blocks):
        assert blocks
        plain = gradients(step.backward, factors)
        again = gradients(step.backward, factors, blocks)
    with one_step(family, torch.float64) as (step, factors, _):
        exact = gradients(step.backward, factors)
    for name, expected in exact.items():
        size = expected.norm()
        # Observed: 1.6e-6 and 7.6e-6, both for SDXL.
        assert (again[name] - plain[name]).norm() <= 1e-5 * size
        assert (plain[name] - expected).norm() <= 5e-5 * size


@pytest.mark.parametrize("name", ["SD1", "SDXL"])
def test_text_encoder_gradients_are_finite_differences(name):
    """In float32, which the host insists on here."""
    clip = build_clip(name)
    with trainee(build("SD3"), clip):
        layers = clip_layers(clip)
        adapters = random_adapters(layers)
        factors = parameters_of(adapters)

        def loss():
            embedding, options = encode_caption(clip, "a red fox (and a crow) in the snow")[0]
            outputs = torch.cat([embedding.flatten(), options["pooled_output"].flatten()])
            weights = torch.randn(len(outputs), generator=torch.Generator().manual_seed(3))
            return (outputs.double() * weights).mean()

        def backward():
            value = loss()
            value.backward()
            return value.detach()

        with attached(layers.modules, adapters, layers.facts):
            plain = gradients(backward, factors)
            again = gradients(backward, factors, repeated_blocks(clip.cond_stage_model))
            along, mixed = directions(plain, factors)
            total = derivative(plain, along)
            for direction in (along, mixed):
                expected = finite_difference(loss, factors, direction, 1e-3)
                # Observed: 7e-6 of the total.
                assert abs(derivative(plain, direction) - expected) < 1e-4 * total
                assert abs(derivative(again, direction) - expected) < 1e-4 * total
        trained = [name for name, grad in plain.items() if grad.any()]
    # All but clip_l's text_projection, and in SDXL its last layer of six.
    assert len(trained) == len(factors) - (2 if name == "SD1" else 2 + 2 * 6)
