"""The metadata of a trained LoRA file: what was trained, on what, and how."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..lora_core.batches import BatchPlan
from ..lora_core.buckets import Bucketed
from ..lora_core.dataset import Dataset
from ..lora_core.host import models
from ..lora_core.metadata import TrainingFacts, base_model, training_metadata
from ..lora_core.training.config import ResolvedConfig, TrainOptions
from ..lora_core.training.defaults import ModelFacts
from ..lora_core.training.loop import Training
from ..lora_core.training.optimizers import warmup_steps
from ..lora_core.training.run import Record

if TYPE_CHECKING:
    from .training_check import Request

MIXED_PRECISION = {"fp32": "no"}  # what sd-scripts call full precision


def lora_metadata(
    config: ResolvedConfig,
    request: Request,
    laid_out: Bucketed,
    model: ModelFacts,
    training: Training,
    record: Record,
) -> dict[str, str]:
    """All `ss_*` and `modelspec.*` entries; ranks and alphas are those of the adapters."""
    facts = TrainingFacts(
        output_name="",
        finished_at=time.time(),
        **_of_settings(config),
        **_of_models(request, model),
        **_of_dataset(request.dataset, laid_out),
        **_of_run(config, laid_out, training, record),
    )
    return {**training_metadata(facts), **_sizes(training)}


def _of_settings(config: ResolvedConfig) -> dict[str, Any]:
    train, options = config.train, config.options
    min_snr = options.loss_weighting == "min-snr"
    return {
        "algorithm": train.algorithm,
        "rank": train.rank,
        "alpha": train.alpha,
        "network_args": network_args(options),
        "learning_rate": train.learning_rate,
        "unet_learning_rate": train.learning_rate,
        "text_encoder_learning_rate": (
            options.text_encoder_learning_rate if options.text_encoder else None
        ),
        "optimizer": options.optimizer,
        "lr_scheduler": options.schedule,
        "warmup_steps": warmup_steps(config),
        "max_steps": train.steps,
        "seed": train.training_seed,
        "batch_size": train.batch_size,
        "accumulation_steps": options.accumulation_steps,
        "caption_dropout": options.caption_dropout,
        "loss_type": "l2",
        "min_snr_gamma": options.min_snr_gamma if min_snr else None,
        "timestep_sampling": options.timestep_sampling,
        "timestep_shift": options.timestep_shift or None,
        "max_grad_norm": options.max_grad_norm,
        "mixed_precision": MIXED_PRECISION.get(options.precision, options.precision),
        "gradient_checkpointing": options.gradient_checkpointing,
    }


def _of_models(request: Request, model: ModelFacts) -> dict[str, Any]:
    prediction = models.prediction_type(request.model)
    return {
        "base": base_model(model.family, v_prediction=prediction == "v"),
        "clip_skip": abs(request.clip.layer_idx) if request.clip.layer_idx else None,
        "prediction_type": prediction if prediction in ("epsilon", "v") else None,
    }


def _of_dataset(dataset: Dataset, laid_out: Bucketed) -> dict[str, Any]:
    return {
        "resolution_px": (laid_out.resolutions_px[-1], laid_out.resolutions_px[-1]),
        "num_images": dataset.num_samples,
        "buckets": dataset.buckets,
        "bucket_info": laid_out.info(),
        "tag_frequency": dataset.tag_frequency(),
        "dataset_dirs": dataset.folders(),
        "trigger_words": dataset.trigger_word,
    }


def _of_run(
    config: ResolvedConfig, laid_out: Bucketed, training: Training, record: Record
) -> dict[str, Any]:
    """How far it has come; an epoch that was begun counts as a whole one."""
    train, options = config.train, config.options
    batches = BatchPlan(laid_out.bucket_of, laid_out.repeats, train.batch_size, 0)

    def epochs(steps: int) -> int:
        return -(-steps * options.accumulation_steps // batches.batches_per_epoch)

    return {
        "steps": training.step,
        "epoch": epochs(training.step),
        "num_epochs": epochs(train.steps),
        "started_at": record.started_at,
    }


def network_args(options: TrainOptions) -> dict[str, str]:
    """How the adapters were made and trained, by LyCORIS' names; only what is not the default."""
    default = TrainOptions()
    named = {
        "dora_wd": "dora",
        "rs_lora": "rslora",
        "initialisation": "initialisation",
        "use_tucker": "tucker",
        "factor": "lokr_factor",
        "decompose_both": "decompose_both",
        "loraplus_lr_ratio": "lora_plus_ratio",
        "rank_dropout": "rank_dropout",
        "module_dropout": "module_dropout",
        "scale_weight_norms": "max_norm",
        "train_norm": "norms",
    }
    values = {key: getattr(options, name) for key, name in named.items()}
    changed = {
        key: str(value) for key, value in values.items() if value != getattr(default, named[key])
    }
    return {"targets": options.targets, **changed}


def _sizes(training: Training) -> dict[str, str]:
    """Rank and alpha, which differ between layers where a run started from another LoRA.

    Changes of norms and biases have neither.
    """
    adapters = [adapter for adapter in training.adapters.values() if len(adapter.shape) > 1]
    ranks = {str(adapter.rank) for adapter in adapters}
    alphas = {str(adapter.alpha) for adapter in adapters}
    return {
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }
