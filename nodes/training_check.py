"""What Train LoRA is asked for, checked before any work: every problem in one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..lora_core.adapters import Adapter
from ..lora_core.buckets import Bucketed, plan
from ..lora_core.cache import TensorCache
from ..lora_core.dataset import Dataset
from ..lora_core.host import encode, files, models, trainee
from ..lora_core.host.denoiser import HostDenoiser
from ..lora_core.key_map import KeyMap
from ..lora_core.training.config import ResolvedConfig, TrainConfig, TrainOptions
from ..lora_core.training.defaults import ModelFacts, family_defaults, resolve
from .training_adapters import make_adapters

T = TypeVar("T")


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
    new: frozenset[str]  # paths of those that do not come from `start_from`


def check(request: Request, progress: encode.Progress) -> Job:
    """Resolve the settings and check everything that can be checked before work starts.

    Raises ValueError with every problem. `progress` is told of the one caption that is encoded.
    """
    facts = model_facts(request.model)
    keymap = models.key_map(request.model, request.clip if request.options.text_encoder else None)
    num_images = len(request.dataset.items)
    config = resolve(request.config, request.options, facts, num_images)
    problems = unfit_vae(request, facts.family)
    _or_problem(problems, lambda: check_clip(request, progress))
    laid_out = _or_problem(problems, lambda: lay_out(request, facts.family))
    output = _or_problem(problems, lambda: files.output_path(request.config.output_name))
    made = _or_problem(problems, lambda: make_adapters(request, config, keymap))
    if problems or laid_out is None or output is None or made is None:
        raise ValueError("Train LoRA can't start:\n- " + "\n- ".join(problems))
    return Job(
        request=request,
        config=config,
        keymap=keymap,
        laid_out=laid_out,
        output=output,
        adapters=made[0],
        new=made[1],
    )


def _or_problem(problems: list[str], make: Callable[[], T]) -> T | None:
    """What `make` gives, or None with its ValueError among the problems."""
    try:
        return make()
    except ValueError as error:
        problems.append(str(error))
        return None


def unfit_vae(request: Request, family: str) -> list[str]:
    """Why the VAE can't encode the images for this model; nothing where it can."""
    vae, wanted = request.vae, request.model.model.latent_format.latent_channels
    if vae is None:
        return ["vae is not connected: it encodes the images"]
    if vae.latent_channels == wanted:
        return []
    return [
        f"vae makes latents of {vae.latent_channels} channels, the model ({family}) "
        f"takes {wanted}: connect the VAE that belongs to the model"
    ]


def check_clip(request: Request, progress: encode.Progress) -> None:
    """Raise ValueError where there is no CLIP, it can't be trained here, or is of another model.

    Its output tells the latter: the empty caption, which most runs need, is encoded and cached.
    """
    if request.clip is None:
        raise ValueError("clip is not connected: it encodes the captions")
    model_device, clip_device = request.model.load_device, request.clip.patcher.load_device
    if request.options.text_encoder and clip_device != model_device:
        raise ValueError(
            "text_encoder needs model and clip on the same device: the model is loaded to "
            f'{model_device}, clip to {clip_device}. Load clip with device "default", start '
            "ComfyUI with --gpu-only, or switch text_encoder off in Training Options"
        )
    made = encode.encode_captions(request.clip, [""], encoded_cache(), progress)
    encode.check_conditionings(made.values(), request.model)


def encoded_cache() -> TensorCache:
    """Where latents and conditioning of all runs are kept."""
    return TensorCache(files.weave_folder() / "cache")


def lay_out(request: Request, family: str) -> Bucketed:
    """The dataset in buckets whose sizes suit the VAE and the model's patches."""
    multiple = 2 * request.vae.spacial_compression_encode() if request.vae is not None else 1
    resolutions = family_defaults(family).resolutions_px
    return plan(request.dataset, resolutions_px=resolutions, multiple_px=multiple)


def model_facts(model: Any) -> ModelFacts:
    denoiser = HostDenoiser(model)
    return ModelFacts(
        family=models.family_name(model),
        is_flow=denoiser.is_flow,
        precision=trainee.precision_of(model),
        max_sigma=float(denoiser.sampling.sigma_max),
    )
