"""Captions: encodings, lines, trigger words, tags."""

import codecs
import random

import pytest

from lora_weave.lora_core import captions

TEXTS = ["1girl, red hair", "赤い髪の少女、笑顔", "ｶﾀｶﾅ, 猫", "a\nb"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8", "UTF-8"), ("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("cp932", "Shift-JIS")],
)
def test_decodes(text, encoding, said):
    decoded, found = captions.decode(text.encode(encoding))
    assert decoded == text
    assert found == said or text.isascii()


def test_utf_16_of_either_byte_order_and_emoji():
    text = "猫 🐈, ok"
    for mark, encoding in ((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF16_LE, "utf-16-le")):
        assert captions.decode(mark + text.encode(encoding)) == (text, "UTF-16")
    assert captions.decode(text.encode()) == (text, "UTF-8")


@pytest.mark.parametrize(
    "data",
    [
        bytes([0x81, 0x20, 0xFF]),
        "no mark".encode("utf-16-le"),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        codecs.BOM_UTF32_LE + "x".encode("utf-32-le"),
    ],
)
def test_what_is_no_text_names_the_encodings_tried(data):
    with pytest.raises(ValueError, match=r"tried UTF-8, UTF-16 .*, Shift-JIS \(cp932\)"):
        captions.decode(data)


def test_decoding_never_fails_otherwise():
    rng = random.Random(0)
    for _ in range(3000):
        try:
            text, _ = captions.decode(rng.randbytes(rng.randint(0, 20)))
        except ValueError as error:
            assert "not text in any known encoding" in str(error)
        else:
            assert isinstance(text, str)


def test_reads_one_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  a photo,\r\n\r\n  of a  dog \n".encode())
    assert captions.read(path) == ("a photo, of a  dog", "UTF-8")
    path.write_bytes(b"")
    assert captions.read(path) == ("", "UTF-8")


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="can't be read"):
        captions.read(tmp_path / "absent.txt")
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * (captions.MAX_CAPTION_BYTES + 1))
    with pytest.raises(ValueError, match="larger than 1024 KiB"):
        captions.read(path)


@pytest.mark.parametrize(
    ("caption", "trigger", "wanted"),
    [
        ("a dog", "sks", "sks, a dog"),
        ("photo of sks dog", "sks", "photo of sks dog"),
        ("SKS, dog", "sks", "SKS, dog"),
        ("sksdog", "sks", "sks, sksdog"),
        ("sks_dog", "sks", "sks, sks_dog"),
        ("a sks dog", "sks dog", "a sks dog"),
        ("", "sks", "sks"),
        ("a dog", "", "a dog"),
        ("a dog", " sks,\n", "sks, a dog"),
        ("x <lora>, y", "<lora>", "x <lora>, y"),
        ("a+b (c)", "b (c)", "a+b (c)"),
        ("白い猫が座る", "猫", "猫, 白い猫が座る"),
        ("猫, 座る", "猫", "猫, 座る"),
    ],
)
def test_trigger_word_comes_first_unless_it_is_there(caption, trigger, wanted):
    assert captions.with_trigger(caption, trigger) == wanted
    assert captions.with_trigger(wanted, trigger) == wanted


def test_tag_frequency_counts_images_by_folder_in_lower_case():
    counted = captions.tag_frequency(
        [("10_a", "Red hair, smile"), ("10_a", "smile,, red hair , "), ("b", "smile"), ("c", "")]
    )
    assert counted == {"10_a": {"red hair": 2, "smile": 2}, "b": {"smile": 1}, "c": {}}


def test_names_are_printable_and_lists_short():
    assert captions.printable("猫\udcff.png") == "猫?.png"
    assert captions.listed(list("abcde")) == "a, b, c, d, e"
    assert captions.listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'guess'; it must be one of trigger word or folder name"):
        captions.CaptionRule("", "guess")
