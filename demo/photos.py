"""A dozen real photographs with captions, cropped and scaled from those in scikit-image's wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from PIL import Image

SHORT_SIDE_PX = 192
# file in skimage/data: (box to cut out as shares of width and height, caption)
PHOTOS = {
    "astronaut.png": ((0.0, 0.0, 0.9, 0.9), "an astronaut in an orange suit, smiling"),
    "brick.png": ((0.0, 0.1, 1.0, 0.8), "a wall of bricks"),
    "camera.png": ((0.1, 0.0, 0.8, 1.0), "a man with a camera on a tripod"),
    "chelsea.png": ((0.1, 0.0, 0.9, 1.0), "the face of a ginger cat"),
    "coffee.png": ((0.15, 0.0, 0.9, 1.0), "a cup of coffee on a saucer with a spoon"),
    "coins.png": ((0.0, 0.0, 1.0, 1.0), "rows of old coins"),
    "grass.png": ((0.0, 0.0, 1.0, 1.0), "blades of grass"),
    "hubble_deep_field.jpg": ((0.2, 0.1, 0.8, 0.9), "galaxies in deep space"),
    "moon.png": ((0.0, 0.0, 1.0, 1.0), "the surface of the moon"),
    "motorcycle_left.png": ((0.1, 0.1, 0.9, 1.0), "a red motorcycle in a garage"),
    "retina.jpg": ((0.1, 0.1, 0.9, 0.9), "the retina of an eye"),
    "rocket.jpg": ((0.15, 0.0, 0.85, 1.0), "a rocket on its launch pad"),
}


def write(folder: Path) -> list[Path]:
    """Write `<name>.jpg` and its caption `<name>.txt` for every photograph; returns the images.

    What is there already is left alone: the same files are the same dataset to a training run.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the photographs are in scikit-image: pip install scikit-image")
    source = Path(spec.origin).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (box, caption) in PHOTOS.items():
        path = folder / f"{Path(name).stem}.jpg"
        if not path.exists():
            cut_out(source / name, box).save(path, quality=92)
        path.with_suffix(".txt").write_text(f"a photo of {caption}\n", encoding="utf-8")
        written.append(path)
    return written


def cut_out(path: Path, box: tuple[float, float, float, float]) -> Image.Image:
    """The part `box` of an image, its short side scaled to `SHORT_SIDE_PX`."""
    with Image.open(path) as whole:
        width, height = whole.size
        left, top, right, bottom = box
        edges = (left * width, top * height, right * width, bottom * height)
        part = whole.convert("RGB").crop(tuple(round(edge) for edge in edges))
    scale = SHORT_SIDE_PX / min(part.size)
    size = (round(part.width * scale), round(part.height * scale))
    return part.resize(size, Image.Resampling.LANCZOS)
