"""What Train LoRA is asked for, checked before any work: every problem in one message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..lora_core import targets
from ..lora_core.adapters import Adapter, adapter_type
from ..lora_core.buckets import Bucketed, plan
from ..lora_core.dataset import Dataset
from ..lora_core.host import files, models, trainee
from ..lora_core.host.denoiser import HostDenoiser
from ..lora_core.key_map import KeyMap
from ..lora_core.lora_model import LoraModel
from ..lora_core.training.config import ResolvedConfig, TrainConfig, TrainOptions
from ..lora_core.training.defaults import ModelFacts, family_defaults, resolve
from ..lora_core.training.examples import seed_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """The training node's inputs."""

    model: Any
    clip: Any
    vae: Any
    dataset: Dataset
    config: TrainConfig
    options: TrainOptions
    start_from: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request: everything is known, nothing is done yet."""

    request: Request
    config: ResolvedConfig
    keymap: KeyMap
    laid_out: Bucketed
    output: Path
    adapters: dict[str, Adapter]


def check(request: Request) -> Job:
    """Resolve the settings and check everything that can be checked before work starts."""
    facts, clip, vae = model_facts(request.model), request.clip, request.vae
    problems = input_problems(request, facts)
    trained_clip = clip if request.options.text_encoder else None
    keymap = models.key_map(request.model, trained_clip)
    num_images = request.dataset.num_samples
    config = resolve(request.config, request.options, facts, num_images)
    laid_out, output, adapters = None, None, {}
    try:
        resolutions = family_defaults(facts.family).resolutions_px
        multiple = 2 * vae.spacial_compression_encode() if vae is not None else 1
        laid_out = plan(request.dataset, resolutions_px=resolutions, multiple_px=multiple)
    except ValueError as error:
        problems.append(str(error))
    try:
        output = files.output_path(request.config.output_name)
    except ValueError as error:
        problems.append(str(error))
    try:
        adapters = make_adapters(request, config, keymap)
    except ValueError as error:
        problems.append(str(error))
    if problems or laid_out is None or output is None:
        raise ValueError("Train LoRA can't start:\n- " + "\n- ".join(problems))
    return Job(
        request=request,
        config=config,
        keymap=keymap,
        laid_out=laid_out,
        output=output,
        adapters=adapters,
    )


def input_problems(request: Request, facts: ModelFacts) -> list[str]:
    """What is wrong with MODEL, CLIP and VAE as they are connected."""
    model, clip, vae = request.model, request.clip, request.vae
    problems = []
    if vae is None:
        problems.append("vae is not connected: it encodes the images")
    if clip is None:
        problems.append("clip is not connected: it encodes the captions")
    wanted = model.model.latent_format.latent_channels
    if vae is not None and vae.latent_channels != wanted:
        problems.append(
            f"vae makes latents of {vae.latent_channels} channels, the model ({facts.family}) "
            f"takes {wanted}: connect the VAE that belongs to the model"
        )
    trains_clip = request.options.text_encoder and clip is not None
    if trains_clip and clip.patcher.load_device != model.load_device:
        problems.append(
            "text_encoder needs model and clip on the same device: the model is loaded to "
            f"{model.load_device}, clip to {clip.patcher.load_device}. Load clip with device "
            '"default", start ComfyUI with --gpu-only, or switch text_encoder off in Training '
            "Options"
        )
    return problems


def model_facts(model: Any) -> ModelFacts:
    denoiser = HostDenoiser(model)
    return ModelFacts(
        family=models.family_name(model),
        is_flow=denoiser.is_flow,
        precision=trainee.precision_of(model),
        max_sigma=float(denoiser.sampling.sigma_max),
    )


def make_adapters(request: Request, config: ResolvedConfig, keymap: KeyMap) -> dict[str, Adapter]:
    """Adapters by layer path: those to start from, and new ones for the other chosen layers."""
    options, settings = config.options, config.train
    trained_clip = request.clip if options.text_encoder else None
    shapes = trained_layers(request.model, trained_clip).shapes()
    chosen = targets.select(
        targets.shapes(shapes), options.targets, options.include, options.exclude
    )
    if trained_clip is not None and not any(map(models.is_text_encoder, chosen)):
        raise ValueError(
            f"text_encoder is on, but none of its layers is chosen by targets {options.targets!r}, "
            f"include {options.include!r} and exclude {options.exclude!r}"
        )
    adapters: dict[str, Adapter] = {}
    if request.start_from:
        start = LoraModel.of(request.start_from).to_file(keymap)
        if start.left_out:
            raise ValueError(
                f"start_from also changes the text encoder ({len(start.left_out)} layers): switch "
                "on text_encoder in Training Options, so that they are trained further"
            )
        adapters = dict(start.adapters)
    kind = adapter_type(settings.algorithm)
    with torch.inference_mode(False):
        for path in chosen:
            if path not in adapters:
                seed = seed_of(settings.training_seed, f"init {path}", 0)
                adapters[path] = kind.create(
                    shapes[path],
                    settings.rank,
                    settings.alpha,
                    generator=torch.Generator().manual_seed(seed),
                )
    return dict(sorted(adapters.items()))


def trained_layers(patcher: Any, clip: Any) -> models.ModelLayers:
    """The layers that can get an adapter: the model's, and those of the CLIP, if it is given."""
    layers = models.unet_layers(patcher)
    return layers if clip is None else layers | models.clip_layers(clip)
