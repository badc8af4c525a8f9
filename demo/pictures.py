"""What the demo draws: the loss curve, and the images without and with the LoRA side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PALE, LINE = (32, 32, 38), (205, 208, 216), (196, 78, 40)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, without its bias towards the first value."""
    result, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """The round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    About five. `whole`: of 1 at least.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    size = next(power * times for times in (1, 2, 5, 10) if 5.5 * power * times >= high - low)
    size = max(size, 1.0) if whole else size
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [float(f"{number * size:.6g}") for number in range(first, last + 1)]


def loss_curve(losses: Sequence[float], size: tuple[int, int] = (900, 500)) -> Image.Image:
    """The loss of each step, pale, and its moving average. Those not finite are left out."""
    points = [(step, loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = 70, 40, size[0] - 20, size[1] - 50
    draw.text((left, 10), "Training loss", font=font(18), fill=INK)
    if not points:
        draw.text((left, top), "no step was taken", font=font(14), fill=INK)
        return picture
    ordered = sorted(loss for _, loss in points)
    low, high = ordered[0], ordered[int(0.99 * (len(ordered) - 1))]
    high = high if high > low else low + 1.0
    last = points[-1][0]

    def place(step: float, loss: float) -> tuple[float, float]:
        share = min(1.0, (loss - low) / (high - low))
        return left + (right - left) * step / last, bottom - (bottom - top) * share

    for loss in ticks(low, high):
        y = place(0, loss)[1]
        draw.line([(left, y), (right, y)], fill=PALE)
        draw.text((left - 8, y), f"{loss:g}", font=font(13), fill=INK, anchor="rm")
    for step in ticks(0, last, whole=True):
        x = place(step, low)[0]
        draw.line([(x, bottom), (x, bottom + 5)], fill=PALE)
        draw.text((x, bottom + 8), f"{step:g}", font=font(13), fill=INK, anchor="mt")
    draw.text(((left + right) / 2, size[1] - 8), "step", font=font(13), fill=INK, anchor="mb")
    average = smoothed([loss for _, loss in points], weight=1 - 10 / max(100, len(points)))
    if len(points) > 1:
        draw.line([place(*point) for point in points], fill=PALE, width=1)
        means = [place(step, mean) for (step, _), mean in zip(points, average, strict=True)]
        draw.line(means, fill=LINE, width=3)
    return picture


def before_after(
    before: Sequence[Image.Image], after: Sequence[Image.Image], caption: Sequence[str]
) -> Image.Image:
    """Two rows of images with a word beside each, and lines of text below."""
    width, height = before[0].size
    gap, side, line_height = 8, 110, 24
    columns = len(before)
    total = (
        side + columns * (width + gap),
        2 * (height + gap) + gap + line_height * len(caption) + gap,
    )
    picture = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(picture)
    for row, (word, images) in enumerate((("without", before), ("with LoRA", after))):
        y = gap + row * (height + gap)
        draw.text((side / 2, y + height / 2), word, font=font(18), fill=INK, anchor="mm")
        for column, image in enumerate(images):
            picture.paste(image, (side + column * (width + gap), y))
    y = 2 * (height + gap) + gap
    for number, text in enumerate(caption):
        draw.text((gap, y + number * line_height), text, font=font(15), fill=INK)
    return picture
