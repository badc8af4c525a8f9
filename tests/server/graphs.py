"""Graphs as `/prompt` takes them, with words for node ids."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_weave.lora_core.training.config import TrainOptions

CHECKPOINTS = {"SD1.5": "tiny_sd15.ckpt", "SD3": "tiny_sd3.ckpt"}
LATENTS = {"SD1.5": "EmptyLatentImage", "SD3": "EmptySD3LatentImage"}
SAMPLE_PX = 64
TRAINING = {
    "algorithm": "lora",
    "rank": 4,
    "alpha": 4.0,
    "steps": 4,
    "learning_rate": 1e-3,
    "batch_size": 1,
    "training_seed": 1,
    "output_name": "trained",
    "resume": "continue",
}
OPTIONS = dataclasses.asdict(TrainOptions())  # the server wants every input of a node
FOLDER = {
    "folder": "photos",
    "trigger_word": "zxq",
    "repeats": 1,
    "missing_caption": "empty",
    "resolution": 64,
    "buckets": True,
    "bucket_step": 32,
}

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """Inputs are values, or links `[node id, output]`."""
    return {"class_type": class_type, "inputs": inputs}


def checkpoint(family: str = "SD1.5") -> Graph:
    return {"base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS[family])}


def training(
    family: str = "SD1.5",
    *,
    folder: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Graph:
    """Checkpoint and folder into Train LoRA."""
    inputs = {**TRAINING, **settings}
    graph = checkpoint(family) | {
        "photos": node("LoRAWeaveImageFolder", **{**FOLDER, **(folder or {})}),
        "train": node(
            "LoRAWeaveTrain",
            model=["base", 0],
            clip=["base", 1],
            vae=["base", 2],
            dataset=["photos", 0],
            **inputs,
        ),
    }
    if options is not None:
        graph["options"] = node("LoRAWeaveTrainOptions", **{**OPTIONS, **options})
        graph["train"]["inputs"]["options"] = ["options", 0]
    return graph


def sampling(
    name: str, model: list[Any], clip: list[Any] | None = None, *, family: str = "SD1.5"
) -> Graph:
    """Two steps of sampling into the SaveImage node `name`; always the same seed and prompt."""
    return {
        f"{name} prompt": node("CLIPTextEncode", text="zxq, a cat", clip=clip or ["base", 1]),
        f"{name} latent": node(LATENTS[family], width=SAMPLE_PX, height=SAMPLE_PX, batch_size=1),
        f"{name} sampler": node(
            "KSampler",
            model=model,
            positive=[f"{name} prompt", 0],
            negative=[f"{name} prompt", 0],
            latent_image=[f"{name} latent", 0],
            seed=3,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        f"{name} decoded": node("VAEDecode", samples=[f"{name} sampler", 0], vae=["base", 2]),
        name: node("SaveImage", images=[f"{name} decoded", 0], filename_prefix=name),
    }
