"""What a LoRA file says about itself: `ss_*`, `modelspec.*` and `sshs_*`, all strings.

`ss_*` and `sshs_*` are kohya sd-scripts' (library/train_util.py, train_network.py), read by A1111,
Forge, CivitAI and the LoRA managers; `modelspec.*` is https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

from .key_map import family_label
from .safetensors_file import Serialized

_STABILITY = "https://github.com/Stability-AI/generative-models"
_FLUX = "https://github.com/black-forest-labs/flux"


@dataclass(frozen=True)
class BaseModel:
    """What metadata calls a model family: ss_base_model_version and modelspec names."""

    version: str
    architecture: str
    implementation: str

    @property
    def is_v2(self) -> bool:
        return self.version.startswith("sd_v2")


_BASE_MODELS = {
    "SD1.5": BaseModel("sd_v1", "stable-diffusion-v1", "diffusers"),
    "SD2": BaseModel("sd_v2", "stable-diffusion-v2-512", "diffusers"),
    "SDXL": BaseModel("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", _STABILITY),
    "SD3": BaseModel("sd3", "stable-diffusion-3", "diffusers"),
    "Flux": BaseModel("flux1", "flux-1-dev", _FLUX),
    "Flux2": BaseModel("flux2", "Flux.2-dev", "https://github.com/black-forest-labs/flux2"),
    "Chroma": BaseModel("chroma", "chroma", "https://huggingface.co/lodestones/Chroma"),
    "Lumina2": BaseModel("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0"),
    "Z-Image": BaseModel("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image"),
    "Qwen-Image": BaseModel("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image"),
    "Wan": BaseModel("wan2.1", "wan2.1", "https://github.com/Wan-Video/Wan2.1"),
}


def base_model(family: str, *, v_prediction: bool = False) -> BaseModel:
    """The names for a family in any spelling ("sd15", "SD1.5"); an unknown one names itself."""
    label = family_label(family)
    if label == "SD2" and v_prediction:
        return BaseModel("sd_v2_v", "stable-diffusion-v2-768-v", "diffusers")
    return _BASE_MODELS.get(label) or BaseModel(
        family, family, "https://github.com/comfyanonymous/ComfyUI"
    )


def _ss(key: str, **kwargs: Any) -> Any:
    """A field that is written as the metadata entry `key`."""
    return field(metadata={"key": key}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What is known of a training run. Fields that are None are not written.

    `resolution_px` is (width, height); times are unix seconds; `tag_frequency` is
    {folder: {tag: count}}, `dataset_dirs` {folder: {"n_repeats": n, "img_count": n}} and
    `bucket_info` {"buckets": {index: {"resolution": [w, h], "count": n}}, "mean_img_ar_error": x},
    all with folder names only, never whole paths.
    """

    base: BaseModel
    output_name: str = _ss("ss_output_name")
    algorithm: str = "lora"
    rank: int = _ss("ss_network_dim")
    alpha: float = _ss("ss_network_alpha")
    network_args: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = _ss("ss_learning_rate")
    unet_learning_rate: float | None = _ss("ss_unet_lr", default=None)
    text_encoder_learning_rate: float | None = _ss("ss_text_encoder_lr", default=None)
    optimizer: str = _ss("ss_optimizer")
    lr_scheduler: str = _ss("ss_lr_scheduler")
    warmup_steps: int | None = _ss("ss_lr_warmup_steps", default=None)
    steps: int = _ss("ss_steps")
    max_steps: int | None = _ss("ss_max_train_steps", default=None)
    epoch: int | None = _ss("ss_epoch", default=None)
    num_epochs: int | None = _ss("ss_num_epochs", default=None)
    seed: int = _ss("ss_seed")
    batch_size: int = _ss("ss_batch_size_per_device")
    accumulation_steps: int | None = _ss("ss_gradient_accumulation_steps", default=None)
    resolution_px: tuple[int, int] = _ss("ss_resolution")
    num_images: int = _ss("ss_num_train_images")
    buckets: bool | None = _ss("ss_enable_bucket", default=None)
    bucket_info: Mapping[str, Any] | None = _ss("ss_bucket_info", default=None)
    tag_frequency: Mapping[str, Mapping[str, int]] | None = _ss("ss_tag_frequency", default=None)
    dataset_dirs: Mapping[str, Mapping[str, int]] | None = _ss("ss_dataset_dirs", default=None)
    caption_dropout: float | None = _ss("ss_caption_dropout_rate", default=None)
    clip_skip: int | None = _ss("ss_clip_skip", default=None)
    loss_type: str | None = _ss("ss_loss_type", default=None)
    min_snr_gamma: float | None = _ss("ss_min_snr_gamma", default=None)
    timestep_sampling: str | None = _ss("ss_timestep_sampling", default=None)
    timestep_shift: float | None = _ss("ss_discrete_flow_shift", default=None)
    max_grad_norm: float | None = _ss("ss_max_grad_norm", default=None)
    mixed_precision: str | None = _ss("ss_mixed_precision", default=None)
    gradient_checkpointing: bool | None = _ss("ss_gradient_checkpointing", default=None)
    started_at: float | None = _ss("ss_training_started_at", default=None)
    finished_at: float | None = _ss("ss_training_finished_at", default=None)
    trigger_words: str = ""
    prediction_type: str | None = None  # "epsilon" or "v"; None for flow models


