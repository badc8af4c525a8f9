"""Write tiny, complete checkpoints with random weights: SD1.5 (eps) and SD3 (flow), 1 MB each.

The host recognises a model family by its layer names and shapes, and some of those are fixed
(CLIP-L has 123 million weights). The files stay small all the same: every weight is a view into one
of a few shared random buffers, with rows that overlap, and `torch.save` keeps shared storages and
strides. The names and shapes come from the host's own modules, built on the meta device.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
# Rows of a matrix are windows of one buffer, this many numbers apart; tables with many rows use 1.
ROW_STEP = 3
MANY_ROWS = 4096


class Pool:
    """Random normal numbers, a buffer a standard deviation, given out as overlapping views."""

    def __init__(self, seed: int, size: int = 11_000) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.buffers: dict[float, Tensor] = {}

    def view(self, shape: Iterable[int], std: float) -> Tensor:
        shape = tuple(shape)
        std = float(f"{std:.2g}")  # few different values, so few buffers
        inner = math.prod(shape[1:])
        step = ROW_STEP if shape[0] < MANY_ROWS else 1
        needed = (shape[0] - 1) * step + inner
        buffer = self.buffers.get(std)
        if buffer is None or len(buffer) < needed:
            buffer = torch.randn(max(self.size, needed + 512), generator=self.generator) * std
            self.buffers[std] = buffer
        offset = int(torch.randint(len(buffer) - needed + 1, (), generator=self.generator))
        strides = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
        return buffer.as_strided(shape, (step, *strides), offset)


def constant(shape: Iterable[int], value: float) -> Tensor:
    return torch.tensor(value).expand(tuple(shape))


def weights(module: nn.Module, prefix: str, pool: Pool) -> Iterator[tuple[str, Tensor]]:
    """`(key, tensor)` for every parameter and buffer of a module on the meta device.

    Weights get a spread of 1/sqrt(inputs), which keeps activations near 1 through normalised
    networks; norms are the identity; biases are small.
    """
    owners = dict(module.named_modules())
    for name, meta in module.state_dict().items():
        owner = owners[name.rpartition(".")[0]]
        kind = type(owner).__name__
        shape = tuple(meta.shape)
        if "Norm" in kind:
            tensor = constant(shape, 1.0 if name.endswith("weight") else 0.0)
        elif kind == "Embedding":
            tensor = pool.view(shape, 1.0 if "token" in name else 0.3)
        elif name.endswith("pos_embed"):
            # shape (1, patches, width): rows along the second dimension
            tensor = pool.view(shape[1:], 0.5)[None]
        elif len(shape) == 1:
            tensor = pool.view(shape, 0.02)
        else:
            tensor = pool.view(shape, 1 / math.sqrt(math.prod(shape[1:])))
        yield prefix + name, tensor


def taesd(latent_channels: int, scale: float, shift: float, pool: Pool) -> dict[str, Tensor]:
    """A TAESD autoencoder under the keys that a checkpoint has. It keeps the colours of an image.

    Random ReLU networks turn every image into nearly the same grey. So the convolutions outside of
    the residual blocks pass the colours on, the blocks add a little, and the last layer of each
    half is fitted on random colour fields: latents of unit spread, decoded to a blurred copy.
    `scale` and `shift` are those of the family's latent format: they take back what the host
    applies to latents, as `VAELoader` does for the real TAESD files.
    """
    import comfy.taesd.taesd

    model = comfy.taesd.taesd.TAESD(latent_channels=latent_channels).requires_grad_(False)
    tensors = {
        name: _taesd_tensor(name, value.shape, pool) for name, value in model.state_dict().items()
    }
    tensors |= {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}
    model.load_state_dict(tensors)

    fields = torch.rand((16, 3, 6, 6), generator=pool.generator)
    images = nn.functional.interpolate(fields, size=64, mode="bicubic", align_corners=False).clamp(
        0, 1
    )
    encoder, decoder = model.taesd_encoder, model.taesd_decoder
    features = nn.Sequential(*list(encoder)[:-1])(images)
    mix = torch.randn((latent_channels, features.shape[1]), generator=pool.generator)
    latents = torch.einsum("lc,nchw->nlhw", mix, features)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    tensors |= _centre_tap(f"taesd_encoder.{len(encoder) - 1}", mix / std[:, None], -mean / std)

    latents = (latents - mean[:, None, None]) / std[:, None, None]
    inputs = nn.Sequential(*list(decoder)[:-1])(latents).movedim(1, -1).flatten(0, 2).double()
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    targets = images.movedim(1, -1).flatten(0, 2).double()
    ridge = 1e-4 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    fit = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets).float().T
    tensors |= _centre_tap(f"taesd_decoder.{len(decoder) - 1}", fit[:, :-1], fit[:, -1])
    return {"first_stage_model." + name: tensor for name, tensor in tensors.items()}


def _taesd_tensor(name: str, shape: torch.Size, pool: Pool) -> Tensor:
    layer, _, kind = name.rpartition(".")
    if ".conv." in name:  # in a residual block
        if kind == "bias":
            return pool.view(shape, 0.02)
        gain = 0.05 if layer.endswith(".4") else 1.4  # a ReLU halves the power
        return pool.view(shape, gain / math.sqrt(math.prod(shape[1:])))
    if kind == "bias":
        # lets the decoder's first ReLU pass latents of both signs
        return constant(shape, 2.0 if layer == "taesd_decoder.1" else 0.0)
    if shape[:2] == (64, 64):
        # Output channel o reads input channel 63 - o, smoothed; the row step of one kernel makes
        # this anti-diagonal a view of one short buffer.
        smooth = torch.tensor([0.25, 0.5, 0.25])
        buffer = torch.zeros((2 * 64 - 1) * 9)
        buffer[63 * 9 : 64 * 9] = torch.outer(smooth, smooth).flatten()
        return buffer.as_strided(shape, (9, 9, 3, 1))
    if layer == "taesd_encoder.0":  # colours mixed with positive weights, which ReLUs leave alone
        mix = torch.rand((64, 3), generator=pool.generator)
        return _centre_tap(layer, mix)[name]
    if layer == "taesd_decoder.1":
        mix = torch.randn((64, shape[1]), generator=pool.generator) / (2 * math.sqrt(shape[1]))
        return _centre_tap(layer, mix)[name]
    return constant(shape, 0.0)  # the last layers and the two scalars: fitted and set by `taesd`


def _centre_tap(layer: str, mix: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """A 3x3 convolution that mixes channels by the matrix `mix` and looks at one pixel only."""
    weight = torch.zeros((*mix.shape, 3, 3))
    weight[:, :, 1, 1] = mix
    return {f"{layer}.weight": weight} | ({} if bias is None else {f"{layer}.bias": bias.clone()})


def clip_l(prefix: str, pool: Pool, *, projection: bool) -> dict[str, Tensor]:
    """`projection` is the one of the pooled text, which files of SD1.5 don't have."""
    import comfy.sd1_clip

    module = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float32)
    owned = module.transformer if projection else module.transformer.text_model
    prefix += "transformer." if projection else "transformer.text_model."
    return dict(weights(owned, prefix, pool))


