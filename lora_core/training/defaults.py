"""Automatic values by model family and number of images.

Learning rates and step counts aim at the same effect whatever the rank: with alpha = rank and
about 100 passes over every image, lr · √rank lies at 4e-4 to 8e-4, where the tools that need no
tuning lie (ai-toolkit's and SimpleTuner's defaults; kohya's alpha 1 needs many more epochs).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .config import ResolvedConfig, TrainConfig, TrainOptions

RANK = 16
PASSES_PER_IMAGE = 100
MAX_STEPS = 3000


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """Automatic values of one model family."""

    learning_rate: float = 1e-4
    text_encoder_learning_rate: float = 1e-5
    resolutions_px: tuple[int, ...] = (512, 768)  # each image is trained at every one
    batch_size: int = 1
    min_steps: int = 800
    timestep_shift: float = 0.0  # 0: by the image size
    guidance: float = 1.0  # what a guidance-distilled model is told while training


FLOW = FamilyDefaults()
SD15 = FamilyDefaults(learning_rate=2e-4, resolutions_px=(512,), batch_size=2, min_steps=300)
LARGE = FamilyDefaults(resolutions_px=(768, 1024), min_steps=1000)
FAMILIES = {
    "SD1.5": SD15,
    "SD2": SD15,
    "SDXL": FamilyDefaults(resolutions_px=(1024,), min_steps=500),
    "Chroma": FamilyDefaults(guidance=0.0, timestep_shift=1.0),
    "Qwen-Image": LARGE,
    "Z-Image": LARGE,
}


def family_defaults(family: str) -> FamilyDefaults:
    """Defaults of the family named as in `host/models.py`; those of flow models for any other."""
    return FAMILIES.get(family, FLOW)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the automatic values depend on, apart from the family's name."""

    family: str
    is_flow: bool
    precision: str = "fp32"  # what the model computes in by itself
    max_sigma: float  # over 1000 where the last step has no signal left (zero-terminal SNR)


def resolve(
    config: TrainConfig, options: TrainOptions, model: ModelFacts, num_images: int
) -> ResolvedConfig:
    """Replace 0 and "auto" by their values for this model and `num_images`."""
    family = family_defaults(model.family)
    rank = config.rank or RANK
    batch_size = config.batch_size or family.batch_size
    seen_per_step = batch_size * options.accumulation_steps
    wanted = PASSES_PER_IMAGE * num_images // seen_per_step
    train = dataclasses.replace(
        config,
        rank=rank,
        alpha=config.alpha or float(rank),
        steps=config.steps or min(max(wanted, family.min_steps), MAX_STEPS),
        learning_rate=config.learning_rate or family.learning_rate,
        batch_size=batch_size,
    )
    min_snr = not model.is_flow and model.max_sigma < 1000
    automatic: dict[str, Any] = {
        "schedule": "constant" if model.is_flow else "cosine",
        "loss_weighting": "min-snr" if min_snr else "none",
        "timestep_sampling": "logit-normal" if model.is_flow else "uniform",
        "precision": model.precision,
    }
    chosen = {name: value for name, value in automatic.items() if getattr(options, name) == "auto"}
    resolved = dataclasses.replace(
        options,
        **chosen,
        timestep_shift=options.timestep_shift or family.timestep_shift,
        guidance=family.guidance if options.guidance < 0 else options.guidance,
        text_encoder_learning_rate=(
            options.text_encoder_learning_rate or family.text_encoder_learning_rate
        ),
    )
    return ResolvedConfig(train=train, options=resolved)
