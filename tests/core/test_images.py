"""Images: every kind of file that a folder may hold, compared with arrays made by hand."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageFile

from lora_weave.lora_core import images
from lora_weave.lora_core.buckets import Placement, place
from lora_weave.lora_core.dataset import Item
from lora_weave.lora_core.pixels import hash_pixels, pixels_of, read_pixels

W, H = 96, 70


def picture(seed=0, width=W, height=H):
    """Colours with an edge, (H, W, 3) uint8: fit for JPEG, and no symmetry hides a turn."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y + 40 * seed) % 256], axis=-1)
    rgb[: height // 4, : width // 3] = (250, 10, 30)
    return rgb.astype(np.uint8)


def item_of(path):
    facts = images.inspect(Path(path))
    return Item(
        name=Path(path).name,
        caption="",
        repeats=1,
        size_px=facts.size_px,
        sha256=facts.sha256,
        group="g",
        path=Path(path),
    )


def whole(path):
    """All pixels of a file as (H, W, 3) in 0..255, neither scaled nor cropped."""
    item = item_of(path)
    everything = Placement(
        original_px=item.size_px, resize_px=item.size_px, crop_xy=(0, 0), bucket_px=item.size_px
    )
    pixels = read_pixels(item, everything)
    assert pixels.dtype == torch.float32 and pixels.shape == (*item.size_px[::-1], 3)
    assert 0 <= pixels.min() and pixels.max() <= 1
    return pixels.numpy() * 255


# how a stored array becomes the upright one, by EXIF orientation
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize(
    ("ending", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("webp", {"lossless": True, "exact": True}, 0),
        ("jpg", {"quality": 100, "subsampling": 0}, 4),  # JPEG's rounding, seen: 3
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, ending, options, tolerance):
    stored = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(stored).save(path, exif=exif, **options)
    upright = UPRIGHT[orientation](stored)
    assert images.inspect(path).size_px == upright.shape[1::-1]
    found = whole(path)
    smooth = np.abs(found - upright).max(axis=2) <= tolerance
    assert smooth.mean() > 0.98  # JPEG rings along the edge
    assert tolerance or smooth.all()


def test_tiff_orientation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path, "TIFF", exif=exif)
    np.testing.assert_allclose(whole(path), np.rot90(picture(), -1), atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"x"])
def test_broken_exif_leaves_the_picture_as_it_is(tmp_path, exif):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture()).save(path, exif=exif)
    assert whole(path).shape == (H, W, 3)


def test_orientation_of_nonsense_is_none(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 42
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(whole(tmp_path / "a.png"), picture(), atol=1e-3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big endian", "TIFF mode I"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    values = np.linspace(0, 65535, W * H).round().astype(np.uint16).reshape(H, W)
    path = tmp_path / "a.png"
    if kind == "TIFF big endian":
        image = Image.frombytes("I;16B", (W, H), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values.astype(np.int32) if kind.endswith("I") else values)
    image.save(path, kind.split()[0])
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")
    wanted = np.repeat(np.rint(values / 257.0)[..., None], 3, axis=2)
    np.testing.assert_allclose(whole(path), wanted, atol=1e-3)


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG file by hand."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks)]
    body += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_16_bit_rgb_and_16_bit_grey_with_a_transparent_value(tmp_path):
    rgb = (picture().astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    (tmp_path / "rgb.png").write_bytes(png(W, H, 16, 2, rows))
    np.testing.assert_allclose(whole(tmp_path / "rgb.png"), picture(), atol=1e-3)

    grey = np.full((H, W), 1000, ">u2")
    grey[:10] = 40000
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    (tmp_path / "grey.png").write_bytes(png(W, H, 16, 0, rows, (b"tRNS", struct.pack(">H", 1000))))
    found = whole(tmp_path / "grey.png")
    assert (found[10:] == 255).all()
    np.testing.assert_allclose(found[:10], round(40000 / 257), atol=1e-3)


def test_32_bit_grey_and_floats_are_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((H, W), 70000, np.int32)).save(path, "TIFF")
    with pytest.raises(images.ImageError, match="32-bit grey is not supported"):
        images.inspect(path)
    path = tmp_path / "b.png"
    Image.fromarray(np.zeros((H, W), np.float32)).save(path, "TIFF")
    with pytest.raises(images.ImageError, match="pixel type 'F' is not supported"):
        images.inspect(path)


def test_transparency_is_put_on_white(tmp_path):
    rgb = picture()
    alpha = np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    part = alpha[..., None] / 255
    np.testing.assert_allclose(whole(tmp_path / "rgba.png"), rgb * part + 255 * (1 - part), atol=1)

    grey = Image.fromarray(np.dstack([rgb[..., 0], alpha]))
    assert grey.mode == "LA"
    grey.save(tmp_path / "la.png")
    wanted = rgb[..., :1].repeat(3, axis=2) * part + 255 * (1 - part)
    np.testing.assert_allclose(whole(tmp_path / "la.png"), wanted, atol=1)

    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.webp", lossless=True, exact=True)
    np.testing.assert_allclose(whole(tmp_path / "a.webp"), rgb * part + 255 * (1 - part), atol=1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 128, 0])])