def training_metadata(facts: TrainingFacts) -> dict[str, str]:
    """All `ss_*` and `modelspec.*` entries for a trained file; hashes come with the writing."""
    values = {
        entry.metadata["key"]: getattr(facts, entry.name)
        for entry in fields(facts)
        if "key" in entry.metadata
    }
    metadata = {key: _text(value) for key, value in values.items() if value is not None}
    metadata |= _network(facts.base, facts.algorithm, facts.network_args)
    metadata["ss_datasets"] = json.dumps([_dataset(facts)])
    metadata |= _modelspec(facts.base, facts.output_name, facts.trigger_words)
    width, height = facts.resolution_px
    metadata["modelspec.resolution"] = f"{width}x{height}"
    if facts.finished_at is not None:
        date = datetime.fromtimestamp(int(facts.finished_at), tz=timezone.utc)
        metadata["modelspec.date"] = date.isoformat()
    if facts.prediction_type is not None:
        metadata["modelspec.prediction_type"] = facts.prediction_type
    if facts.clip_skip is not None:
        metadata["modelspec.encoder_layer"] = str(facts.clip_skip)
    return metadata


def minimum_metadata(
    family: str,
    title: str,
    ranks: Collection[int],
    alphas: Collection[float],
    algorithm: str = "lora",
) -> dict[str, str]:
    """The least that tools need to sort a file; "Dynamic" (kohya's word) where layers differ."""
    base = base_model(family)
    return {
        "ss_output_name": title,
        "ss_network_dim": _text(*set(ranks)) if len(set(ranks)) == 1 else "Dynamic",
        "ss_network_alpha": _text(*set(alphas)) if len(set(alphas)) == 1 else "Dynamic",
        **_network(base, algorithm, {}),
        **_modelspec(base, title, ""),
    }


def with_hashes(metadata: Mapping[str, str], serialized: Serialized) -> dict[str, str]:
    """`metadata` with the hashes by which CivitAI, A1111 and LoRA managers find the file.

    sshs_model_hash: SHA-256 of the body, so it does not depend on metadata.
    modelspec.hash_sha256: the same with "0x". sd-scripts hashes tensors in the order of its dict,
    which is not the file's, so its value differs from what readers compute.
    sshs_legacy_hash: first 8 hex digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file
    as it would be with only its `ss_*` metadata.
    """
    digest = hashlib.sha256(serialized.body).hexdigest()
    training_only = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    start = serialized.header(training_only) + bytes(serialized.body[:0x110000])
    return {
        **metadata,
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(start[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }


def with_trigger_words(metadata: Mapping[str, str], trigger_words: str) -> dict[str, str]:
    """`metadata` saying these trigger words; empty ones leave it as it is."""
    spoken = {"modelspec.trigger_phrase": trigger_words} if trigger_words else {}
    return {**metadata, **spoken}


def trigger_words(metadata: Mapping[str, str]) -> str:
    """A file's trigger words: its modelspec phrase, else its datasets' class tokens, else ""."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if phrase:
        return phrase
    try:
        datasets = json.loads(metadata.get("ss_datasets", "[]"))
        tokens = [part.get("class_tokens") for data in datasets for part in data["subsets"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""  # metadata is free text that anyone may write
    return ", ".join(dict.fromkeys(token for token in tokens if token and isinstance(token, str)))


def _network(base: BaseModel, algorithm: str, network_args: Mapping[str, Any]) -> dict[str, str]:
    is_lora = algorithm == "lora"
    args = network_args if is_lora else {"algo": algorithm, **network_args}
    return {
        "ss_base_model_version": base.version,
        "ss_v2": str(base.is_v2),
        "ss_network_module": "networks.lora" if is_lora else "lycoris.kohya",
        "ss_network_args": json.dumps(dict(args)),
    }


def _modelspec(base: BaseModel, title: str, phrase: str) -> dict[str, str]:
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": base.implementation,
        "modelspec.title": title,
    }
    return with_trigger_words(metadata, phrase)


def _dataset(facts: TrainingFacts) -> dict[str, Any]:
    """The entry of ss_datasets; LoRA managers read the first subset's class tokens."""
    return {
        "is_dreambooth": True,
        "batch_size_per_device": facts.batch_size,
        "num_train_images": facts.num_images,
        "resolution": list(facts.resolution_px),
        "enable_bucket": bool(facts.buckets),
        "tag_frequency": facts.tag_frequency or {},
        "bucket_info": facts.bucket_info or {},
        "subsets": [
            {
                "image_dir": folder,
                "img_count": counts.get("img_count", 0),
                "num_repeats": counts.get("n_repeats", 1),
                "class_tokens": facts.trigger_words or None,
                "is_reg": False,
            }
            for folder, counts in (facts.dataset_dirs or {}).items()
        ],
    }


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
