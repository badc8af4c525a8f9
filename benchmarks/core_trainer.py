"""Core's own TrainLoraNode as a case of a benchmark."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import measure
import sd15
from measure import Clock

SETTINGS = {  # a host takes those that it knows
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "learning_rate": 2e-4,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 0,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "quantized_backward": False,
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "existing_lora": "[None]",
    "bucket_mode": False,
}


def modes(comfyui: Path) -> tuple[str, ...]:
    """The modes of core's node in this host: 0.3.75 has no bypass_mode."""
    source = (comfyui / "comfy_extras" / "nodes_train.py").read_text(encoding="utf-8")
    return ("default", "bypass_mode") if "bypass_mode" in source else ("default",)


def run(
    clock: Clock, *, device: str, comfyui: Path, size: str, mode: str, rank: int, steps: int
) -> dict[str, Any]:
    """Core's own node, run as the host's executor runs it; its progress bar is our clock."""
    measure.enter(comfyui, device)
    import comfy.utils
    import torch
    from comfy_extras import nodes_train

    class Bar:
        def __init__(self, total: int) -> None:
            pass

        def update(self, value: int) -> None:  # after each optimizer step
            clock.tick()

    nodes_train.ProgressBar = Bar
    comfy.utils.PROGRESS_BAR_ENABLED = False
    node = nodes_train.TrainLoraNode
    known = inspect.signature(node.execute).parameters
    settings = SETTINGS | {"rank": rank, "steps": steps}
    settings["bypass_mode"] = mode == "bypass_mode"
    with torch.inference_mode():
        patcher = sd15.build(size, "fp32", device)
        # 0.33 trains a second copy, which it loads from disk through this; here it is built anew.
        patcher.cached_patcher_init = (sd15.rebuild, (size, "fp32", device))
        node.execute(
            model=[patcher],
            latents=[{"samples": samples} for samples in sd15.latents(patcher)],
            positive=[sd15.conditioning(size)],
            **{name: [value] for name, value in settings.items() if name in known},
        )
    return {}
