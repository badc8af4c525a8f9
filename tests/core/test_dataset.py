"""Datasets: real folders of files, what becomes of them, and every message."""

import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_weave.lora_core import images
from lora_weave.lora_core.buckets import plan
from lora_weave.lora_core.dataset import DatasetError, from_tensors
from lora_weave.lora_core.image_folder import fingerprint, scan
from lora_weave.lora_core.pixels import read_pixels


def photo(path, seed=0, size=(100, 80)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
    Image.fromarray(pixels).save(path, kind)
    return path


def captions_of(dataset):
    return {item.name: item.caption for item in dataset.items}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "猫 cats"


def test_images_of_every_ending_in_natural_order(folder):
    names = ["img10.png", "img2.JPG", "Img1.jpeg", "a.WebP", "猫🐈.bmp", "é.PNG"]
    for number, name in enumerate(names):
        photo(folder / name, number)
    (folder / ".hidden.png").write_bytes(b"AppleDouble")
    (folder / "notes.md").write_text("no image")
    dataset = scan(folder)
    assert [i.name for i in dataset.items] == [
        "a.WebP",
        "Img1.jpeg",
        "img2.JPG",
        "img10.png",
        "é.PNG",
        "猫🐈.bmp",
    ]
    assert dataset.name == "猫 cats"
    assert all(item.size_px == (100, 80) and item.repeats == 1 for item in dataset.items)
    assert dataset.items[0].path == folder / "a.WebP"


def test_captions_in_every_encoding(folder):
    texts = {
        "utf8": "少女, smile".encode(),
        "bom": "\ufeff少女, smile".encode(),
        "utf16": "少女, smile".encode("utf-16"),
        "sjis": "少女, smile".encode("cp932"),
        "lines": "少女,\r\n smile\n\n".encode(),
    }
    for number, (name, data) in enumerate(texts.items()):
        photo(folder / f"{name}.png", number)
        (folder / f"{name}.txt").write_bytes(data)
    dataset = scan(folder)
    assert set(captions_of(dataset).values()) == {"少女, smile"}
    assert dataset.problems == (
        "captions read as Shift-JIS, not UTF-8: sjis.txt",
        "captions read as UTF-16, not UTF-8: utf16.txt",
    )


def test_which_caption_file_counts(folder):
    for number, name in enumerate(["both.png", "one.png", "upper.png", "two.dots.png", "none.png"]):
        photo(folder / name, number)
    (folder / "both.txt").write_text("text")
    (folder / "both.caption").write_text("caption")
    (folder / "one.caption").write_text("caption")
    (folder / "upper.TXT").write_text("upper")
    (folder / "two.dots.txt").write_text("")
    (folder / "lost.txt").write_text("lost")
    dataset = scan(folder, missing_caption="file name")
    assert captions_of(dataset) == {
        "both.png": "text",
        "none.png": "none",
        "one.png": "caption",
        "two.dots.png": "",
        "upper.png": "upper",
    }
    assert dataset.problems == (
        "text files without an image of that name: lost.txt",
        "no caption, the file name stands in: none.png",
        "both .txt and .caption, .txt is used: both.png",
        "empty caption files: two.dots.txt",
    )


def test_a_decomposed_caption_name_belongs_to_its_composed_image(folder):
    photo(folder / unicodedata.normalize("NFC", "é.png"))
    (folder / unicodedata.normalize("NFD", "é.txt")).write_text("found")
    assert [item.caption for item in scan(folder).items] == ["found"]


@pytest.mark.parametrize(
    ("rule", "trigger", "wanted"),
    [
        ("trigger word or folder name", "", {"a.png": "set", "4_a dog/b.png": "a dog"}),
        ("trigger word or folder name", "sks", {"a.png": "sks", "4_a dog/b.png": "sks, a dog"}),
        ("file name", "", {"a.png": "a", "4_a dog/b.png": "b"}),
        ("file name", "sks", {"a.png": "sks, a", "4_a dog/b.png": "sks, b"}),
        ("empty", "sks", {"a.png": "", "4_a dog/b.png": ""}),
    ],
)
def test_stand_ins_for_a_missing_caption(tmp_path, rule, trigger, wanted):
    folder = tmp_path / "10_set"
    photo(folder / "a.png", 1)
    photo(folder / "4_a dog" / "b.png", 2)
    photo(folder / "c.png", 3)
    (folder / "c.txt").write_text("a cat")
    dataset = scan(folder, missing_caption=rule, trigger_word=trigger)
    found = captions_of(dataset)
    assert found.pop("c.png") == ("sks, a cat" if trigger else "a cat")
    assert found == wanted
    (said,) = dataset.problems
    assert said.startswith("no caption, ") and said.endswith(": a.png, 4_a dog/b.png")


def test_a_missing_caption_can_be_an_error(folder):
    photo(folder / "a.png", 1)
    photo(folder / "2_x" / "b.png", 2)
    with pytest.raises(DatasetError) as error:
        scan(folder, missing_caption="error")
    assert error.value.problems == (
        "a.png: no caption (.txt or .caption)",
        "2_x/b.png: no caption (.txt or .caption)",
    )


def test_sub_folders_with_repeats(folder):
    photo(folder / "a.png", 1)
    photo(folder / "10_sks dog" / "b.png", 2)
    (folder / "10_sks dog" / "b.txt").write_text("running")
    photo(folder / "2_cat" / "c.png", 3)
    photo(folder / "2_cat" / "deep" / "d.png", 4)
    photo(folder / "0_off" / "e.png", 5)
    photo(folder / "old" / "f.png", 6)
    photo(folder / ".cache" / "g.png", 7)
    dataset = scan(folder, repeats=3)
    assert [(i.name, i.repeats, i.caption) for i in dataset.items] == [
        ("a.png", 3, "猫 cats"),
        ("2_cat/c.png", 2, "cat"),
        ("10_sks dog/b.png", 10, "running"),
    ]
    assert dataset.num_samples == 15
    assert dataset.problems[:3] == (
        "0_off/: left out, its repeats are 0",
        "2_cat/deep/: left out, folders are read one level deep",
        "old/: this sub folder is left out; only those named <repeats>_<name>, "
        'such as "10_sks dog", are read',
    )
    assert dataset.folders() == {
        "猫 cats": {"n_repeats": 3, "img_count": 1},
        "2_cat": {"n_repeats": 2, "img_count": 1},
        "10_sks dog": {"n_repeats": 10, "img_count": 1},
    }
    assert dataset.tag_frequency() == {
        "猫 cats": {"猫 cats": 1},
        "2_cat": {"cat": 1},
        "10_sks dog": {"running": 1},
    }


def test_what_is_odd_but_usable_is_said(folder):
    photo(folder / "a.png", 1)
    shutil.copy(folder / "a.png", folder / "b.png")
    photo(folder / "a.jpg", 2)
    photo(folder / "small.png", 3, size=(90, 70))
    for stem in ("a", "b", "small"):
        (folder / f"{stem}.txt").write_text(stem)
    Image.new("RGB", (100, 80)).save(folder / "c.png", icc_profile=b"no profile")
    (folder / "c.txt").write_text("c")
    dataset = scan(folder, resolution_px=512)
    shared, profile, same, *sizes = dataset.problems
    assert shared == "images that share a name and so a caption: a"
    assert profile.startswith("c.png: its colour profile is ignored")
    assert same == "the same picture again: b.png (as a.png)"
    assert "small.png: 90x70 px is small for a resolution of 512 px: trained at 64x64 px" in sizes
    assert plan(dataset).problems == ()  # said already


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "the folder does not exist"),
        (lambda f: f.write_text(""), "this is a file; a folder of images is expected"),
        (lambda f: f.mkdir(), r"the folder is empty; images \(.jpg .jpeg .png .webp .bmp\)"),
    ],
)
def test_a_folder_that_is_none(folder, make, message):
    make(folder)
    with pytest.raises(DatasetError, match=f"Training images in .*猫 cats: {message}"):
        scan(folder)


