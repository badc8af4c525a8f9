"""Training items and how to lay them out, with everything wrong with them said at once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import buckets as _buckets
from . import captions as _captions
from . import images as _images
from . import pixels as _pixels
from .captions import listed

if TYPE_CHECKING:
    from torch import Tensor

NUM_SAID = 100  # problems that one message lists in full


class DatasetError(ValueError):
    """A dataset that can't be trained on. The message lists every problem, as does `problems`."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        said = list(self.problems[:NUM_SAID])
        if len(self.problems) > NUM_SAID:
            said.append(f"and {len(self.problems) - NUM_SAID} more problems")
        if len(said) == 1:
            super().__init__(f"{where}: {said[0]}")
        else:
            super().__init__(
                "\n- ".join([f"{where}: {len(self.problems)} problems, no training yet", *said])
            )


@dataclass(frozen=True, kw_only=True)
class Item:
    """One training image with its caption."""

    name: str  # for messages: the path inside the dataset's folder, or "image 3"
    caption: str
    repeats: int  # times an epoch
    size_px: _buckets.Size  # upright
    sha256: str  # of the file's bytes, or of the pixels
    group: str  # name of the folder it lies in
    path: Path | None = None
    pixels: "Tensor | None" = field(default=None, compare=False, repr=False)  # in place of a file


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training items and how to lay them out. Nothing is decoded yet. `problems` are warnings."""

    name: str
    items: tuple[Item, ...]
    resolution_px: int = 0  # 0: the model family's
    buckets: bool = True
    bucket_step_px: int = 64
    trigger_word: str = ""
    problems: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples an epoch: the sum of all repeats."""
        return sum(item.repeats for item in self.items)

    def content_hash(self) -> str:
        """sha256 of what training sees: image bytes, captions, repeats, order, bucket settings.

        Independent of the folder's place and of file times.
        """
        content = {
            "items": [(item.sha256, item.caption, item.repeats) for item in self.items],
            "resolution_px": self.resolution_px,
            "buckets": self.buckets,
            "bucket_step_px": self.bucket_step_px,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """{folder: {tag: number of images}} for the metadata field `ss_tag_frequency`."""
        return _captions.tag_frequency((item.group, item.caption) for item in self.items)

    def folders(self) -> dict[str, dict[str, int]]:
        """{folder: {"n_repeats", "img_count"}} for the metadata field `ss_dataset_dirs`."""
        found: dict[str, dict[str, int]] = {}
        for item in self.items:
            entry = found.setdefault(item.group, {"n_repeats": item.repeats, "img_count": 0})
            entry["img_count"] += 1
        return found


def from_tensors(
    images: Sequence["Tensor"],
    captions: Sequence[str] = (),
    *,
    trigger_word: str = "",
    repeats: int = 1,
    resolution_px: int = 0,
    buckets: bool = True,
    bucket_step_px: int = 64,
    name: str = "images",
) -> Dataset:
    """A dataset of images in memory: tensors (H, W, C) or batches (B, H, W, C), C 1, 3 or 4, 0..1.

    `captions`: one for each image, one for all, or none. Raises DatasetError with all problems at
    once.
    """
    single = [
        picture
        for image in images
        for picture in (image.unbind(0) if image.ndim == 4 else (image,))
    ]
    wrong = wrong_settings(repeats, resolution_px, bucket_step_px)
    wrong += _wrong_numbers(len(single), len(captions))
    if wrong:
        raise DatasetError(name, wrong)
    trigger_word = _captions.clean_trigger(trigger_word)
    texts = _texts(captions, len(single), trigger_word)
    items, wrong = _items(single, texts, repeats=repeats, group=name)
    num_empty = sum(not item.caption for item in items)
    remarks = [f"{num_empty} of {len(single)} images have no caption"] if num_empty else []
    dataset = Dataset(
        name=name,
        items=items,
        resolution_px=resolution_px,
        buckets=buckets,
        bucket_step_px=bucket_step_px,
        trigger_word=trigger_word,
    )
    return finished(dataset, where=name, wrong=wrong, remarks=remarks)


def _wrong_numbers(num_images: int, num_captions: int) -> list[str]:
    wrong = [] if num_images else ["there are no images"]
    if num_captions not in (0, 1, num_images):
        wrong.append(
            f"{num_captions} captions for {num_images} images: "
            "there must be one for each, one for all, or none"
        )
    return wrong


def _texts(captions: Sequence[str], num_images: int, trigger_word: str) -> list[str]:
    """The caption of each image, with the trigger word."""
    texts = list(captions or [""])
    if len(texts) == 1:
        texts *= num_images
    return [_captions.with_trigger(_captions.one_line(text), trigger_word) for text in texts]


def _items(
    images: Sequence["Tensor"], texts: Sequence[str], *, repeats: int, group: str
) -> tuple[tuple[Item, ...], list[str]]:
    """The items of all images that can be used, and what is wrong with the others."""
    items: list[Item] = []
    wrong: list[str] = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True), start=1):
        try:
            items.append(_item(image, text, name=f"image {number}", repeats=repeats, group=group))
        except _images.ImageError as error:
            wrong.append(f"image {number}: {error}")
    return tuple(items), wrong


def _item(image: "Tensor", caption: str, *, name: str, repeats: int, group: str) -> Item:
    """Raises ImageError."""
    pixels = _pixels.pixels_of(image)
    return Item(
        name=name,
        caption=caption,
        repeats=repeats,
        size_px=(pixels.shape[1], pixels.shape[0]),
        sha256=_pixels.hash_pixels(pixels),
        group=group,
        pixels=pixels,
    )


def finished(dataset: Dataset, *, where: str, wrong: list[str], remarks: list[str]) -> Dataset:
    """The dataset with its remarks, or DatasetError with all that is wrong, sizes included."""
    least = _buckets.least_side_px(dataset.bucket_step_px)
    for item in dataset.items:
        try:
            _buckets.place(
                item.size_px,
                resolution_px=dataset.resolution_px or least,
                step_px=dataset.bucket_step_px,
            )
        except ValueError as error:
            wrong.append(f"{item.name}: {error}")
    if wrong:
        raise DatasetError(where, wrong)
    first: dict[str, str] = {}
    twice = [
        f"{item.name} (as {first[item.sha256]})"
        for item in dataset.items
        if first.setdefault(item.sha256, item.name) != item.name
    ]
    if twice:
        remarks = [*remarks, f"the same picture again: {listed(twice)}"]
    if dataset.resolution_px:
        remarks = [*remarks, *_buckets.plan(dataset).problems]
    return replace(dataset, problems=tuple(remarks))


def wrong_settings(repeats: int, resolution_px: int, bucket_step_px: int) -> list[str]:
    """What is wrong with the settings of a dataset, one sentence each."""
    wrong = []
    if repeats < 1:
        wrong.append(f"repeats is {repeats}; it must be at least 1")
    try:
        _buckets.check_settings(resolution_px, bucket_step_px)
    except ValueError as error:
        wrong.append(str(error))
    return wrong