def test_transparency_of_a_palette(tmp_path, transparency):
    index = np.arange(W * H, dtype=np.uint8).reshape(H, W) % 3
    image = Image.fromarray(index).convert("P")
    image.putdata(index.ravel().tolist())
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    image.putpalette(colours.astype(np.uint8).tobytes())
    image.save(tmp_path / "p.png", transparency=transparency)
    alphas = transparency if isinstance(transparency, bytes) else bytes([255, 0, 255])
    part = np.frombuffer(alphas, np.uint8)[:, None] / 255
    wanted = (colours * part + 255 * (1 - part))[index]
    np.testing.assert_allclose(whole(tmp_path / "p.png"), wanted, atol=1)


def test_a_transparent_colour_of_an_rgb_png(tmp_path):
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png", transparency=(250, 10, 30))
    wanted = np.where((rgb == (250, 10, 30)).all(axis=2, keepdims=True), 255, rgb)
    np.testing.assert_allclose(whole(tmp_path / "a.png"), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("L", "JPEG"), ("P", "BMP"), ("L", "BMP")]
)
def test_grey_and_palettes(tmp_path, mode, kind):
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "a.png", kind)
    wanted = np.asarray(image.convert("RGB")).astype(float)
    assert np.abs(whole(tmp_path / "a.png") - wanted).mean() < (2 if kind == "JPEG" else 1e-3)


def without_adobe(data):
    """A JPEG less its Adobe segment (APP14)."""
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("adobe", [True, False])
@pytest.mark.parametrize(
    ("ink", "seen"),
    [((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_cmyk(tmp_path, ink, seen, adobe):
    image = Image.new("CMYK", (W, H), ink)
    file = io.BytesIO()
    # Pillow writes inverted values with the Adobe marker; without the marker they are not inverted
    (image if adobe else ImageChops.invert(image)).save(file, "JPEG", quality=95)
    data = file.getvalue()
    (tmp_path / "a.jpg").write_bytes(data if adobe else without_adobe(data))
    np.testing.assert_allclose(whole(tmp_path / "a.jpg"), np.full((H, W, 3), seen), atol=3)


def icc(colour_space, gamma):
    """A minimal ICC profile with sRGB's colours and a plain gamma curve."""

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249)}
    if colour_space == b"RGB ":
        tags[b"rXYZ"] = xyz(0.43607, 0.22249, 0.01392)
        tags[b"gXYZ"] = xyz(0.38515, 0.71687, 0.09708)
        tags[b"bXYZ"] = xyz(0.14307, 0.06061, 0.71410)
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags[b"kTRC"] = curve
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", colour_space, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def srgb_of_linear(values):
    linear = values / 255
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_colour_profile_is_converted_to_srgb(tmp_path):
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=icc(b"RGB ", 1.0))
    assert images.inspect(tmp_path / "a.png").notes == ()
    # 8 bits of linear light are coarse in the dark; the profile's primaries are rounded
    np.testing.assert_allclose(whole(tmp_path / "a.png"), srgb_of_linear(rgb), atol=3)

    alpha = np.full((H, W, 1), 128, np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "b.png", icc_profile=icc(b"RGB ", 1.0))
    wanted = srgb_of_linear(rgb) * (128 / 255) + 255 * (127 / 255)
    np.testing.assert_allclose(whole(tmp_path / "b.png"), wanted, atol=3)

    Image.fromarray(rgb[..., 0]).save(tmp_path / "c.png", icc_profile=icc(b"GRAY", 1.75))
    wanted = srgb_of_linear(255 * (rgb[..., :1] / 255) ** 1.75).repeat(3, axis=2)
    np.testing.assert_allclose(whole(tmp_path / "c.png"), wanted, atol=3)


@pytest.mark.parametrize("profile", [b"not a profile", icc(b"GRAY", 1.0)])
def test_an_unusable_colour_profile_is_ignored_and_said(tmp_path, profile):
    Image.fromarray(picture()).save(tmp_path / "a.png", icc_profile=profile)
    (note,) = images.inspect(tmp_path / "a.png").notes
    assert note.startswith("its colour profile is ignored: ")
    np.testing.assert_allclose(whole(tmp_path / "a.png"), picture(), atol=1e-3)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_an_animation_gives_its_first_picture(tmp_path, kind):
    frames = [Image.fromarray(picture()).quantize(64).convert("RGB"), Image.new("RGB", (W, H))]
    path = tmp_path / "a.webp"
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], **options)
    assert images.inspect(path).notes == ("animated: only its first picture is used",)
    np.testing.assert_allclose(whole(path), np.asarray(frames[0]), atol=1e-3)