def test_a_folder_without_images_says_what_was_found(folder):
    folder.mkdir()
    for name in ("a.heic", "b.HEIC", "c.mp4", "README"):
        (folder / name).write_bytes(b"x")
    photo(folder / "photos" / "a.png")
    with pytest.raises(DatasetError) as error:
        scan(folder)
    (problem,) = error.value.problems
    assert problem.startswith(
        "no images (.jpg .jpeg .png .webp .bmp) in it, found .heic (2), .mp4 (1), no ending (1); "
        "photos/: this sub folder is left out"
    )


def test_all_problems_come_at_once(folder):
    photo(folder / "good.png")
    whole = photo(folder / "cut.jpg", 2).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    photo(folder / "small.png", 3, size=(300, 40))
    photo(folder / "5_x" / "bad caption.png", 4)
    (folder / "5_x" / "bad caption.txt").write_bytes(b"\x81\x20\xff")
    (folder / "page.jpg").write_text("<html>")
    if hasattr(os, "symlink") and sys.platform != "win32":
        (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(DatasetError) as error:
        scan(folder)
    text = str(error.value)
    assert text.startswith(f"Training images in {folder}: {len(error.value.problems)} problems")
    for problem in (
        "\n- cut.jpg: the image is truncated: it ends after",
        "\n- small.png: 300x40 px is too small to train on: each side must be at least 64 px "
        "(bucket step 64 px; images are never enlarged)",
        "\n- 5_x/bad caption.txt: not text in any known encoding (tried UTF-8",
        "\n- page.jpg: not an image that can be read: this is a web page",
    ):
        assert problem in text
    assert sys.platform == "win32" or "\n- gone.png: can't be read: No such file" in text
    assert "good.png" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_out_of_the_allowed_folders_are_not_read(folder, tmp_path):
    secret = tmp_path / "secret"
    photo(secret / "photo.png", 1)
    (secret / "words.txt").write_text("words of somebody else")
    photo(folder / "good.png", 2)
    photo(folder / "2_cat" / "cat.png", 3)
    (folder / "3_out").symlink_to(secret, target_is_directory=True)
    (folder / "photo.png").symlink_to(secret / "photo.png")
    (folder / "good.txt").symlink_to(secret / "words.txt")
    (folder / "2_cat" / "cat.txt").symlink_to(secret / "words.txt")
    (folder / "in.png").symlink_to(folder / "good.png")
    with pytest.raises(DatasetError) as error:
        scan(folder, roots=[tmp_path / "empty", folder])
    assert error.value.problems == tuple(
        f"{name}: a link out of the allowed folders, which is not read"
        for name in ("3_out", "good.txt", "photo.png", "2_cat/cat.txt")
    )
    assert "somebody else" not in str(error.value)
    for allowed in ([], [folder, secret], [tmp_path]):
        assert len(scan(folder, roots=allowed).items) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_allowed_folders_may_be_links_and_links_may_go_in_circles(folder, tmp_path):
    photo(folder / "good.png")
    (tmp_path / "way").symlink_to(folder, target_is_directory=True)
    assert len(scan(folder, roots=[tmp_path / "way"]).items) == 1
    assert len(scan(tmp_path / "way", roots=[folder]).items) == 1
    with pytest.raises(DatasetError, match="the folder is outside of the allowed folders"):
        scan(tmp_path / "way", roots=[tmp_path / "other"])
    (folder / "circle.png").symlink_to(folder / "circle.png")
    with pytest.raises(DatasetError, match=r"circle.png: can't be read"):
        scan(folder, roots=[folder])


def test_very_many_problems_are_cut_short_in_the_message_only(folder):
    folder.mkdir()
    for number in range(130):
        (folder / f"{number}.png").write_bytes(b"")
    with pytest.raises(DatasetError) as error:
        scan(folder)
    assert len(error.value.problems) == 130
    assert str(error.value).count("\n- ") == 101
    assert str(error.value).endswith("and 30 more problems")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, "repeats is 0; it must be at least 1"),
        ({"bucket_step_px": 0}, "bucket step is 0 px"),
        ({"resolution_px": 63}, "resolution is 63 px"),
    ],
)
def test_settings_that_cannot_be(folder, settings, message):
    photo(folder / "a.png")
    with pytest.raises(DatasetError, match=message):
        scan(folder, **settings)
    with pytest.raises(DatasetError, match=message):
        from_tensors([torch.zeros(64, 64, 3)], **settings)


