"""The Denoiser's targets are the textbook's for every type, and its inputs reach the model."""

import functools
import math

import comfy.model_base
import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.host.denoiser import HostDenoiser, SizeConditioning
from lora_weave.lora_core.host.trainee import trainee

from .families import FAMILIES, MODEL_TYPES, build, conditioning, latent, model_sampling
from .one_step import OneStep


def column(sigma: Tensor) -> Tensor:
    return sigma.double().view(-1, 1, 1, 1)


# {model type: (x_t, target, network input)} of x0, noise n and σ, each in float64.
# Noise prediction: DDPM, https://arxiv.org/abs/2006.11239, with σ = √(1-ᾱ)/√ᾱ and x_t / √ᾱ.
def eps(x0, n, s):
    return x0 + s * n, n, (x0 + s * n) / (1 + s**2).sqrt()


# v = √ᾱ·n - √(1-ᾱ)·x0: https://arxiv.org/abs/2202.00512, appendix D.
def velocity(x0, n, s):
    return x0 + s * n, (n - s * x0) / (1 + s**2).sqrt(), (x0 + s * n) / (1 + s**2).sqrt()


# The same with x_t = √ᾱ·x0 + √(1-ᾱ)·n, as the network gets it: CogVideoX.
def velocity_preserving(x0, n, s):
    x_t, v, scaled = velocity(x0, n, s)
    return scaled, v, scaled


# EDM, https://arxiv.org/abs/2206.00364, table 1, with the σ_data of these settings.
def karras(x0, n, s):
    data = MODEL_TYPES["EDM"]["sigma_data"]
    total = (s**2 + data**2).sqrt()
    x_t = x0 + s * n
    return x_t, (x0 - data**2 / total**2 * x_t) / (s * data / total), x_t / total


# Rectified flow: https://arxiv.org/abs/2209.03003.
def flow(x0, n, s):
    return (1 - s) * x0 + s * n, n - x0, (1 - s) * x0 + s * n


# Cosmos-Predict2: the same flow at the time t = σ/(1+σ), kept as x_t / (1-t).
def flow_cosmos(x0, n, s):
    return x0 + s * n, n - x0, (x0 + s * n) / (1 + s)


def image(x0, n, s):  # Lotus predicts the image
    return x0 + s * n, x0, x0 + s * n


def image_flow(x0, n, s):  # FlowRVS gets the image, and no noise at all
    return x0, x0, x0


TEXTBOOK = {
    "EPS": eps,
    "STABLE_CASCADE": eps,
    "V_PREDICTION": velocity,
    "V_PREDICTION_EDM": velocity,
    "V_PREDICTION_CONTINUOUS": velocity,
    "V_PREDICTION_DDPM": velocity_preserving,
    "EDM": karras,
    "FLOW": flow,
    "FLUX": flow,
    "FLOW_AV": flow,
    "FLOW_COSMOS": flow_cosmos,
    "IMG_TO_IMG": image,
    "IMG_TO_IMG_FLOW": image_flow,
}
LEVELS = torch.tensor([0.003, 0.05, 0.3, 0.5, 0.8, 0.97, 0.999])


@pytest.fixture(scope="module")
def unet():
    """A tiny SD1.5, whose `model_sampling` the tests swap for every other type's."""
    return build("SD1.5")


cached_sampling = functools.cache(model_sampling)  # Cascade's takes half a second


@pytest.fixture(params=MODEL_TYPES)
def typed(request, unet, monkeypatch):
    """(model type, denoiser) for each type that the host has."""
    monkeypatch.setitem(unet.model._modules, "model_sampling", cached_sampling(request.param))
    with trainee(unet):
        yield request.param, HostDenoiser(unet)


def draw(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 4, 8, 12, generator=generator).unbind()


def error(found: Tensor, expected: Tensor) -> Tensor:
    """Largest error of each item, as a share of the item's largest value."""
    difference = (found.double() - expected).flatten(1).abs().amax(1)
    return difference / expected.flatten(1).abs().amax(1)


def test_every_type_of_the_host_has_a_textbook():
    assert set(MODEL_TYPES) <= set(TEXTBOOK)
    assert set(MODEL_TYPES) == {member.name for member in comfy.model_base.ModelType}


def test_noisy_and_target_are_the_textbooks(typed):
    name, denoiser = typed
    x0, noise = draw(len(LEVELS))
    sigma = denoiser.sigma(LEVELS)
    kept = noise.clone()
    x_t, target, _ = TEXTBOOK[name](x0.double(), noise.double(), column(sigma))
    assert error(denoiser.noisy(x0, noise, sigma), x_t).max() < 3e-7
    # x0 - c_skip · x_t cancels where c_out is small. Observed: 1.3e-7 over c_out.
    _, c_out = denoiser.coefficients(sigma, x0)
    allowed = 5e-7 * (1 + 1 / c_out.flatten().abs().double())
    assert (error(denoiser.target(x0, noise, sigma), target) < allowed).all()
    assert torch.equal(noise, kept)


