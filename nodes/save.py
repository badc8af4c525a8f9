"""Save LoRA: a LORA_MODEL from any node as a file with metadata."""

from __future__ import annotations

from typing import Any, cast

import torch
from comfy_api.latest import io

from ..lora_core.files import next_free
from ..lora_core.host import files
from ..lora_core.lora_model import FORMATS, Format, LoraModel
from ..lora_core.metadata import with_trigger_words
from .schema import CATEGORY, check_choice, schema
from .schema import LoraModel as LoraModelType

AUTOMATIC = "automatic"
DTYPES = {
    "as it is": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveSave",
            display_name="Save LoRA (Weave)",
            category=f"{CATEGORY}/load",
            description="Writes a LoRA to output/loras, with the metadata that other tools read. "
            "An existing file is never overwritten: the next free number is added to the name.",
            search_aliases=["save lora weights", "export lora"],
            is_output_node=True,
            inputs=[
                LoraModelType.Input("lora", tooltip="From a node that trains or loads a LoRA."),
                io.String.Input(
                    "output_name", default="my_lora", tooltip="Name of the file under output/loras."
                ),
                io.Combo.Input(
                    "format",
                    options=[AUTOMATIC, *FORMATS],
                    tooltip="kohya: read by every tool, for LoRAs that know their model or whose "
                    "layers tell its family. "
                    "comfyui: the names of this program, for any LoRA. "
                    "diffusers: for programs built on it, which keep alpha in the metadata; "
                    "ComfyUI's own loaders would not read that alpha. "
                    "automatic: kohya for LoRAs that know their model, else comfyui.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="float16",
                    tooltip="float16 is half the size of float32 and exact enough to use.",
                ),
                io.String.Input(
                    "trigger_words", default="", tooltip="Written to the file; empty keeps its own."
                ),
                io.String.Input(
                    "comment", default="", multiline=True, tooltip="A note written to the file."
                ),
            ],
            outputs=[
                io.String.Output("path", display_name="path", tooltip="Where the file was written.")
            ],
        )

    @classmethod
    def execute(
        cls,
        lora: dict[str, Any],
        output_name: str,
        format: str,
        dtype: str,
        trigger_words: str,
        comment: str,
    ) -> io.NodeOutput:
        check_choice("format", format, [AUTOMATIC, *FORMATS])
        check_choice("dtype", dtype, DTYPES)
        path = next_free(files.output_path(output_name), lambda path: not path.exists())
        carried = LoraModel.of(lora)
        metadata = said(path.stem, trigger_words.strip(), comment.strip())
        carried.save(
            path, format=format_for(carried, format), dtype=DTYPES[dtype], metadata=metadata
        )
        return io.NodeOutput(str(path), ui={"text": (str(path),)})


def format_for(lora: LoraModel, format: str) -> Format:
    """The format asked for; automatic is kohya's for LoRAs that know their model."""
    if format == AUTOMATIC:
        return "comfyui" if lora.info.keymap is None else "kohya"
    return cast(Format, format)


def said(name: str, trigger_words: str, comment: str) -> dict[str, str]:
    """What the user says of the file, as metadata."""
    metadata = {"ss_output_name": name, "modelspec.title": name}
    if comment:
        metadata["ss_training_comment"] = comment
    return with_trigger_words(metadata, trigger_words)
