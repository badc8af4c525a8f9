"""What Train LoRA refuses before any work, asked of real models in this process."""

import pytest
import torch

from lora_weave.lora_core.training.config import TrainConfig, TrainOptions
from lora_weave.nodes.training_check import Request, check

from .families import build
from .test_encode import build_vae, laid_out, pictures
from .text_encoders import build_clip


def request(**options) -> Request:
    dataset, _ = laid_out(pictures((64, 64)))
    return Request(
        model=build("SD1.5"),
        clip=build_clip("SD1"),
        vae=build_vae(),
        dataset=dataset,
        config=TrainConfig(output_name="checked"),
        options=TrainOptions(**options),
        start_from=None,
    )


def test_a_text_encoder_is_trained_on_the_models_device_only():
    """A clip for another device is fine as long as it only encodes captions beforehand."""
    asked = request(text_encoder=True)
    asked.clip.patcher.load_device = torch.device("meta")
    with pytest.raises(ValueError, match="Train LoRA can't start:") as caught:
        check(asked, nobody)
    assert (
        "- text_encoder needs model and clip on the same device: the model is loaded to cpu, clip "
        'to meta. Load clip with device "default", start ComfyUI with --gpu-only, or switch '
        "text_encoder off in Training Options"
    ) in str(caught.value)


def nobody(*_):
    """Wants no progress."""