def test_a_large_bucket_step_needs_large_images(folder):
    photo(folder / "a.png", size=(100, 300))
    with pytest.raises(DatasetError, match=r"a\.png: 100x300 px is too small .* at least 128 px"):
        scan(folder, bucket_step_px=128)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such name")
def test_a_name_that_is_no_text(folder):
    photo(folder / "a.png")
    shutil.move(folder / "a.png", os.fsencode(folder) + b"/\xff\xfe.png")
    (item,) = scan(folder, missing_caption="file name").items
    assert (item.name, item.caption) == ("??.png", "??")
    assert images.inspect(item.path).size_px == (100, 80)


def test_the_content_hash_is_of_the_content(folder, tmp_path):
    photo(folder / "a.png", 1)
    (folder / "a.txt").write_text("one")
    photo(folder / "2_x" / "b.png", 2)
    first = scan(folder, trigger_word="sks").content_hash()
    assert len(first) == 64

    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    os.utime(moved / "a.png", ns=(1, 1))
    assert scan(moved, trigger_word="sks", name="other").content_hash() == first

    others = [
        scan(folder).content_hash(),
        scan(folder, trigger_word="sks", repeats=2).content_hash(),
        scan(folder, trigger_word="sks", resolution_px=512).content_hash(),
        scan(folder, trigger_word="sks", buckets=False).content_hash(),
        scan(folder, trigger_word="sks", bucket_step_px=32).content_hash(),
    ]
    (folder / "a.txt").write_text("two")
    others.append(scan(folder, trigger_word="sks").content_hash())
    (folder / "a.txt").write_text("one")
    photo(folder / "a.png", 3)
    others.append(scan(folder, trigger_word="sks").content_hash())
    assert len({first, *others}) == 8


