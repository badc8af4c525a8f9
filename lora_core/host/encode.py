"""Pixels to latents, in batches, and captions to conditioning, each once and cached on disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..buckets import Bucketed, Placement
from ..cache import TensorCache
from ..dataset import Dataset, Item
from ..pixels import read_pixels
from .identity import clip_identity, vae_identity
from .models import conditioning_width, family_name
from .text_batch import encoded_together

FORMAT = "2"  # of the cache's entries; another number makes all of them anew
PIXELS_PER_BATCH = 4 * 1024 * 1024  # four images of 1024 x 1024
CAPTIONS_PER_BATCH = 8  # after each the user can interrupt

Progress = Callable[[str, int, int], None]  # what, done, of how many


def encode_images(
    vae: Any, dataset: Dataset, laid_out: Bucketed, cache: TensorCache, progress: Progress
) -> list[Tensor]:
    """The VAE's latents (1, C, ...) of every sample, on the CPU, in the samples' order.

    Cached by the image's bytes, its placement and the VAE. Images of one bucket are encoded
    together where `shares_batches`; a video VAE takes them one by one, since it reads a batch as
    frames.
    """
    identity = vae_identity(vae)
    items = [dataset.items[index] for index in laid_out.item_of]
    pairs = list(zip(items, laid_out.placements, strict=True))
    keys = [_key("latent", identity, item.sha256, repr(where)) for item, where in pairs]
    latents: dict[str, Tensor] = {}
    for key in keys:
        entry = cache.get(key)
        if entry is not None and "latent" in entry[0]:
            latents[key] = entry[0]["latent"]
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in latents}
    done = 0
    together = shares_batches(vae.device) and getattr(vae, "latent_dim", 2) != 3
    for batch in _batches(missing, one_by_one=not together):
        pixels = torch.stack([read_pixels(item, where) for _, item, where in batch])
        encoded = vae.encode(pixels).float().cpu()
        for (key, _, _), latent in zip(batch, encoded.split(1), strict=True):
            latents[key] = latent.clone()
            cache.put(key, {"latent": latents[key]})
        done += len(batch)
        progress("encoding images", done, len(missing))
    return [latents[key] for key in keys]


def encode_captions(
    clip: Any, captions: Iterable[str], cache: TensorCache, progress: Progress
) -> dict[str, list[Any]]:
    """{caption: CONDITIONING with one entry, on the CPU} for the distinct captions.

    Cached by the caption and the CLIP with its patches; encoded together where `shares_batches`.
    """
    identity = clip_identity(clip)
    distinct = list(dict.fromkeys(captions))
    found: dict[str, list[Any]] = {}
    for caption in distinct:
        entry = cache.get(_key("conditioning", identity, caption))
        if entry is not None:
            found[caption] = _unpack(*entry)
    missing = [caption for caption in distinct if caption not in found]
    size = CAPTIONS_PER_BATCH if shares_batches(clip.patcher.load_device) else 1
    for start in range(0, len(missing), size):
        batch = missing[start : start + size]
        encoded = encoded_together(clip, batch, partial(encode_caption, clip))
        for done, caption in enumerate(batch, start=start + 1):
            tensors, skeleton = _pack(encoded[caption])
            cache.put(_key("conditioning", identity, caption), tensors, skeleton)
            found[caption] = _unpack(tensors, skeleton)
            progress("encoding captions", done, len(missing))
    return found


def shares_batches(device: torch.device) -> bool:
    """Whether images and captions are encoded in batches there.

    Not on a CPU. The last bits of a result depend on the batch it was computed in, so on what else
    the cache lacked: the same seed would not give the same LoRA. A batch is hardly quicker there.
    """
    return device.type != "cpu"


def check_conditionings(conditionings: Iterable[list[Any]], patcher: Any) -> None:
    """Raise ValueError where the CLIP that made them is not of the model's kind, by their width."""
    wanted = conditioning_width(patcher)
    found = {entry[0].shape[-1] for entries in conditionings for entry in entries}
    if wanted is not None and found - {wanted}:
        raise ValueError(
            f"clip makes conditioning of width {', '.join(map(str, sorted(found)))}, the model "
            f"({family_name(patcher)}) takes {wanted}: connect the CLIP that belongs to the model"
        )


def encode_caption(clip: Any, caption: str) -> list[Any]:
    """CONDITIONING with one entry, by the CLIP as it is now; differentiable where grad is on.

    The caption is taken literally: brackets, which the host reads as weights, are escaped, unless
    they are already.
    """
    literal = re.sub(r"(?<!\\)([()])", r"\\\1", caption)
    options = clip.encode_from_tokens(clip.tokenize(literal), return_dict=True)
    return [[options.pop("cond"), options]]


def _batches(
    missing: dict[str, tuple[Item, Placement]], one_by_one: bool
) -> Iterable[list[tuple[str, Item, Placement]]]:
    by_bucket: dict[tuple[int, int], list[tuple[str, Item, Placement]]] = {}
    for key, (item, where) in missing.items():
        by_bucket.setdefault(where.bucket_px, []).append((key, item, where))
    for (width, height), members in by_bucket.items():
        size = 1 if one_by_one else max(1, PIXELS_PER_BATCH // (width * height))
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _pack(value: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors by number, and the JSON structure with {"tensor": number} in their places."""
    tensors: dict[str, Tensor] = {}

    def strip(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors[str(len(tensors))] = part.detach().cpu().clone().contiguous()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(part, dict):
            return {"dict": {str(name): strip(inner) for name, inner in part.items()}}
        if isinstance(part, Sequence) and not isinstance(part, str):
            return {"list": [strip(inner) for inner in part]}
        if part is None or isinstance(part, (str, int, float, bool)):
            return {"value": part}
        raise TypeError(f"conditioning holds a {type(part).__name__}, which can't be cached")

    return tensors, strip(value)


def _unpack(tensors: dict[str, Tensor], skeleton: Any) -> Any:
    kind, content = next(iter(skeleton.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _unpack(tensors, inner) for name, inner in content.items()}
    if kind == "list":
        return [_unpack(tensors, inner) for inner in content]
    return content


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((FORMAT, *parts)).encode("utf-8", "surrogatepass")).hexdigest()
