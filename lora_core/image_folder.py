"""A folder of images and captions -> a dataset."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import captions as _captions
from . import images as _images
from .captions import CAPTION_ENDINGS, CaptionRule, MissingCaption, listed, printable
from .dataset import Dataset, DatasetError, Item, finished, wrong_settings

NUM_READERS = 4  # images decoded at the same time while a folder is read


def scan(
    folder: Path,
    *,
    trigger_word: str = "",
    repeats: int = 1,
    missing_caption: MissingCaption = "trigger word or folder name",
    resolution_px: int = 0,
    buckets: bool = True,
    bucket_step_px: int = 64,
    name: str = "",
    roots: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a folder of images and captions.

    Images directly in the folder are repeated `repeats` times an epoch; those in a sub folder
    `N_name` N times, with `name` as the caption of an image that has none. Other sub folders are
    left out, and said. The order is the natural one of the names (img2 before img10). Every image
    is decoded once (again only if it changes); `progress(done, total)` is called after each. With
    `roots`, nothing that a link puts outside of all of them is read. Raises DatasetError with all
    problems at once.
    """
    folder = Path(folder)
    where = f"Training images in {printable(str(folder))}"
    if wrong := wrong_settings(repeats, resolution_px, bucket_step_px):
        raise DatasetError(where, wrong)
    rule = CaptionRule(trigger_word, missing_caption)
    tree = _Tree(folder, where, repeats, roots)
    items, wrong, remarks = _read_items(folder, tree, rule, progress)
    dataset = Dataset(
        name=name or printable(folder.name),
        items=items,
        resolution_px=resolution_px,
        buckets=buckets,
        bucket_step_px=bucket_step_px,
        trigger_word=rule.trigger_word,
    )
    return finished(dataset, where=where, wrong=wrong, remarks=remarks)


def _read_items(
    folder: Path,
    tree: "_Tree",
    rule: CaptionRule,
    progress: Callable[[int, int], None] | None,
) -> tuple[tuple[Item, ...], list[str], list[str]]:
    """The items of all images that can be used; what is wrong with all else, and remarks."""
    items: list[Item] = []
    wrong: list[str] = []
    remarks: list[str] = []
    found = [(part, path) for part in tree.parts for path in part.images]
    looks = _inspect_all([path for _, path in found], progress)
    for (part, path), facts in zip(found, looks, strict=True):
        shown = printable(path.relative_to(folder).as_posix())
        caption = rule.caption(
            shown,
            part.captions_of(path),
            class_caption=part.class_caption,
            folder=_REPEATS.sub(r"\2", printable(folder.name)),
        )
        if isinstance(facts, _images.ImageError):
            wrong.append(f"{shown}: {facts}")
            continue
        remarks += [f"{shown}: {note}" for note in facts.notes]
        items.append(
            Item(
                name=shown,
                caption=caption,
                repeats=part.repeats,
                size_px=facts.size_px,
                sha256=facts.sha256,
                group=printable(part.folder.name),
                path=path,
            )
        )
    return (
        tuple(items),
        [*tree.wrong, *wrong, *rule.wrong()],
        [*tree.remarks, *remarks, *rule.remarks()],
    )


def fingerprint(folder: Path) -> str:
    """sha256 of names, sizes and times of all that `scan` would look at, without opening a file.

    For asking whether a folder has changed. A folder that can't be listed has a fingerprint too.
    """
    seen: list[tuple[str, int, int]] = []

    def look(path: Path, depth: int) -> None:
        try:
            stat = path.stat()
            inside = _entries(path) if depth < 2 and path.is_dir() else []
        except OSError:
            seen.append((str(path), -1, -1))
            return
        seen.append((str(path), stat.st_size, stat.st_mtime_ns))
        for entry in inside:
            if not depth or _REPEATS.match(path.name):
                look(entry, depth + 1)

    look(Path(folder), 0)
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


