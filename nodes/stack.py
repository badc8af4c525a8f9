"""LoRA Stack: several LoRAs in one node, blended by weight, onto a model and its text encoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core.blend import RULES
from ..lora_core.host import stacks
from ..lora_core.peft_config import stamps_of
from ..lora_core.stack_rows import parse_rows
from . import stack_run
from .schema import CATEGORY, LoraStack, Rows, Stack, schema
from .schema import LoraModel as LoraModelType

LORA_INPUTS = ("lora_1", "lora_2", "lora_3", "lora_4")
LORA_STACK_OUTPUT = 2  # its place among the outputs
MODES = {
    "patch": "the weights themselves are changed, once; sampling costs nothing more.",
    "live": "beside the weights: strengths and schedules change at once; for quantised models too.",
}

SOCKETS: list[Any] = [
    io.Model.Input("model", optional=True, tooltip="The model to change, if any."),
    io.Clip.Input("clip", optional=True, tooltip="The text encoder to change, if any."),
    LoraStack.Input("lora_stack", optional=True, tooltip="LoRAs of other packs' nodes; first."),
    Stack.Input("stack", optional=True, tooltip="Another LoRA Stack, taken before the rows."),
    *(
        LoraModelType.Input(name, optional=True, tooltip="A LoRA from a trainer, at strength 1.")
        for name in LORA_INPUTS
    ),
]
OUTPUTS = [
    io.Model.Output("stacked_model", display_name="model", tooltip="The model with all LoRAs."),
    io.Clip.Output("stacked_clip", display_name="clip", tooltip="The text encoder with them."),
    LoraStack.Output(
        "stacked_loras",
        display_name="lora_stack",
        tooltip="Names and effective strengths, for nodes of other packs.",
    ),
    Stack.Output(
        "stacked",
        display_name="stack",
        tooltip="The whole stack at its effective strengths, for our nodes.",
    ),
    io.String.Output(
        "trigger_words", display_name="trigger_words", tooltip="Words that the files name."
    ),
    io.String.Output(
        "report",
        display_name="report",
        tooltip="Effective strengths, and how much the LoRAs get into each other's way.",
    ),
]


class StackNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveStack",
            display_name="LoRA Stack",
            category=f"{CATEGORY}/load",
            description="Any number of LoRAs in one node: switch, order and weigh them, blend "
            "their strengths, and apply all of them at once.",
            search_aliases=["power lora loader", "lora stacker", "multi lora", "lora blend"],
            inputs=[
                *SOCKETS,
                io.Combo.Input(
                    "normalise",
                    options=list(RULES),
                    default="off",
                    tooltip="Blends the strengths of all LoRAs that are on. "
                    + " ".join(f"{name}: {text}" for name, text in RULES.items()),
                ),
                io.Float.Input(
                    "master",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies every strength, after blending.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="patch",
                    tooltip=" ".join(f"{name}: {text}" for name, text in MODES.items()),
                ),
                Rows.Input(
                    "rows",
                    optional=True,
                    tooltip="The LoRAs of this node. For programs: JSON as the help page shows it.",
                ),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, rows: Any = None) -> bool | str:
        """A row that can't be read, or whose file is missing, stops the prompt before it runs."""
        try:
            stacks.of_rows(parse_rows(rows or ""))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, rows: Any = None, **_: Any) -> str:
        """Files that were rewritten under the same name are read again."""
        entries = stacks.of_rows(parse_rows(rows or ""))
        return f"{rows}:{[stamps_of(entry.path) for entry in entries if entry.path]}"

    @classmethod
    def execute(
        cls, normalise: str, master: float, mode: str, rows: Any = None, **sockets: Any
    ) -> io.NodeOutput:
        entries = stack_run.gather(rows or "", LORA_INPUTS, sockets)
        model, clip = sockets.get("model"), sockets.get("clip")
        done = stack_run.apply_stack(entries, model, clip, normalise, master, mode, rows)
        is_asked = stacks.is_linked(cls.hidden.prompt, cls.hidden.unique_id, LORA_STACK_OUTPUT)
        loras = stacks.as_lora_stack(done.stack, now=is_asked)
        outputs = (done.model, done.clip, loras, done.stack, done.trigger_words, done.report)
        return io.NodeOutput(*outputs, ui={"lora_weave_stack": [done.shown]})
