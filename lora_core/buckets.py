"""Aspect buckets: the size each image is trained at, and what is cut off."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dataset import Dataset

Size = tuple[int, int]  # width, height

MIN_SIDE_PX = 64
MAX_ASPECT = 4.0  # of the widest bucket: sides reach from half to twice the resolution
SAID_LOSS = 1 / 3  # cutting off more of an image than this is worth a word


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How an image becomes a sample: scaled to `resize_px`, `bucket_px` cut out at `crop_xy`.

    All are (width, height) or (x, y); `crop_xy` counts in the scaled image. SDXL's size
    conditioning is `original_px`, `crop_xy`, `bucket_px`. Nothing is ever enlarged: resize_px <=
    original_px.
    """

    original_px: Size
    resize_px: Size
    crop_xy: Size
    bucket_px: Size

    @property
    def lost(self) -> float:
        """Share of the image's area that is cut off, 0..1."""
        return 1 - math.prod(self.bucket_px) / math.prod(self.resize_px)


def least_side_px(step_px: int) -> int:
    """The smallest side that a bucket may have: the smallest multiple of the step from 64 px on."""
    return -(-MIN_SIDE_PX // step_px) * step_px


def check_settings(resolution_px: int, step_px: int) -> None:
    """Raises ValueError where a resolution (0: not known yet) or a bucket step can't be used."""
    if step_px < 1:
        raise ValueError(f"The bucket step is {step_px} px; it must be at least 1 px.")
    least = least_side_px(step_px)
    if resolution_px and resolution_px < least:
        raise ValueError(
            f"The resolution is {resolution_px} px; with a bucket step of {step_px} px "
            f"it must be at least {least} px."
        )


@lru_cache(maxsize=64)
def resolutions(resolution_px: int, step_px: int) -> tuple[Size, ...]:
    """The bucket sizes for a resolution, sorted; sides multiples of the step, area <= resolution².

    {(w, floor(area / w / step)·step)} in both orders for w from half to twice the resolution, and
    the square: sd-scripts library/model_util.py make_bucket_resolutions (48d368fa), whose range of
    256..1024 px this is at 512 px; a fixed 1024 would cut off SDXL's wide buckets.
    """
    check_settings(resolution_px, step_px)
    least = least_side_px(step_px)
    low = max(least, resolution_px // 2 // step_px * step_px)
    high = max(low, resolution_px * 2 // step_px * step_px)
    square = resolution_px // step_px * step_px
    sizes = {(square, square)}
    for width in range(low, high + 1, step_px):
        height = min(high, resolution_px**2 // width // step_px * step_px)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def place(size_px: Size, *, resolution_px: int, step_px: int, buckets: bool = True) -> Placement:
    """Where an image of `size_px` (upright) is trained at.

    Large enough: the bucket of the nearest aspect, the image scaled to cover it, its centre cut
    out. Smaller than that bucket: shrunk only if its area is over resolution_px², then both sides
    cut to multiples of the step (sd-scripts library/train_util.py BucketManager.select_bucket with
    no_upscale, 48d368fa). Without buckets: the square, or the largest one that the image holds.
    Raises ValueError for an image with a side under `least_side_px(step_px)`.
    """
    check_settings(resolution_px, step_px)
    least = least_side_px(step_px)
    if min(size_px) < least:
        width, height = size_px
        raise ValueError(
            f"{width}x{height} px is too small to train on: each side must be at least {least} px "
            f"(bucket step {step_px} px; images are never enlarged)"
        )
    if not buckets:
        side = min(resolution_px, *size_px) // step_px * step_px
        return _centred(size_px, (side, side), _cover(size_px, (side, side)))
    bucket = _nearest(size_px, resolution_px, step_px)
    if bucket[0] <= size_px[0] and bucket[1] <= size_px[1]:
        return _centred(size_px, bucket, _cover(size_px, bucket))
    return _without_enlarging(size_px, resolution_px, step_px)


def _nearest(size_px: Size, resolution_px: int, step_px: int) -> Size:
    """The bucket of the nearest aspect, |w/h - w_b/h_b| as in sd-scripts; ties to the larger."""
    aspect = size_px[0] / size_px[1]
    return min(
        resolutions(resolution_px, step_px),
        key=lambda size: (abs(size[0] / size[1] - aspect), -math.prod(size)),
    )


def _cover(size_px: Size, bucket_px: Size) -> Size:
    """The image's size when scaled to just cover the bucket."""
    (width, height), (bucket_width, bucket_height) = size_px, bucket_px
    if width * bucket_height > height * bucket_width:
        return max(bucket_width, round(width * bucket_height / height)), bucket_height
    return bucket_width, max(bucket_height, round(height * bucket_width / width))


def _without_enlarging(size_px: Size, resolution_px: int, step_px: int) -> Placement:
    least = least_side_px(step_px)
    width, height = size_px
    # of a strip narrower than any bucket only the middle counts: else it shrinks to nothing
    middle = (
        min(width, math.floor(height * MAX_ASPECT)),
        min(height, math.floor(width * MAX_ASPECT)),
    )
    if math.prod(middle) <= resolution_px**2:
        bucket = (middle[0] // step_px * step_px, middle[1] // step_px * step_px)
        return _centred(size_px, bucket, size_px)
    aspect = middle[0] / middle[1]
    by_width = max(least, int(math.sqrt(resolution_px**2 * aspect)) // step_px * step_px)
    by_height = max(least, int(math.sqrt(resolution_px**2 / aspect)) // step_px * step_px)
    # one side scaled to a multiple of the step, the other cut to one: whichever keeps the aspect
    wide = (by_width, max(least, int(by_width / aspect) // step_px * step_px))
    high = (max(least, int(by_height * aspect) // step_px * step_px), by_height)
    off_wide, off_high = (abs(math.log(b[0] / b[1] / aspect)) for b in (wide, high))
    if off_wide < off_high:
        bucket, scale = wide, by_width / middle[0]
    else:
        bucket, scale = high, by_height / middle[1]
    scale = max(scale, bucket[0] / middle[0], bucket[1] / middle[1])  # never distorted to fit
    return _centred(size_px, bucket, (round(width * scale), round(height * scale)))


def _centred(size_px: Size, bucket_px: Size, resize_px: Size) -> Placement:
    return Placement(
        original_px=size_px,
        resize_px=resize_px,
        crop_xy=((resize_px[0] - bucket_px[0]) // 2, (resize_px[1] - bucket_px[1]) // 2),
        bucket_px=bucket_px,
    )


@dataclass(frozen=True, kw_only=True)
class Bucketed:
    """A dataset laid out: its samples, each one an item of the dataset at one resolution."""

    resolutions_px: tuple[int, ...]  # ascending
    step_px: int
    item_of: tuple[int, ...]  # the sample's index among the dataset's items
    placements: tuple[Placement, ...]
    repeats: tuple[int, ...]
    problems: tuple[str, ...] = ()

    @property
    def bucket_of(self) -> tuple[Size, ...]:
        return tuple(placement.bucket_px for placement in self.placements)

    def counts(self) -> dict[Size, int]:
        """{bucket (w, h): samples an epoch}, repeats counted, sorted by bucket."""
        counts: dict[Size, int] = {}
        for placement, repeats in zip(self.placements, self.repeats, strict=True):
            counts[placement.bucket_px] = counts.get(placement.bucket_px, 0) + repeats
        return dict(sorted(counts.items()))

    def info(self) -> dict[str, object]:
        """What the metadata field `ss_bucket_info` holds, in sd-scripts' layout."""
        errors = [
            abs(p.original_px[0] / p.original_px[1] - p.bucket_px[0] / p.bucket_px[1])
            for p in self.placements
        ]
        return {
            "buckets": {
                str(number): {"resolution": list(size), "count": count}
                for number, (size, count) in enumerate(self.counts().items())
            },
            "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
        }


def plan(
    dataset: "Dataset", *, resolutions_px: Sequence[int] = (), multiple_px: int = 1
) -> Bucketed:
    """Place every item of a dataset, once for each resolution.

    `resolutions_px` are used where the dataset leaves its own at 0 (automatic); `multiple_px` is
    what every side must be a multiple of for the model (its latent factor times its patch size).
    Of several resolutions only the smallest has remarks: that is what an image has to suffice for.
    Raises ValueError listing every item that is too small, or for a bucket step that does not suit
    the model. Remarks that the dataset already carries are not said again.
    """
    resolutions_px = [dataset.resolution_px] if dataset.resolution_px else sorted(resolutions_px)
    step_px = dataset.bucket_step_px
    if not resolutions_px:
        raise ValueError("The training resolution is not known: set it on the dataset.")
    if step_px % multiple_px:
        raise ValueError(
            f"The bucket step is {step_px} px; "
            f"for this model it must be a multiple of {multiple_px} px."
        )
    for resolution_px in resolutions_px:
        check_settings(resolution_px, step_px)
    placements = [_place_all(dataset, resolution_px) for resolution_px in resolutions_px]
    num_items = len(dataset.items)
    return Bucketed(
        resolutions_px=tuple(resolutions_px),
        step_px=step_px,
        item_of=tuple(range(num_items)) * len(resolutions_px),
        placements=tuple(placement for placed in placements for placement in placed),
        repeats=tuple(item.repeats for item in dataset.items) * len(resolutions_px),
        problems=tuple(_said_of(dataset, placements[0], resolutions_px[0])),
    )


def _place_all(dataset: "Dataset", resolution_px: int) -> list[Placement]:
    """A placement for each item. Raises ValueError listing every item that is too small."""
    placements, wrong = [], []
    for item in dataset.items:
        try:
            placements.append(
                place(
                    item.size_px,
                    resolution_px=resolution_px,
                    step_px=dataset.bucket_step_px,
                    buckets=dataset.buckets,
                )
            )
        except ValueError as error:
            wrong.append(f"{item.name}: {error}")
    if wrong:
        raise ValueError(f"{dataset.name}: " + "; ".join(wrong))
    return placements


def _said_of(
    dataset: "Dataset", placements: Sequence[Placement], resolution_px: int
) -> Iterator[str]:
    """The remarks on all placements that the dataset does not carry already."""
    already = frozenset(dataset.problems)
    for item, placement in zip(dataset.items, placements, strict=True):
        for remark in _remarks(placement, resolution_px, dataset.bucket_step_px, dataset.buckets):
            if f"{item.name}: {remark}" not in already:
                yield f"{item.name}: {remark}"


def _remarks(placement: Placement, resolution_px: int, step_px: int, buckets: bool) -> list[str]:
    """What a user should know of a placement: smaller than asked, or much of it cut off."""
    (width, height), (bucket_width, bucket_height) = placement.original_px, placement.bucket_px
    said = []
    square = resolution_px // step_px * step_px
    if width * height < square**2 or (not buckets and bucket_width < square):
        said.append(
            f"{width}x{height} px is small for a resolution of {resolution_px} px: "
            f"trained at {bucket_width}x{bucket_height} px"
        )
    if placement.lost > SAID_LOSS:
        said.append(
            f"{placement.lost:.0%} of it is cut off ({width}x{height} px in a bucket of "
            f"{bucket_width}x{bucket_height}, bucket step {step_px} px)"
        )
    return said