def test_a_photo_with_a_second_one_inside_is_no_animation(tmp_path):
    first = Image.fromarray(picture())
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[first], quality=95)
    facts = images.inspect(tmp_path / "a.jpg")
    assert (facts.size_px, facts.notes) == ((W, H), ())
    assert np.abs(whole(tmp_path / "a.jpg") - picture()).mean() < 4


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "PNG"), ("a.png", "JPEG"), ("a.bmp", "WEBP")])
def test_the_content_counts_not_the_ending(tmp_path, name, kind):
    Image.fromarray(picture()).save(tmp_path / name, kind, quality=95)
    assert np.abs(whole(tmp_path / name) - picture()).mean() < 4


KINDS = {
    "jpg": {"quality": 90},
    "png": {},
    "webp": {"quality": 90},
    "bmp": {},
    "gif": {},
    "tiff": {},
}


def saved(kind, **options):
    file = io.BytesIO()
    image = Image.fromarray(picture())
    image.save(file, "JPEG" if kind == "jpg" else kind, **{**KINDS[kind], **options})
    return file.getvalue()


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95, -3])
@pytest.mark.parametrize("kind", ["jpg", "progressive", "png", "webp", "bmp"])
def test_a_truncated_image_is_found(tmp_path, monkeypatch, kind, part, lenient):
    # other packs leave this switch on, and Pillow then fills up with grey
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = saved("jpg", progressive=True) if kind == "progressive" else saved(kind)
    path = tmp_path / "a.png"
    path.write_bytes(data[: int(len(data) * part) if part > 0 else part])
    try:
        images.inspect(path)
    except images.ImageError as error:
        assert "truncated" in str(error)
    else:  # only a PNG's checksum is missing
        np.testing.assert_array_equal(whole(path), picture())
        assert kind == "png" and not 0 < part < 0.9
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (lenient, 1000)


