"""Pixels of training images, scaled and cropped to their buckets."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .buckets import Placement
from .images import ImageError, read_rgb

if TYPE_CHECKING:
    from .dataset import Item


def read_pixels(item: "Item", placement: Placement) -> Tensor:
    """Pixels of an item, scaled with Lanczos, cropped: float32 (H, W, 3), 0..1, the bucket's size.

    Raises ValueError naming the item where its file has changed or gone since the scan.
    """
    if placement.original_px != item.size_px:
        raise ValueError(
            f"{item.name}: the image is {item.size_px}, its placement {placement.original_px} px"
        )
    if item.pixels is not None:
        return _from_tensor(item.pixels, placement)
    if item.path is None:
        raise ValueError(f"{item.name}: neither a file nor pixels")
    try:
        data = item.path.read_bytes()
    except OSError as error:
        raise ValueError(f"{item.name}: can't be read any more: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise ValueError(f"{item.name}: the file has changed since the folder was read; run again")
    try:
        image = read_rgb(data)
    except ImageError as error:
        raise ImageError(f"{item.name}: {error}") from error
    if image.size != placement.resize_px:
        image = image.resize(placement.resize_px, Image.Resampling.LANCZOS)
    image = image.crop(_box(placement))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / np.float32(255))


def _box(placement: Placement) -> tuple[int, int, int, int]:
    (left, top), (width, height) = placement.crop_xy, placement.bucket_px
    return (left, top, left + width, top + height)


def _from_tensor(pixels: Tensor, placement: Placement) -> Tensor:
    left, top, right, bottom = _box(placement)
    if placement.resize_px == placement.original_px:
        return pixels[top:bottom, left:right].clone()
    planes = [  # in floats: no rounding to 8 bits on the way
        Image.fromarray(plane).resize(placement.resize_px, Image.Resampling.LANCZOS)
        for plane in np.ascontiguousarray(pixels.numpy().transpose(2, 0, 1))
    ]
    stacked = np.stack([np.asarray(plane)[top:bottom, left:right] for plane in planes], axis=-1)
    return torch.from_numpy(stacked).clamp_(0, 1)


def pixels_of(image: Tensor) -> Tensor:
    """An image tensor (H, W, C) of the graph as training pixels: float32 (H, W, 3), CPU, 0..1.

    C may be 1 (grey), 3 or 4 (RGBA, put on white). Raises ImageError for other shapes and for
    values that are not finite.
    """
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        shape = "x".join(map(str, image.shape))
        raise ImageError(f"shape {shape}: an image must be height x width x 1, 3 or 4 channels")
    pixels = image.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(pixels).all()):
        raise ImageError("holds values that are not finite (NaN or infinite)")
    if pixels.min() < 0 or pixels.max() > 1:
        pixels = pixels.clamp(0, 1)
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:]
        pixels = pixels[:, :, :3] * alpha + (1 - alpha)
    return pixels.expand(-1, -1, 3).contiguous()


def hash_pixels(pixels: Tensor) -> str:
    """sha256 of an in-memory image: of its size and its float32 values."""
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(np.ascontiguousarray(pixels.numpy()).data)
    return digest.hexdigest()
