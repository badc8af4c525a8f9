"""Load LoRA: one file onto a model and its text encoder."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core.host import apply, files, models
from ..lora_core.host.progress import NodeProgress
from ..lora_core.lora_file import LoraFile
from ..lora_core.lora_model import LoraModel
from ..lora_core.peft_config import stamps_of
from .schema import CATEGORY, schema
from .schema import LoraModel as LoraModelType

OUTPUTS = [
    io.Model.Output("loaded_model", display_name="model", tooltip="The model with the LoRA."),
    io.Clip.Output("loaded_clip", display_name="clip", tooltip="The text encoder with the LoRA."),
    LoraModelType.Output(
        "lora",
        display_name="lora",
        tooltip="The LoRA itself, for saving or core nodes.",
    ),
    io.String.Output(
        "trigger_words",
        display_name="trigger_words",
        tooltip="Words that the file was trained with.",
    ),
]


class Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return schema(
            node_id="LoRAWeaveLoad",
            display_name="Load LoRA (Weave)",
            category=f"{CATEGORY}/load",
            description="Applies a LoRA file to a model, a text encoder or both. The file is "
            "checked as a whole first: one that does not fit stops here, with the reason.",
            search_aliases=["lora loader", "power lora loader", "apply lora"],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="The model to change, if any."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to change, if any."),
                io.Combo.Input(
                    "lora_name", options=files.lora_names(), tooltip="A file of the loras folders."
                ),
                io.Float.Input(
                    "strength_model",
                    tooltip="How strongly the model changes; 0 is not at all, negative reverses.",
                    **strength,
                ),
                io.Float.Input(
                    "strength_clip",
                    tooltip="How strongly the text encoder changes.",
                    **strength,
                ),
                io.Boolean.Input(
                    "strict",
                    default=True,
                    optional=True,
                    tooltip="A file that does not fit as a whole is refused. Off: what fits is "
                    "loaded, and the node says what was left out.",
                ),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        """Instead of the host's check of the list, which offers no nearest name.

        A name that comes from another node is None here; `execute` checks it.
        """
        try:
            if lora_name is not None:
                files.find_lora(lora_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        """Files that were rewritten under the same name are read again."""
        if lora_name is None:
            return ""
        return repr(stamps_of(files.find_lora(lora_name)))

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        model: Any = None,
        clip: Any = None,
        strict: bool = True,
    ) -> io.NodeOutput:
        keymap = models.key_map(model, clip)
        lora = LoraFile.read(files.find_lora(lora_name), keymap, strict=strict)
        entry = apply.Entry(lora.adapters, strength_model, strength_clip)
        carried = LoraModel.from_file(lora, keymap)
        loaded = apply.apply(model, clip, [entry])
        NodeProgress(cls.hidden.unique_id).text("\n".join(lora.problems))
        left_out = {"text": lora.problems} if lora.problems else None
        return io.NodeOutput(*loaded, carried, carried.info.trigger_words, ui=left_out)
