"""LoRA files of a few layers, and names for other nodes' lists, as the page's tests need them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

PEOPLE, STYLES = "people/anna.safetensors", "styles/watercolour soft.safetensors"
DETAIL, GRAIN = "detail_tweaker.safetensors", "film_grain.safetensors"
LONG = f"styles/{'a very long name that goes on ' * 5}v12.safetensors"
# Of files that are only named, never read.
CHECKPOINT, FOLDER = "sd15.safetensors", "ginger_cat"
NAMES = (PEOPLE, STYLES, DETAIL, GRAIN, LONG)
# Places of attention layers in SD1.5's UNet, in diffusers' numbers as kohya has them.
PLACES = {
    "down_blocks_1_attentions_0": 640,
    "mid_block_attentions_0": 1280,
    "up_blocks_1_attentions_0": 1280,
    "up_blocks_3_attentions_2": 320,
}


def write_loras(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        words = path.stem.split("_")[0].split(" ")[0]
        metadata = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": words}
        save_file(_tensors(generator), path, metadata)
    _picture().save((folder / PEOPLE).with_suffix(".png"))


def write_names(base: Path) -> None:
    save_file({"none": torch.zeros(1)}, base / "models" / "checkpoints" / CHECKPOINT)
    (base / "input" / FOLDER).mkdir()
    _picture().save(base / "input" / FOLDER / "1.png")


def _tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for place, width in PLACES.items():
        layer = f"lora_unet_{place}_transformer_blocks_0_attn2_to_k"
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, 768, generator=generator) * 0.01
        tensors[f"{layer}.lora_up.weight"] = torch.randn(width, 4, generator=generator) * 0.01
        tensors[f"{layer}.alpha"] = torch.tensor(4.0)
    return tensors


def _picture() -> Image.Image:
    """Soft bands of colour, as a preview."""
    across, down = torch.meshgrid(2 * [torch.linspace(0, 3, 256)], indexing="ij")
    waves = [torch.sin(across * 2 + down), torch.cos(down * 2 - across), torch.sin(across - down)]
    pixels = torch.stack([0.5 + 0.3 * wave for wave in waves], dim=-1)
    return Image.fromarray((pixels * 255).byte().numpy())