def test_progress_is_told_and_can_interrupt(folder):
    for number in range(5):
        photo(folder / f"{number}.png", number)
    told = []
    scan(folder, progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 5) for n in range(1, 6)]

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(folder, progress=interrupt)


def test_the_fingerprint_follows_what_scan_would_see(folder):
    assert fingerprint(folder) == fingerprint(folder)
    seen = [fingerprint(folder)]
    photo(folder / "a.png")
    seen.append(fingerprint(folder))
    (folder / "a.txt").write_text("x")
    seen.append(fingerprint(folder))
    photo(folder / "2_x" / "b.png")
    seen.append(fingerprint(folder))
    os.utime(folder / "2_x" / "b.png", ns=(1, 1))
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 5
    assert fingerprint(folder) == seen[-1]
    photo(folder / "old" / "c.png")
    before = fingerprint(folder)
    photo(folder / "old" / "deep" / "d.png")
    os.utime(folder / "old", ns=(1, 1))
    photo(folder / "2_x" / "deep" / "d.png")
    assert fingerprint(folder) != before


def test_a_dataset_of_tensors():
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(2, 70, 90, 3, generator=generator)
    single = torch.rand(80, 100, 4, generator=generator)
    dataset = from_tensors(
        [batch, single], ["a\ncat", "sks dog", ""], trigger_word="sks", repeats=2, name="graph"
    )
    assert [(i.name, i.caption, i.size_px) for i in dataset.items] == [
        ("image 1", "sks, a cat", (90, 70)),
        ("image 2", "sks dog", (90, 70)),
        ("image 3", "sks", (100, 80)),
    ]
    assert dataset.num_samples == 6 and dataset.problems == ()
    assert dataset.folders() == {"graph": {"n_repeats": 2, "img_count": 3}}
    placements = plan(dataset, resolutions_px=[64]).placements
    for item, placement in zip(dataset.items, placements, strict=True):
        assert read_pixels(item, placement).shape == (64, 64, 3)
    again = from_tensors([*batch, single], ["sks, a cat", "sks dog", "sks"], repeats=2)
    assert again.content_hash() == dataset.content_hash()
    assert again.items[0] != dataset.items[0]  # another group; comparing tensors does not fail
    other = from_tensors([1 - batch, single], ["sks, a cat", "sks dog", "sks"], repeats=2)
    assert other.content_hash() != dataset.content_hash()


def test_one_caption_for_all_tensors_or_none():
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    assert {i.caption for i in from_tensors([pictures], ["x"]).items} == {"x"}
    silent = from_tensors([pictures])
    assert {i.caption for i in silent.items} == {""}
    assert silent.problems == ("3 of 3 images have no caption",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "there are no images"),
        (([torch.zeros(3, 64, 64, 3)], ["a", "b"]), "2 captions for 3 images"),
        (
            ([torch.zeros(64, 64), torch.full((64, 64, 3), float("nan")), torch.zeros(40, 64, 3)],),
            r"3 problems.*\n- image 1: shape 64x64: .*\n- image 2: holds values that are not finite"
            r".*\n- image 3: 64x40 px is too small",
        ),
    ],
)
def test_tensors_that_cannot_be_trained_on(arguments, message):
    with pytest.raises(DatasetError, match=message):
        from_tensors(*arguments)
