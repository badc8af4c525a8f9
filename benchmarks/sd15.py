"""An SD1.5-size UNet with random weights, and what a training step on it takes in."""

from __future__ import annotations

from typing import Any

LATENT_SHAPE = (1, 4, 32, 32)  # 256x256 px
TOKENS = 77

_SD15 = {  # what the host's model_detection finds in an SD1.5 checkpoint
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
UNETS = {
    "sd15": _SD15,
    "tiny": _SD15
    | {
        "model_channels": 64,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "context_dim": 96,
    },
}


def build(size: str, dtype: str, device: str) -> Any:
    """A MODEL of SD1.5's class with seeded random weights of variance 1/fan-in."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(dict(UNETS[size]))
    config.set_inference_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], None)
    model = config.get_model({}, "", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                bound = (3.0 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=torch.device(device), offload_device=torch.device("cpu")
    )


def rebuild(size: str, dtype: str, device: str, disable_dynamic: bool = False) -> Any:
    """`build` by the arguments with which 0.33 loads a model anew."""
    return build(size, dtype, device)


def latents(patcher: Any) -> list[Any]:
    """Two images' latents as a VAE gives them; 0.3.75's node takes no single one."""
    import torch

    generator = torch.Generator().manual_seed(2)
    noise = (torch.randn(LATENT_SHAPE, generator=generator) for _ in range(2))
    return [patcher.model.latent_format.process_out(one) for one in noise]


def conditioning(size: str) -> list[list[Any]]:
    """One prompt's CONDITIONING."""
    import torch

    generator = torch.Generator().manual_seed(3)
    width = UNETS[size]["context_dim"]
    return [[torch.randn((1, TOKENS, width), generator=generator), {}]]
