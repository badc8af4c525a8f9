"""LoRA Stack to Hooks: a stack for parts of the conditioning, or of the sampling range."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core.host.hooks import stack_hooks
from ..lora_core.schedule import Schedule
from .schema import CATEGORY, Stack, schema


class Hooks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveHooks",
            display_name="LoRA Stack to Hooks",
            category=f"{CATEGORY}/load",
            description="A stack as core's hooks, for the nodes that set hooks on conditioning: "
            "LoRAs for one prompt, one region or a part of the sampling. On quantised models and "
            "under dynamic VRAM use mode live of LoRA Stack in its place.",
            search_aliases=["create hook lora", "lora schedule", "lora keyframes"],
            inputs=[
                Stack.Input("stack", tooltip="From LoRA Stack, with no model linked there."),
                io.String.Input(
                    "schedule",
                    default="",
                    tooltip="Factors over the sampling range, as 0:0, 0.3:1, 1:0.5, linear between "
                    "the points; times each row's own schedule. Empty: as the rows are.",
                ),
                io.Hooks.Input("prev_hooks", optional=True, tooltip="Hooks to add these to."),
            ],
            outputs=[
                io.Hooks.Output(
                    "hooks", display_name="HOOKS", tooltip="For Set CLIP Hooks, Cond Set Props, ..."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, schedule: str | None = None) -> bool | str:
        try:
            Schedule.parse(schedule or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, stack: Any, schedule: str, prev_hooks: Any = None) -> io.NodeOutput:
        return io.NodeOutput(stack_hooks(stack, Schedule.parse(schedule), prev_hooks))