def test_target_gives_back_x0(typed):
    _, denoiser = typed
    x0, noise = draw(len(LEVELS))
    sigma = denoiser.sigma(LEVELS)
    c_skip, c_out = denoiser.coefficients(sigma, x0)
    x_t, target = denoiser.noisy(x0, noise, sigma), denoiser.target(x0, noise, sigma)
    # Rounding of x_t, which at the highest σ is that many times larger than x0.
    allowed = 1e-6 * (1 + sigma.double() * c_skip.flatten().abs())
    assert (error(c_skip * x_t + c_out * target, x0.double()) < allowed).all()


def test_prediction_is_what_the_network_says(typed):
    """`predict` in the model's own terms: its network's output for the textbook's input."""
    name, denoiser = typed
    x0, noise = draw(len(LEVELS))
    sigma = denoiser.sigma(LEVELS)
    model = denoiser._model
    conds = [denoiser.prepare(conditioning("SD1.5"), x0[:1], None)] * len(LEVELS)
    x_t, _, network_input = TEXTBOOK[name](x0.double(), noise.double(), column(sigma))
    time = model.model_sampling.timestep(sigma).float()
    context = torch.cat([cond["c_crossattn"].cond for cond in conds])
    with torch.no_grad():
        expected = model.diffusion_model(network_input.float(), time, context=context)
        found = denoiser.predict(x_t.float(), sigma, conds)
    _, c_out = denoiser.coefficients(sigma, x0)
    c_skip, _ = denoiser.coefficients(sigma, x0)
    allowed = 1e-5 + 1e-6 * (1 + sigma * c_skip.flatten().abs()) / c_out.flatten().abs()
    assert (error(found, expected.double()) < allowed).all()


def test_sigma_rises_within_the_models_range(typed):
    name, denoiser = typed
    levels = torch.linspace(0, 1, 2003)[1:-1]
    sigma = denoiser.sigma(levels)
    table = denoiser._model.model_sampling.sigmas
    assert sigma.isfinite().all()
    assert (sigma.diff() >= 0).all()
    assert sigma.unique().numel() > 900
    lowest = 1e-3 if denoiser.is_rectified else float(table[0])
    assert float(sigma[0]) == pytest.approx(lowest, rel=0.05)
    assert lowest <= float(sigma[0]) <= float(sigma[-1]) <= float(table[-1])
    highest = 1.0 if name == "IMG_TO_IMG_FLOW" else float(table[-1])  # a flow with a table of eps
    assert float(sigma[-1]) == pytest.approx(highest, rel=0.01)


@pytest.mark.parametrize("name", ["SD1.5", "SD3"])
def test_sigma_is_the_model_time(name):
    """A level is a share of the training timesteps (eps), or the flow's time itself."""
    patcher = build(name)
    with trainee(patcher):
        denoiser = HostDenoiser(patcher)
        time = patcher.model.model_sampling.timestep(denoiser.sigma(LEVELS))
    expected = LEVELS * 1000 if name == "SD3" else (LEVELS * 1000).floor()
    torch.testing.assert_close(time.float(), expected, rtol=0, atol=0.51)


def sinusoid(value: float) -> Tensor:
    """The 256 numbers that SDXL is told of one size: cosines, then sines."""
    angles = value * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    return torch.cat([angles.cos(), angles.sin()])


@pytest.fixture
def seen(request):
    """The keyword arguments of each call of a model's network."""

    def watch(patcher) -> list[dict]:
        calls = []
        handle = patcher.model.diffusion_model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        request.addfinalizer(handle.remove)
        return calls

    return watch


def test_sdxl_is_told_each_images_sizes(seen):
    patcher = build("SDXL")
    sizes = [
        SizeConditioning(original=(1536, 1024), crop=(16, 0), target=(1216, 832)),
        SizeConditioning(original=(700, 900), crop=(0, 48), target=(896, 1152)),
    ]
    prompts = [conditioning("SDXL", seed) for seed in (0, 1)]
    with trainee(patcher):
        denoiser = HostDenoiser(patcher)
        x0 = latent("SDXL", 2)
        sigma = denoiser.sigma(torch.tensor([0.3, 0.6]))
        conds = [
            denoiser.prepare(prompt, x0[item : item + 1], size)
            for item, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
        ]
        calls = seen(patcher)
        with torch.no_grad():
            denoiser.predict(x0, sigma, conds)
    told = [
        torch.cat(
            [prompt[0][1]["pooled_output"][0].double()]
            # Height before width, https://arxiv.org/abs/2307.01952 algorithm 1.
            + [sinusoid(number) for pair in (s.original, s.crop, s.target) for number in pair[::-1]]
        )
        for prompt, s in zip(prompts, sizes, strict=True)
    ]
    assert len(calls) == 1
    # Angles of up to 1536 rad in float32. Observed: 6e-5.
    torch.testing.assert_close(calls[0]["y"].double(), torch.stack(told), rtol=0, atol=3e-4)


