"""Training Options: everything about a training run that most users leave alone."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core.training.config import TrainOptions
from .schema import CATEGORY, config_inputs, schema
from .schema import Options as OptionsType


class Options(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveTrainOptions",
            display_name="Training Options",
            category=f"{CATEGORY}/train",
            description="Advanced settings for Train LoRA (Weave). The defaults suit most runs.",
            search_aliases=["lora training settings", "optimizer", "scheduler", "min snr"],
            inputs=config_inputs(TrainOptions),
            outputs=[
                OptionsType.Output(
                    "options", display_name="options", tooltip="Connect to Train LoRA (Weave)."
                )
            ],
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(TrainOptions(**settings))