def test_pillows_switches_stay_strict_until_the_last_reader_has_left(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with images.strict_pillow:
        with images.strict_pillow:
            assert not ImageFile.LOAD_TRUNCATED_IMAGES
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", list(KINDS))
def test_damaged_files_never_raise_anything_else(tmp_path, kind):
    data, rng = saved(kind), random.Random(kind)
    for number in range(120):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 30)):
            # half of the hits in the first bytes, where the structure is
            end = len(broken) if rng.random() < 0.5 else min(200, len(broken))
            broken[rng.randrange(end)] = rng.randrange(256)
        path = tmp_path / f"{number}.png"
        path.write_bytes(broken)
        try:
            size = images.inspect(path).size_px
        except images.ImageError as error:
            assert str(error)
        else:
            if size[0] * size[1] < 1 << 20:
                whole(path)  # what passes can be read


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(png(20000, 10000, 8, 2, b""))
    with pytest.raises(images.ImageError) as error:
        images.inspect(tmp_path / "a.png")
    assert str(error.value) == (
        "20000x10000 px are 200 million pixels; at most 179 million are read. Scale it down."
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (bytes(5000), "only zeros"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC photo; convert it"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "the content is none of JPEG, PNG"),
        (b"random text", "the content is none of JPEG, PNG"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, data, message):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(images.ImageError, match=message):
        images.inspect(tmp_path / "a.jpg")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(images.ImageError, match="can't be read: No such file"):
        images.inspect(tmp_path / "a.jpg")


def test_facts_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    first = images.inspect(path)
    monkeypatch.setattr(images, "_check", lambda file: pytest.fail("decoded again"))
    assert images.inspect(path) is first
    monkeypatch.undo()
    Image.fromarray(picture(1)).save(path)
    os.utime(path, ns=(1, 1))
    assert images.inspect(path).sha256 != first.sha256


def test_scaled_and_cropped_as_placed(tmp_path):
    rgb = picture(width=300, height=200)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    item = item_of(tmp_path / "a.png")
    placed = place(item.size_px, resolution_px=128, step_px=64)
    assert (placed.resize_px, placed.bucket_px) == ((192, 128), (128, 128))
    small = Image.fromarray(rgb).resize((192, 128), Image.Resampling.LANCZOS)
    wanted = np.asarray(small)[:, 32:160]
    np.testing.assert_allclose(read_pixels(item, placed) * 255, wanted, atol=1e-3)


def test_a_file_changed_or_gone_since_the_scan_is_said(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    item = item_of(path)
    placed = place(item.size_px, resolution_px=64, step_px=64)
    Image.fromarray(picture(1)).save(path)
    with pytest.raises(ValueError, match=r"a\.png: the file has changed"):
        read_pixels(item, placed)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.png: can't be read any more: No such file"):
        read_pixels(item, placed)
    with pytest.raises(ValueError, match=r"a\.png: the image is \(96, 70\)"):
        read_pixels(item, place((64, 64), resolution_px=64, step_px=64))


def test_tensors_become_pixels():
    rgb = torch.rand(H, W, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels_of(rgb), rgb)
    assert torch.equal(pixels_of(rgb[..., :1]), rgb[..., :1].repeat(1, 1, 3))
    assert torch.equal(pixels_of(rgb * 3 - 1), (rgb * 3 - 1).clamp(0, 1))
    assert torch.equal(pixels_of(rgb.half()), rgb.half().float())
    alpha = torch.full((H, W, 1), 0.25)
    clear = pixels_of(torch.cat([rgb, alpha], dim=2))
    torch.testing.assert_close(clear, rgb * 0.25 + 0.75)
    assert hash_pixels(rgb) == hash_pixels(rgb.clone())
    assert hash_pixels(rgb) != hash_pixels(rgb.reshape(W, H, 3))


@pytest.mark.parametrize(
    ("shape", "fill", "message"),
    [
        ((H, W), 0.0, "shape 70x96: an image must be height x width"),
        ((H, W, 2), 0.0, "shape 70x96x2"),
        ((0, W, 3), 0.0, "shape 0x96x3"),
        ((H, W, 3), float("nan"), "not finite"),
        ((H, W, 3), float("inf"), "not finite"),
    ],
)
def test_tensors_that_are_no_image(shape, fill, message):
    with pytest.raises(images.ImageError, match=message):
        pixels_of(torch.full(shape, fill))


def test_pixels_in_memory_are_scaled_as_files_are(tmp_path):
    rgb = picture(width=300, height=200)[50:, :, :2]  # no edges: they ring beyond 8 bits
    rgb = np.dstack([rgb, rgb[..., :1]])
    Image.fromarray(rgb).save(tmp_path / "a.png")
    from_file = item_of(tmp_path / "a.png")
    pixels = torch.from_numpy(rgb / np.float32(255))
    in_memory = Item(
        name="image 1",
        caption="",
        repeats=1,
        size_px=(300, 150),
        sha256=hash_pixels(pixels),
        group="g",
        pixels=pixels,
    )
    for resolution in (128, 400):  # scaled; only cropped
        placed = place((300, 150), resolution_px=resolution, step_px=64)
        torch.testing.assert_close(
            read_pixels(in_memory, placed),
            read_pixels(from_file, placed),
            atol=1.01 / 255,  # the file's way rounds to 8 bits after each of the two passes
            rtol=0,
        )
