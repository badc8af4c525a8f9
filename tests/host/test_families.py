"""The tiny models are real: they build, sample and react to their conditioning on this host."""

import comfy.sample
import pytest
import torch

from .families import FAMILIES, MODEL_TYPES, build, conditioning, latent, model_sampling


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def sample(patcher, name: str, *, prompt_seed: int) -> torch.Tensor:
    samples = latent(name, batch=2)
    return comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(samples, seed=3),
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        positive=conditioning(name, prompt_seed),
        negative=conditioning(name, seed=100),
        latent_image=samples,
        disable_pbar=True,
        seed=3,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_as_the_executor_would(name):
    with torch.inference_mode():
        patcher = build(name)
        images = sample(patcher, name, prompt_seed=0)
        again = sample(build(name), name, prompt_seed=0)
        other_prompt = sample(patcher, name, prompt_seed=1)
    assert images.shape == (2, *FAMILIES[name].latent_shape)
    assert images.isfinite().all()
    assert images.std() > 0.1
    assert torch.equal(images, again)
    # observed: 0.07 for Flux2, which pads the text with 480 empty tokens; the rest 0.14 and more
    assert (images - other_prompt).std() > 0.03 * images.std()
    assert [k for k, v in tensors(patcher.model).items() if not v.is_inference()] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_seeded_and_nowhere_constant(name):
    with torch.inference_mode():  # inference=False wins over the caller's mode
        network = build(name, inference=False).model.diffusion_model
        same = build(name, inference=False).model.diffusion_model
        other = build(name, inference=False, seed=1).model.diffusion_model
    weights = tensors(network)
    assert [k for k, v in weights.items() if v.is_inference()] == []
    assert [k for k, v in weights.items() if not v.isfinite().all() or v.std() < 0.02] == []
    assert [k for k, v in tensors(same).items() if not torch.equal(v, weights[k])] == []
    assert [k for k, v in tensors(other).items() if torch.equal(v, weights[k])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_normal_numbers_to_the_model(name):
    inside = build(name).model.process_latent_in(latent(name, batch=4))
    assert inside.mean().abs() < 0.1
    assert abs(inside.std() - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SD1.5", "SD3", "Flux"])
def test_other_dtypes_are_the_same_weights_rounded(name, dtype):
    patcher = build(name, dtype=dtype, inference=False)
    full = build(name, inference=False)
    rounded = {k: v.to(dtype) for k, v in tensors(full.model.diffusion_model).items()}
    weights = tensors(patcher.model.diffusion_model)
    assert [k for k, v in weights.items() if not torch.equal(v, rounded[k])] == []
    with torch.inference_mode():
        assert sample(patcher, name, prompt_seed=0).isfinite().all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_has_a_sampling(model_type):
    sigmas = model_sampling(model_type).sigmas
    assert sigmas.isfinite().all()
    assert (sigmas.diff() >= 0).all()
    assert sigmas[0] > 0
