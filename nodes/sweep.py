"""LoRA Strength Sweep: one stack for each of several strengths of a LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..lora_core.stack import StackEntry
from ..lora_core.sweep import parse_values
from .schema import CATEGORY, Stack, check_choice, schema

PARTS = ("model and clip", "model", "clip")


class Sweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveSweep",
            display_name="LoRA Strength Sweep",
            category=f"{CATEGORY}/load",
            description="The same stack at several strengths of one LoRA, as a list: what follows "
            "runs once for each. Two sweeps in a row make every pair, for an XY plot.",
            search_aliases=["xy plot", "lora strength list", "lora grid"],
            inputs=[
                Stack.Input("stack", tooltip="From LoRA Stack, with no model linked there."),
                io.Int.Input(
                    "row", default=1, min=1, max=1000, tooltip="Which LoRA of the stack, from 1."
                ),
                io.String.Input(
                    "values",
                    default="0..1 | 5",
                    tooltip="From 0 to 1 in five values as it stands; 0..1 : 0.25 in steps; or a "
                    "list, as 0, 0.5, 1.",
                ),
                io.Combo.Input(
                    "part", options=list(PARTS), tooltip="Which of its strengths are set."
                ),
                io.String.Input(
                    "label",
                    optional=True,
                    force_input=True,
                    tooltip="Labels of a sweep before this one; they go in front.",
                ),
            ],
            outputs=[
                Stack.Output(
                    "stacks",
                    display_name="stack",
                    is_output_list=True,
                    tooltip="A stack for each value; for the input stack of LoRA Stack.",
                ),
                io.String.Output(
                    "labels",
                    display_name="label",
                    is_output_list=True,
                    tooltip="What each one is, for grids and file names.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, values: str | None = None) -> bool | str:
        try:
            if values is not None:
                parse_values(values)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, stack: Any, row: int, values: str, part: str, label: str = ""
    ) -> io.NodeOutput:
        check_choice("part", part, PARTS)
        if row > len(stack):
            raise ValueError(f"row is {row}, the stack has {len(stack)} LoRAs")
        numbers = parse_values(values)
        stacks = [at(stack, row - 1, number, part) for number in numbers]
        name = stack[row - 1].short
        labels = [f"{label} {name} {number:g}".strip() for number in numbers]
        return io.NodeOutput(stacks, labels)


def at(stack: tuple[StackEntry, ...], index: int, strength: float, part: str) -> Any:
    """The stack with one entry at a strength."""
    entry = stack[index]
    model = strength if part != "clip" else entry.model
    clip = strength if part != "model" else entry.clip
    return (*stack[:index], replace(entry, model=model, clip=clip), *stack[index + 1 :])