def test_sdxl_without_sizes_takes_the_latents(seen):
    patcher = build("SDXL")
    prompt = conditioning("SDXL")
    prompt[0][1] = {"pooled_output": prompt[0][1]["pooled_output"]}
    with trainee(patcher):
        denoiser = HostDenoiser(patcher)
        cond = denoiser.prepare(prompt, latent("SDXL"), None)
    pooled = prompt[0][1]["pooled_output"][0].double()
    expected = torch.cat([pooled] + [sinusoid(size) for size in (64, 96, 0, 0, 64, 96)])
    torch.testing.assert_close(cond["y"].cond[0].double(), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("own, asked, told", [(None, None, 3.5), (2.0, None, 2.0), (2.0, 1.0, 1.0)])
def test_flux_is_told_the_guidance(seen, own, asked, told):
    patcher = build("Flux")
    prompt = conditioning("Flux")
    prompt[0][1].pop("guidance")
    if own is not None:
        prompt[0][1]["guidance"] = own
    with trainee(patcher):
        denoiser = HostDenoiser(patcher)
        conds = [denoiser.prepare(prompt, latent("Flux"), None, asked)] * 2
        calls = seen(patcher)
        with torch.no_grad():
            denoiser.predict(latent("Flux", 2), torch.tensor([0.3, 0.6]), conds)
    assert calls[0]["guidance"].tolist() == [told, told]


def shortened(prompt: list, tokens: int) -> list:
    """The prompt with fewer tokens, and with a mask as long, where it has one."""
    (embedding, options), *_ = prompt
    options = dict(options)
    if "attention_mask" in options:
        options["attention_mask"] = options["attention_mask"][:, :tokens]
    return [[embedding[:, :tokens], options]]


@pytest.mark.parametrize("tokens", [(7, 7, 7), (6, 3, 6), (6, 7, 1)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_items_one_by_one(name, tokens):
    """Also with captions of other lengths, of which the host would repeat the short ones."""
    patcher = build(name)
    x0 = latent(name, len(tokens))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    with trainee(patcher), torch.no_grad():
        denoiser = HostDenoiser(patcher)
        sigma = denoiser.sigma(sigma)
        x_t = denoiser.noisy(patcher.model.process_latent_in(x0), latent(name, 3, 1), sigma)
        conds = [
            denoiser.prepare(shortened(conditioning(name, item), count), x0[item : item + 1], None)
            for item, count in enumerate(tokens)
        ]
        together = denoiser.predict(x_t, sigma, conds)
        apart = [
            denoiser.predict(x_t[item : item + 1], sigma[item : item + 1], [conds[item]])
            for item in range(len(tokens))
        ]
    # float32 sums in another order. Observed: 2e-6.
    assert error(together, torch.cat(apart).double()).max() < 2e-5


def test_prepared_inputs_can_be_trained_on():
    """The text encoder makes its tensors in inference mode, where autograd can't save them."""
    patcher = build("SD3")
    with torch.inference_mode():
        prompt = conditioning("SD3")
        x0 = latent("SD3")
        with trainee(patcher):
            denoiser = HostDenoiser(patcher)
            prepared = denoiser.prepare(prompt, x0, None)
            tensors = [cond.cond for cond in prepared.values()]
    assert prompt[0][0].is_inference()
    assert tensors and not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"SD1.5", "SDXL"}))
def test_patch_size_is_that_of_the_networks_tokens(name):
    """As many tokens reach the layers as it says, and not those of the other patch size."""
    patcher, seen = build(name), set()
    *frames, height, width = FAMILIES[name].latent_shape[1:]

    def watch(module, inputs):
        if isinstance(module, torch.nn.Linear) and inputs[0].ndim == 3:
            seen.add(inputs[0].shape[1])

    with trainee(patcher), torch.no_grad():
        step = OneStep.of(patcher, name)
        hooks = [m.register_forward_pre_hook(watch) for m in patcher.model.modules()]
        step.predict()
        for hook in hooks:
            hook.remove()
        found = HostDenoiser(patcher).patch_size
    counts = {size: math.prod(frames) * height * width // size**2 for size in (1, 2)}
    assert [size for size, count in counts.items() if count in seen] == [found]


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_networks_without_tokens_count_as_fluxs(name):
    assert HostDenoiser(build(name)).patch_size == 2
