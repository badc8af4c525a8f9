"""Captions: text files in any common encoding, the trigger word, stand-ins, tag counts."""

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

MissingCaption = Literal["trigger word or folder name", "file name", "empty", "error"]
MISSING_CAPTION: tuple[MissingCaption, ...] = get_args(MissingCaption)
CAPTION_ENDINGS = (".txt", ".caption")  # the first one found counts
MAX_CAPTION_BYTES = 1 << 20
ENCODINGS_TRIED = "UTF-8, UTF-16 with byte order mark, Shift-JIS (cp932)"


def decode(data: bytes) -> tuple[str, str]:
    """Text of a caption file and the name of its encoding.

    Tried in this order: UTF-8 with or without byte order mark, UTF-16 with byte order mark,
    Shift-JIS as Windows writes it (cp932). Raises ValueError naming them where none fits. Shift-JIS
    comes last because nearly every other legacy encoding decodes as it too, so callers say when it
    was the one.
    """
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding, name in (
        ("utf-8-sig", "UTF-8"),
        ("utf-16" if marked else "", "UTF-16"),
        ("cp932", "Shift-JIS"),
    ):
        if not encoding:
            continue
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:  # binary data, or UTF-16 without its mark
            return text, name
    raise ValueError(f"not text in any known encoding (tried {ENCODINGS_TRIED})")


def read(path: Path) -> tuple[str, str]:
    """One line of text from a caption file, and its encoding. Raises ValueError where unusable."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or error}") from error
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"larger than {MAX_CAPTION_BYTES >> 10} KiB, too long for a caption")
    text, encoding = decode(data)
    return one_line(text), encoding


def one_line(text: str) -> str:
    """`text` with line breaks (and the blanks around them) turned into single spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def has_trigger(caption: str, trigger_word: str) -> bool:
    """Whether the trigger word stands in the caption as a whole word or tag, in any letter case.

    "sks" is in "photo of sks dog" and "sks, dog", not in "sksdog" or "sks_dog".
    """
    before = r"(?<!\w)" if re.match(r"\w", trigger_word) else ""
    after = r"(?!\w)" if re.search(r"\w$", trigger_word) else ""
    return re.search(before + re.escape(trigger_word) + after, caption, re.IGNORECASE) is not None


def clean_trigger(trigger_word: str) -> str:
    """The trigger word on one line, without blanks and commas at its ends."""
    return one_line(trigger_word).strip(" ,")


def with_trigger(caption: str, trigger_word: str) -> str:
    """`"<trigger>, <caption>"`; the caption as it is where the trigger is empty or in it."""
    trigger_word = clean_trigger(trigger_word)
    if not trigger_word or has_trigger(caption, trigger_word):
        return caption
    return f"{trigger_word}, {caption}" if caption else trigger_word


def tag_frequency(captions: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """{folder: {tag: number of images}} for the metadata field `ss_tag_frequency`.

    `captions` are (folder name, caption) of each image. Tags are separated by commas and counted in
    lower case, as sd-scripts writes them.
    """
    frequency: dict[str, dict[str, int]] = {}
    for folder, caption in captions:
        counts = frequency.setdefault(folder, {})
        for tag in caption.split(","):
            tag = tag.strip().lower()
            if tag:
                counts[tag] = counts.get(tag, 0) + 1
    return frequency


class CaptionRule:
    """Finds each image's caption and collects what there is to say about all of them."""

    def __init__(self, trigger_word: str, missing: MissingCaption) -> None:
        if missing not in MISSING_CAPTION:
            raise ValueError(
                f"missing_caption is {missing!r}; it must be one of {', '.join(MISSING_CAPTION)}"
            )
        self.trigger_word = clean_trigger(trigger_word)
        self._missing = missing
        self._wrong: list[str] = []
        self._both: list[str] = []
        self._without: list[str] = []
        self._empty: list[str] = []
        self._encoded: dict[str, list[str]] = {}

    def caption(self, name: str, files: Sequence[Path], *, class_caption: str, folder: str) -> str:
        """The caption of the image called `name` (its path inside the dataset's folder).

        `files` are its caption files, the one that counts first; `class_caption` is the caption of
        its sub folder ("" for none), `folder` the name of the dataset's folder.
        """
        if not files:
            return self._stand_in(name, class_caption, folder)
        if len(files) > 1:
            self._both.append(name)
        source = PurePosixPath(name).with_name(printable(files[0].name)).as_posix()
        try:
            text, encoding = read(files[0])
        except ValueError as error:
            self._wrong.append(f"{source}: {error}")
            return ""
        if encoding != "UTF-8":
            self._encoded.setdefault(encoding, []).append(source)
        if not text:
            self._empty.append(source)
        return with_trigger(text, self.trigger_word)

    def _stand_in(self, name: str, class_caption: str, folder: str) -> str:
        self._without.append(name)
        if self._missing == "empty":
            return ""
        if self._missing == "file name":
            text = one_line(PurePosixPath(name).stem)
        else:
            text = class_caption or ("" if self.trigger_word else folder)
        return with_trigger(text, self.trigger_word)

    def wrong(self) -> list[str]:
        """Captions that stop the training, one message each."""
        if self._missing != "error":
            return self._wrong
        endings = " or ".join(CAPTION_ENDINGS)
        return self._wrong + [f"{name}: no caption ({endings})" for name in self._without]

    def remarks(self) -> list[str]:
        """What a user should know of the captions, one line a kind."""
        stand_in = {
            "trigger word or folder name": "the trigger word or folder name stands in",
            "file name": "the file name stands in",
            "empty": "trained without one",
            "error": "",
        }[self._missing]
        kinds = [
            (f"no caption, {stand_in}", self._without),
            ("both .txt and .caption, .txt is used", self._both),
            ("empty caption files", self._empty),
            *(
                (f"captions read as {encoding}, not UTF-8", names)
                for encoding, names in self._encoded.items()
            ),
        ]
        return [f"{words}: {listed(names)}" for words, names in kinds if names]


def printable(name: str) -> str:
    """A file name that can be printed and encoded, whatever bytes it is made of."""
    return name.encode("utf-8", "replace").decode("utf-8")


def listed(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