_REPEATS = re.compile(r"(?s)^([0-9]{1,9})_(.+)$")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One folder: its images, and its caption files by (stem, ending)."""

    folder: Path
    images: list[Path]
    captions: dict[tuple[str, str], Path]
    repeats: int
    class_caption: str  # stands in for a missing caption; "" in the dataset's own folder

    def captions_of(self, image: Path) -> list[Path]:
        stem = _stem(image)
        return [self.captions[stem, e] for e in CAPTION_ENDINGS if (stem, e) in self.captions]


class _Tree:
    """What lies in the folder, not opened yet. Raises DatasetError where there are no images."""

    def __init__(self, folder: Path, where: str, repeats: int, roots: Sequence[Path]) -> None:
        self._folder = folder
        self._roots = [_resolved(root) for root in roots]
        self.wrong: list[str] = []
        self.remarks: list[str] = []
        self.parts: list[_Part] = []
        try:
            if not folder.exists():
                raise DatasetError(where, ["the folder does not exist"])
            if not folder.is_dir():
                raise DatasetError(where, ["this is a file; a folder of images is expected"])
            self._endings: Counter[str] = Counter()
            if not self._allowed(folder):
                raise DatasetError(where, ["the folder is outside of the allowed folders"])
            self._add(folder, repeats, "")
            for path in _entries(folder):
                if self._allowed(path) and path.is_dir():
                    self._enter(path)
        except OSError as error:
            name = printable(str(error.filename or folder))
            raise DatasetError(where, [f"{name} can't be read: {error.strerror}"]) from error
        if not any(part.images for part in self.parts):
            raise DatasetError(where, self.wrong or [self._without_images()])

    def _allowed(self, path: Path) -> bool:
        if not self._roots:
            return True
        target = _resolved(path)
        return any(target.is_relative_to(root) for root in self._roots)

    def _enter(self, path: Path) -> None:
        match = _REPEATS.match(path.name)
        if match is None:
            self.remarks.append(
                f"{printable(path.name)}/: this sub folder is left out; "
                'only those named <repeats>_<name>, such as "10_sks dog", are read'
            )
        elif not int(match[1]):
            self.remarks.append(f"{printable(path.name)}/: left out, its repeats are 0")
        else:
            self._add(path, int(match[1]), _captions.one_line(printable(match[2])))

    def _add(self, folder: Path, repeats: int, class_caption: str) -> None:
        images: list[Path] = []
        texts: dict[tuple[str, str], Path] = {}
        for path in _entries(folder):
            ending = path.suffix.lower()
            if not self._allowed(path):
                shown = printable(path.relative_to(self._folder).as_posix())
                self.wrong.append(f"{shown}: a link out of the allowed folders, which is not read")
                continue
            if path.is_dir():
                if self.parts:  # this is a sub folder itself
                    shown = printable(f"{folder.name}/{path.name}")
                    self.remarks.append(f"{shown}/: left out, folders are read one level deep")
            elif ending in _images.ENDINGS:
                images.append(path)
            elif ending in CAPTION_ENDINGS:
                texts[_stem(path), ending] = path
            if not path.is_dir():
                self._endings[ending or "no ending"] += 1
        stems = Counter(map(_stem, images))
        shared = [printable(stem) for stem, count in stems.items() if count > 1]
        if shared:
            self.remarks.append(f"images that share a name and so a caption: {listed(shared)}")
        orphans = [printable(path.name) for (stem, _), path in texts.items() if stem not in stems]
        if orphans:
            self.remarks.append(f"text files without an image of that name: {listed(orphans)}")
        self.parts.append(
            _Part(
                folder=folder,
                images=images,
                captions=texts,
                repeats=repeats,
                class_caption=class_caption,
            )
        )

    def _without_images(self) -> str:
        wanted = " ".join(_images.ENDINGS)
        if not self._endings and not self.remarks:
            return f"the folder is empty; images ({wanted}) are expected"
        found = ", ".join(f"{ending} ({num})" for ending, num in self._endings.most_common(10))
        return "; ".join(
            [f"no images ({wanted}) in it, found {found or 'no files'}", *self.remarks]
        )


def _inspect_all(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None
) -> Iterator[_images.ImageFacts | _images.ImageError]:
    """What each image is, or what is wrong with it, in order."""

    def look(path: Path) -> _images.ImageFacts | _images.ImageError:
        try:
            return _images.inspect(path)
        except _images.ImageError as error:
            return error

    pool = ThreadPoolExecutor(min(NUM_READERS, os.cpu_count() or 1))
    try:
        for done, facts in enumerate(pool.map(look, paths), start=1):
            if progress is not None:
                progress(done, len(paths))
            yield facts
    finally:  # an interruption inside progress() leaves nothing running
        pool.shutdown(cancel_futures=True)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, in natural order, hidden files left out."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorting key: numbers by value, letters without case, the same on every system."""
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", name))
    key = [
        (0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part.casefold())
        for part in parts
        if part
    ]
    return key, name


def _resolved(path: Path) -> Path:
    """Where a path leads; unlike Path.resolve before Python 3.13 also for links in a circle."""
    return Path(os.path.realpath(path))


def _stem(path: Path) -> str:
    """Name without ending, composed: macOS decomposes names, so image and caption may differ."""
    return unicodedata.normalize("NFC", path.stem)
