"""Buckets: placements over many sizes, and batches that can be asked for by number."""

import math
import random

import pytest

from lora_weave.lora_core import buckets
from lora_weave.lora_core.batches import BatchPlan
from lora_weave.lora_core.buckets import place, plan, resolutions
from lora_weave.lora_core.dataset import Dataset, Item

SETTINGS = [(512, 64), (1024, 64), (1024, 32), (768, 16), (512, 8), (64, 64), (96, 32), (500, 48)]


def sizes(count, seed, low=64, high=5000):
    rng = random.Random(seed)
    return [
        tuple(round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in "wh")
        for _ in range(count)
    ]


def dataset(*item_sizes, **settings):
    items = tuple(
        Item(name=f"{n}.png", caption="", repeats=1, size_px=size, sha256=str(n), group="g")
        for n, size in enumerate(item_sizes)
    )
    return Dataset(name="set", items=items, **settings)


@pytest.mark.parametrize(("resolution", "high"), [(512, 1024), (1024, 2048)])
def test_the_list_is_the_one_of_sd_scripts(resolution, high):
    low = resolution // 2
    wanted = {(resolution, resolution)}
    for width in range(low, high + 1, 64):
        height = min(high, resolution * resolution // width // 64 * 64)
        if height >= low:
            wanted |= {(width, height), (height, width)}
    assert resolutions(resolution, 64) == tuple(sorted(wanted))


def test_the_list_at_512_px_by_name():
    assert {(512, 512), (640, 384), (384, 640), (576, 448), (1024, 256)} <= set(
        resolutions(512, 64)
    )


@pytest.mark.parametrize("buckets_on", [True, False])
@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
def test_every_placement_is_sound(resolution, step, buckets_on):
    least = buckets.least_side_px(step)
    checked = 0
    for size in sizes(1500, seed=resolution + step):
        if min(size) < least:
            with pytest.raises(ValueError, match="too small to train on"):
                place(size, resolution_px=resolution, step_px=step, buckets=buckets_on)
            continue
        placed = place(size, resolution_px=resolution, step_px=step, buckets=buckets_on)
        checked += 1
        for axis in (0, 1):
            assert placed.bucket_px[axis] % step == 0
            assert least <= placed.bucket_px[axis] <= placed.resize_px[axis] <= size[axis]
            over = placed.resize_px[axis] - placed.bucket_px[axis]
            assert placed.crop_xy[axis] == over // 2
        assert math.prod(placed.bucket_px) <= resolution**2
        # one scale for both sides, but for rounding to whole pixels
        scales = [(r - 0.5, r + 0.5, o) for r, o in zip(placed.resize_px, size, strict=True)]
        low, high = max(a / o for a, _, o in scales), min(b / o for _, b, o in scales)
        assert low <= high
        if not buckets_on:
            assert placed.bucket_px[0] == placed.bucket_px[1]
    assert checked > 200


def test_a_large_image_gets_the_bucket_of_the_nearest_aspect():
    listed = resolutions(512, 64)
    for size in sizes(500, seed=5, low=1100, high=4000):
        placed = place(size, resolution_px=512, step_px=64)
        off = [abs(width / height - size[0] / size[1]) for width, height in listed]
        assert placed.bucket_px == listed[off.index(min(off))]
        assert any(r == b for r, b in zip(placed.resize_px, placed.bucket_px, strict=True))
        fit = (size[0] / size[1]) / (placed.bucket_px[0] / placed.bucket_px[1])
        assert placed.lost == pytest.approx(1 - min(fit, 1 / fit), abs=0.01)


@pytest.mark.parametrize(
    ("size", "resize", "bucket"),
    [
        ((1000, 1000), (512, 512), (512, 512)),
        ((1500, 1000), (640, 427), (640, 384)),
        ((512, 512), (512, 512), (512, 512)),
        ((300, 300), (300, 300), (256, 256)),  # small: cut, not scaled
        ((127, 65), (127, 65), (64, 64)),
        ((600, 440), (524, 384), (512, 384)),  # over the area, but its bucket would enlarge it
        ((10000, 100), (10000, 100), (384, 64)),  # a strip: its middle
    ],
)
def test_sizes_by_hand_at_512_px(size, resize, bucket):
    placed = place(size, resolution_px=512, step_px=64)
    assert (placed.resize_px, placed.bucket_px) == (resize, bucket)
    assert placed.original_px == size


def test_without_buckets_the_square_is_never_larger_than_the_image():
    for size, side in [((2000, 900), 512), ((700, 400), 384), ((512, 512), 512), ((64, 70), 64)]:
        placed = place(size, resolution_px=512, step_px=64, buckets=False)
        assert placed.bucket_px == (side, side)
        assert min(placed.resize_px) == side


def test_plan_says_what_is_small_and_what_is_cut_off():
    bucketed = plan(dataset((600, 600), (100, 90), (4000, 300)), resolutions_px=[512])
    assert bucketed.bucket_of == ((512, 512), (64, 64), (1024, 256))
    small, cut, strip = bucketed.problems
    assert small == "1.png: 100x90 px is small for a resolution of 512 px: trained at 64x64 px"
    assert cut.startswith("1.png: 54% of it is cut off (100x90 px in a bucket of 64x64")
    assert strip.startswith("2.png: 70% of it is cut off (4000x300 px in a bucket of 1024x256")
    assert bucketed.counts() == {(64, 64): 1, (512, 512): 1, (1024, 256): 1}
    assert bucketed.info()["buckets"]["1"] == {"resolution": [512, 512], "count": 1}

    square = plan(dataset((700, 400), buckets=False), resolutions_px=[512])
    assert square.problems[0].startswith("0.png: 700x400 px is small for a resolution of 512 px")


def test_plan_takes_the_datasets_own_resolution_first_and_repeats_no_remark():
    known = dataset((100, 90), resolution_px=256)
    first = plan(known, resolutions_px=[1024])
    assert first.resolutions_px == (256,)
    again = plan(dataset((100, 90), resolution_px=256, problems=first.problems))
    assert again.problems == ()


def test_every_item_is_placed_at_every_resolution():
    items = dataset((1000, 1000), (600, 600), (300, 300))
    both = plan(items, resolutions_px=[768, 512])
    small, large = (plan(items, resolutions_px=[size]) for size in (512, 768))
    assert both.resolutions_px == (512, 768)
    assert both.placements == small.placements + large.placements
    assert both.item_of == (0, 1, 2, 0, 1, 2)
    assert sum(both.counts().values()) == 6
    # 600 px suffice for the smaller one
    assert both.problems == small.problems != large.problems


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {}, "resolution is not known"),
        (
            {"bucket_step_px": 20},
            {"resolutions_px": [512], "multiple_px": 8},
            "20 px.*multiple of 8",
        ),
        ({}, {"resolutions_px": [32]}, "resolution is 32 px.*at least 64"),
        ({"bucket_step_px": 0}, {"resolutions_px": [64]}, "bucket step is 0 px"),
        ({}, {"resolutions_px": [64]}, r"0\.png: 20x400 px is too small.*1\.png: 63x64 px"),
    ],
)
def test_plan_refuses(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(dataset((20, 400), (63, 64), **settings), **arguments)


def batches(bucket_of, repeats, batch_size, seed, epoch):
    """One epoch's batches, asked for by number."""
    drawn = BatchPlan(bucket_of, repeats, batch_size, seed)
    first = epoch * drawn.batches_per_epoch
    return [drawn.batch(first + number) for number in range(drawn.batches_per_epoch)]


def example(rng):
    shapes = [(512, 512), (640, 384), (384, 640)]
    count = rng.randint(1, 40)
    return [rng.choice(shapes) for _ in range(count)], [rng.randint(1, 4) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_hold_one_bucket_and_every_item_as_often_as_it_is_repeated(batch_size):
    rng = random.Random(batch_size)
    for seed in range(30):
        bucket_of, repeats = example(rng)
        cut = batches(bucket_of, repeats, batch_size, seed, epoch=seed % 3)
        assert all(len({bucket_of[index] for index in batch}) == 1 for batch in cut)
        assert all(1 <= len(batch) <= batch_size for batch in cut)
        counted = [sum(batch.count(index) for batch in cut) for index in range(len(repeats))]
        assert counted == repeats
        for shape in set(bucket_of):
            total = sum(r for b, r in zip(bucket_of, repeats, strict=True) if b == shape)
            of_shape = [len(b) for b in cut if bucket_of[b[0]] == shape]
            assert len(of_shape) == math.ceil(total / batch_size)  # only the last one is smaller


def test_the_order_depends_on_seed_and_epoch_alone():
    bucket_of, repeats = [(64, 64)] * 20 + [(128, 64)] * 20, [2] * 40
    first = batches(bucket_of, repeats, 4, seed=7, epoch=3)
    assert first == batches(bucket_of, repeats, 4, seed=7, epoch=3)
    others = [batches(bucket_of, repeats, 4, 7, epoch) for epoch in range(3)]
    others += [batches(bucket_of, repeats, 4, seed, 3) for seed in (0, -7, 2**63)]
    assert all(other != first for other in others)
    shapes = [bucket_of[batch[0]] for batch in first]
    assert shapes != sorted(shapes)  # buckets take turns


def test_the_order_of_a_seed_stays_as_it_was_released():
    assert batches([(64, 64)] * 3 + [(128, 64)] * 2, [1, 1, 1, 2, 1], 2, seed=42, epoch=1) == [
        [3],
        [1],
        [2, 0],
        [4, 3],
    ]


def test_a_plan_gives_any_batch_by_its_number():
    bucket_of, repeats = [(64, 64)] * 5 + [(128, 64)] * 4, [1, 2, 1, 1, 3, 1, 1, 1, 1]
    drawn = BatchPlan(bucket_of, repeats, 3, 11)
    straight = [drawn.batch(number) for number in range(4 * drawn.batches_per_epoch)]
    backwards = BatchPlan(bucket_of, repeats, 3, 11)
    assert [backwards.batch(n) for n in reversed(range(len(straight)))] == straight[::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(64, 64)], [1, 1], 1, 0), "1 buckets for 2 repeats"),
        (([(64, 64)], [1], 0, 0), "batch size is 0"),
        (([], [], 1, 0), "nothing to train on"),
    ],
)
def test_a_plan_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(*arguments)
    with pytest.raises(ValueError, match="start at 0"):
        BatchPlan([(64, 64)], [1], 1, 0).batch(-1)
