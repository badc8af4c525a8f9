"""Image files: what they hold, checked by decoding them, and their picture as people see it."""

import hashlib
import io
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, UnidentifiedImageError, features

from .buckets import Size

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# what a file may be, whatever its name says; not all that Pillow reads (EPS runs Ghostscript)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_IMAGE_PX = 178_956_970  # Pillow's own limit for a decompression bomb
MODES = frozenset("1 L LA P PA RGB RGBA RGBa RGBX CMYK YCbCr HSV I I;16 I;16B I;16L".split())
WITH_ALPHA = frozenset({"LA", "PA", "RGBA", "RGBa"})

# what Pillow's readers raise on broken files
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(OverflowError, struct.error, zlib.error),
)

ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = frozenset({5, 6, 7, 8})  # orientations that swap width and height

# first bytes of what people rename to .jpg
LOOKALIKES = (
    (4, b"ftypheic", "a HEIC photo; convert it to JPEG or PNG"),
    (4, b"ftypheix", "a HEIC photo; convert it to JPEG or PNG"),
    (4, b"ftypmif1", "a HEIF photo; convert it to JPEG or PNG"),
    (4, b"ftypavif", "an AVIF image; convert it to JPEG or PNG"),
    (4, b"ftyp", "a video"),
    (0, b"<", "a web page or an SVG"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image itself"),
)


class ImageError(ValueError):
    """An unusable training image; the message says why and leaves the name to the caller."""


class _StrictPillow:
    """Pillow's process-wide switches as this module needs them, while any thread is inside.

    Other packs, and the host in node_helpers.pillow, switch LOAD_TRUNCATED_IMAGES on: a truncated
    photo then decodes to grey without an error. MAX_IMAGE_PIXELS is off so that our own limit can
    name the size.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[bool, int | None] = (False, None)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self._before


strict_pillow = _StrictPillow()


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What a dataset needs to know of an image file. `notes`: what was left out or put right."""

    size_px: Size  # upright
    sha256: str  # of the file's bytes
    notes: tuple[str, ...] = ()


_FACTS_KEPT = 100_000
_facts: dict[tuple[str, int, int], ImageFacts] = {}


def inspect(path: Path) -> ImageFacts:
    """Decode an image and say what it is; remembered by (path, mtime, size) in this process.

    Raises ImageError where the file is unreadable, truncated, too large or of a pixel type that
    can't be shown.
    """
    try:
        stat = path.stat()
        key = (os.path.abspath(path), stat.st_mtime_ns, stat.st_size)
        known = _facts.get(key)
        if known is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            file.seek(0)
            size_px, notes = _check(file)
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror or error}") from error
    if len(_facts) >= _FACTS_KEPT:
        _facts.clear()
    facts = ImageFacts(size_px=size_px, sha256=digest.hexdigest(), notes=notes)
    _facts[key] = facts
    return facts


def _check(file: BinaryIO) -> tuple[Size, tuple[str, ...]]:
    """Upright size and notes of an image file, decoded as cheaply as finds every fault."""
    notes = []
    with strict_pillow, _open(file) as image:
        size = image.size
        # at an eighth of its size: all of the data is read, hardly any transformed (4 times faster)
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg:
            image.draft(None, (1, 1))
        _load(image, file)
        if not is_jpeg:
            size = image.size  # a TIFF turns itself upright in load()
        if image.mode not in MODES:
            raise ImageError(
                f"pixel type {image.mode!r} is not supported; save it as 8-bit RGB or grey"
            )
        if image.mode == "I":
            _grey_of(image)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            notes.append("animated: only its first picture is used")
        note = _profile(image)[1]
        if note:
            notes.append(note)
        if _orientation(image) in LYING:
            size = (size[1], size[0])
    return size, tuple(notes)


def _open(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except BROKEN as error:
        raise ImageError(_unreadable(file, error)) from error
    width, height = image.size
    if width * height > MAX_IMAGE_PX:
        raise ImageError(
            f"{width}x{height} px are {width * height / 1e6:.0f} million pixels; "
            f"at most {MAX_IMAGE_PX / 1e6:.0f} million are read. Scale it down."
        )
    return image


def _load(image: Image.Image, file: BinaryIO) -> None:
    try:
        image.load()
    except BROKEN as error:
        raise ImageError(_unreadable(file, error)) from error


def _unreadable(file: BinaryIO, error: Exception) -> str:
    """Why Pillow could not read the file, in words a user can act on."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if not num_bytes:
        return "the file is empty (0 bytes)"
    if not head.strip(b"\0"):
        return "the file holds only zeros: an interrupted copy or download"
    for at, magic, words in LOOKALIKES:
        if head[at:].lstrip().startswith(magic):
            return f"not an image that can be read: this is {words}"
    if head[:4] == b"RIFF" and num_bytes < int.from_bytes(head[4:8], "little") + 8:
        told = int.from_bytes(head[4:8], "little") + 8
        return f"the image is truncated: {num_bytes} of {told} bytes are there"
    if "truncated" in str(error).lower():
        return f"the image is truncated: it ends after {num_bytes} bytes, in the middle of its data"
    if isinstance(error, UnidentifiedImageError):
        kinds = ", ".join(FORMATS)
        return f"not an image that can be read: the content is none of {kinds}"
    return f"the image is damaged: {error}"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none that makes sense. Call it after load()."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except BROKEN:  # EXIF of a broken camera or tool; the picture itself is fine
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def _grey_of(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits, 65535 becoming 255; convert("L") would make all above 255 white."""
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
        raise ImageError("32-bit grey is not supported; save it as 8-bit or 16-bit grey")
    grey = Image.fromarray(np.rint(values / np.float32(257)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _profile(image: Image.Image) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform of an embedded colour profile to sRGB, or None, and why one is ignored."""
    icc = image.info.get("icc_profile")
    if not icc:
        return None, ""
    if not features.check("littlecms2"):
        return None, "its colour profile is ignored: this Pillow has no LittleCMS"
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(icc))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(profile, srgb, _colour_mode(image), "RGB"), ""
    except ImageCms.PyCMSError as error:
        return None, f"its colour profile is ignored: {error}"


def _colour_mode(image: Image.Image) -> str:
    """The mode of the image's colours alone, in which its colour profile speaks."""
    if image.mode == "CMYK":
        return "CMYK"
    return "L" if image.mode[0] in "1LI" else "RGB"


def _upright_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as people see it: 8-bit sRGB, on white where transparent, turned upright."""
    turn = TURNS.get(_orientation(image))
    transform, _ = _profile(image)
    mode = _colour_mode(image)
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow inverts every CMYK JPEG; only Adobe's are stored inverted
        image = ImageChops.invert(image)
    if image.mode[0] == "I":
        image = _grey_of(image)
    alpha = None
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    colour = image
    if transform is not None:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # it gives None only with inPlace
        colour = converted
    elif mode != "RGB":
        colour = image.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", colour.size, (255, 255, 255))
        white.paste(colour, mask=alpha)
        colour = white
    return colour if turn is None else colour.transpose(turn)


def read_rgb(data: bytes) -> Image.Image:
    """The picture of an image file's bytes: 8-bit sRGB, upright. Raises ImageError."""
    file = io.BytesIO(data)
    with strict_pillow:
        image = _open(file)
        _load(image, file)
        return _upright_rgb(image)