def sd15(seed: int = 0) -> dict[str, Tensor]:
    """UNet with one down- and one upsampling, CLIP-L, TAESD. The host fixes widths 320 and 768."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    pool = Pool(seed)
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 1),
        num_res_blocks=[1, 1],
        transformer_depth=[1, 0],
        transformer_depth_output=[1, 1, 0, 0],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        legacy=False,
        device="meta",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return {
        **dict(weights(unet, "model.diffusion_model.", pool)),
        **clip_l("cond_stage_model.", pool, projection=False),
        **taesd(latent_channels=4, scale=0.18215, shift=0.0, pool=pool),
    }


def sd3(seed: int = 0) -> dict[str, Tensor]:
    """MMDiT of depth 2 (width 128), CLIP-L, TAESD with 16 channels."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    pool = Pool(seed)
    mmdit = MMDiT(
        input_size=None,
        in_channels=16,
        depth=2,
        adm_in_channels=2048,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 128},
        },
        num_patches=64 * 64,
        pos_embed_max_size=64,
        device="meta",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return {
        **dict(weights(mmdit, "model.diffusion_model.", pool)),
        **clip_l("text_encoders.clip_l.", pool, projection=True),
        **taesd(latent_channels=16, scale=1.5305, shift=0.0609, pool=pool),
    }


FAMILIES = {"sd15": sd15, "sd3": sd3}


def write(folder: Path, family: str) -> Path:
    """Write `folder/tiny_<family>.ckpt` by way of a temporary file. The host must be importable."""
    path = folder / f"tiny_{family}.ckpt"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(FAMILIES[family](), part)
    os.replace(part, path)
    return path


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from devtools.inprocess import enter

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".host" / "ComfyUI")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    arguments = parser.parse_args()
    enter(arguments.comfyui, "--cpu")
    for family in arguments.family or FAMILIES:
        print(write(arguments.folder, family))


if __name__ == "__main__":
    main()
