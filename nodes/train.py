"""Train LoRA (Weave): a dataset and a model in, a LoRA out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core.dataset import Dataset
from ..lora_core.host.progress import NodeProgress
from ..lora_core.training.config import TrainConfig, TrainOptions
from .schema import CATEGORY, LossMap, config_inputs, schema
from .schema import Dataset as DatasetType
from .schema import LoraModel as LoraModelType
from .schema import Options as OptionsType
from .training_job import Request, train

OUTPUTS = [
    LoraModelType.Output("lora", display_name="lora", tooltip="The trained LoRA."),
    LossMap.Output(
        "loss_map",
        display_name="loss_map",
        tooltip="The loss of every step, for Plot Loss Graph.",
    ),
    io.Model.Output(
        "trained_model",
        display_name="model",
        tooltip="The model with the LoRA, at strength 1.",
    ),
    io.Clip.Output(
        "trained_clip",
        display_name="clip",
        tooltip="The text encoder with the LoRA, at strength 1; "
        "unchanged unless it was trained, too.",
    ),
    io.String.Output("path", display_name="path", tooltip="The LoRA file."),
    io.Int.Output(
        "trained_steps",
        display_name="steps",
        tooltip="How many steps the LoRA was trained for.",
    ),
]


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAWeaveTrain",
            display_name="Train LoRA (Weave)",
            category=f"{CATEGORY}/train",
            description="Trains a LoRA on the model as it is in the graph, without copying it. "
            "Interrupting keeps the LoRA so far, and queueing the same graph again goes on.",
            search_aliases=["lora trainer", "train lora", "finetune", "dreambooth"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, with all its patches."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Encodes the captions; needed to train."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the images; needed to train."),
                DatasetType.Input("dataset", tooltip="From Training Image Folder or Images."),
                *config_inputs(TrainConfig),
                LoraModelType.Input(
                    "start_from",
                    optional=True,
                    tooltip="A LoRA of this model to train further, of any type that Load LoRA "
                    "reads. It keeps its types and ranks; algorithm, rank and alpha hold for "
                    "layers that it lacks.",
                ),
                OptionsType.Input("options", optional=True, tooltip="From Training Options."),
            ],
            outputs=OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        dataset: Dataset,
        clip: Any = None,
        vae: Any = None,
        start_from: dict[str, Any] | None = None,
        options: TrainOptions | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        request = Request(
            model=model,
            clip=clip,
            vae=vae,
            dataset=dataset,
            config=TrainConfig(**settings),
            options=options or TrainOptions(),
            start_from=start_from,
        )
        result = train(request, NodeProgress(cls.hidden.unique_id))
        return io.NodeOutput(*result.outputs(), ui={"text": (result.summary,)})
