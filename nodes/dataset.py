"""Training Image Folder and Training Images: where a dataset comes from."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core.captions import MISSING_CAPTION
from ..lora_core.dataset import Dataset, from_tensors
from ..lora_core.host import files
from ..lora_core.host.progress import NodeProgress
from ..lora_core.image_folder import fingerprint, scan
from .schema import CATEGORY, schema
from .schema import Dataset as DatasetType

MAX_THUMBNAILS = 12


def _layout_inputs() -> list[Any]:
    """The inputs that both dataset nodes have."""
    return [
        io.String.Input(
            "trigger_word",
            default="",
            tooltip="Put before every caption that does not have it; the word to prompt with.",
        ),
        io.Int.Input(
            "repeats",
            default=1,
            min=1,
            max=10000,
            tooltip="How often each image is seen in one pass over the dataset.",
        ),
    ]


def _bucket_inputs() -> list[Any]:
    return [
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=8192,
            step=64,
            tooltip="Training size in pixels: the side of a square of the same area. "
            "0 = automatic by the model: 512 for SD1.5, 1024 for SDXL, 768 and 1024 for Qwen-Image "
            "and Z-Image, 512 and 768 for others; of two sizes every image is trained at both.",
        ),
        io.Boolean.Input(
            "buckets",
            default=True,
            tooltip="Keep each image's shape as far as possible, by sorting images into sizes of "
            "the same area. Off: a square is cut out of every image.",
        ),
        io.Int.Input(
            "bucket_step",
            default=64,
            min=8,
            max=512,
            step=8,
            tooltip="Sides of buckets are multiples of this, in pixels.",
        ),
    ]


def _report(dataset: Dataset) -> str:
    lines = [f"{len(dataset.items)} images, {dataset.num_samples} a pass"]
    return "\n".join([*lines, *dataset.problems])


class ImageFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveImageFolder",
            display_name="Training Image Folder",
            category=f"{CATEGORY}/train",
            description="A folder of images with captions in .txt or .caption files beside them. "
            "Sub-folders named like 10_cat are repeated 10 times.",
            search_aliases=["lora dataset", "load image folder", "training data"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=files.dataset_folders(),
                    tooltip="A folder under input, or under a folder that the server's owner "
                    "lists as lora_weave_datasets in extra_model_paths.yaml.",
                ),
                *_layout_inputs(),
                io.Combo.Input(
                    "missing_caption",
                    options=list(MISSING_CAPTION),
                    tooltip="The caption of an image that has no caption file.",
                ),
                *_bucket_inputs(),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="Connect to Train LoRA (Weave)."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        """Instead of the host's check of the list, so that the message says what to do.

        A name that comes from another node is None here; `execute` checks it.
        """
        try:
            if folder is not None:
                files.find_dataset_folder(folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: Any) -> str:
        """Run again when a file in the folder has changed."""
        if folder is None:
            return ""
        return fingerprint(files.find_dataset_folder(folder))

    @classmethod
    def execute(
        cls,
        folder: str,
        trigger_word: str,
        repeats: int,
        missing_caption: Any,
        resolution: int,
        buckets: bool,
        bucket_step: int,
    ) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id)
        dataset = scan(
            files.find_dataset_folder(folder),
            roots=files.dataset_roots(),
            trigger_word=trigger_word,
            repeats=repeats,
            missing_caption=missing_caption,
            resolution_px=resolution,
            buckets=buckets,
            bucket_step_px=bucket_step,
            progress=lambda done, total: progress.phase("reading images", done, total),
        )
        progress.text(_report(dataset))
        shown = [item.path for item in dataset.items[:MAX_THUMBNAILS] if item.path is not None]
        return io.NodeOutput(dataset, ui={"images": files.previews(shown)})


class Images(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveImages",
            display_name="Training Images",
            category=f"{CATEGORY}/train",
            description="Images and captions from the graph as a dataset, for instance from the "
            "host's own dataset and caption nodes.",
            search_aliases=["lora dataset from images", "training data"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A batch or a list of images of any sizes."),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="A caption for each image, or one for all.",
                ),
                *_layout_inputs(),
                *_bucket_inputs(),
            ],
            outputs=[
                DatasetType.Output(
                    "dataset", display_name="dataset", tooltip="Connect to Train LoRA (Weave)."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images: list[Any],
        trigger_word: list[str],
        repeats: list[int],
        resolution: list[int],
        buckets: list[bool],
        bucket_step: list[int],
        captions: list[str] | None = None,
    ) -> io.NodeOutput:
        dataset = from_tensors(
            images,
            captions or [],
            trigger_word=trigger_word[0],
            repeats=repeats[0],
            resolution_px=resolution[0],
            buckets=buckets[0],
            bucket_step_px=bucket_step[0],
        )
        NodeProgress(cls.hidden.unique_id).text(_report(dataset))
        return io.NodeOutput(dataset)
