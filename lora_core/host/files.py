"""Where files are: LoRAs, dataset folders and our own data, each contained in its root."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import folder_paths

from ..images import ENDINGS

DATASET_ROOTS = "lora_weave_datasets"  # the key in extra_model_paths.yaml
MAX_FOLDER_DEPTH = 3
MAX_PART_BYTES = 200  # file systems take 255; the rest is for our endings

_RESERVED = re.compile(r"(?i)con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]")
_NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line separators


def weave_folder() -> Path:
    """Our own folder, in the user directory and outside of what the host's file routes serve."""
    return Path(folder_paths.get_system_user_directory("lora_weave"))


def lora_names() -> list[str]:
    """Every LoRA file that the host lists."""
    return list(folder_paths.get_filename_list("loras"))


def find_lora(name: str) -> Path:
    """The path of a listed LoRA. Raises ValueError offering the nearest name."""
    path = folder_paths.get_full_path("loras", name) if name else None
    if path is None:
        near = nearest_lora(name)
        hint = f' Did you mean "{near}"?' if near else ""
        raise ValueError(f'the LoRA file "{name}" is not in any loras folder.{hint}')
    return Path(path)


def nearest_lora(name: str) -> str | None:
    """The listed LoRA whose name is most like `name`, the folder counting less."""
    listed = {other: PurePosixPath(other.replace("\\", "/")).stem.lower() for other in lora_names()}
    stem = PurePosixPath(name.replace("\\", "/")).stem.lower()
    near = difflib.get_close_matches(stem, listed.values(), n=1, cutoff=0.4)
    return next((other for other, known in listed.items() if near and known == near[0]), None)


def lora_name(text: str) -> str:
    """The listed name that a text means: with other separators, without the ending, as the name
    alone where only one folder has it, or as a whole path in a loras folder.

    The text itself where it means none.
    """
    listed = lora_names()
    spelled = {name.replace("\\", "/"): name for name in listed}
    wanted = text.replace("\\", "/")
    for name in (wanted, f"{wanted}.safetensors"):
        if name in spelled:
            return spelled[name]
    for folder in folder_paths.get_folder_paths("loras"):
        if os.path.isabs(text) and Path(text).is_relative_to(folder):
            return str(Path(text).relative_to(folder))
    if "/" not in wanted:
        alike = [
            name
            for path, name in spelled.items()
            if wanted in (PurePosixPath(path).name, PurePosixPath(path).stem)
        ]
        if len(alike) == 1:
            return alike[0]
    return text


def output_path(name: str) -> Path:
    """`output/loras/<name>.safetensors`; `name` may have sub-folders, split by / or \\.

    Raises ValueError for a name that Windows, macOS or Linux can't store or that leaves the folder.
    """
    root = Path(folder_paths.get_output_directory()) / "loras"
    parts = re.split(r"[/\\]", name.strip(" ").removesuffix(".safetensors"))
    problems = [problem for part in parts for problem in _part_problems(part)]
    if problems:
        raise ValueError(
            f"output_name is {name!r} with {', '.join(dict.fromkeys(problems))}; expected a file "
            f'name, with sub-folders at most (like "people/anna"); it is saved under {root}'
        )
    path = root.joinpath(*parts[:-1], f"{parts[-1]}.safetensors")
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"output_name is {name!r}, which leads out of {root}")
    return path


def _part_problems(part: str) -> Iterator[str]:
    """Why a file or folder of this name can't be on every system."""
    if not part:
        yield "an empty part"
    elif part[-1] in ". ":
        yield f"a part {part!r} that ends with a dot or a space"
    elif _RESERVED.fullmatch(part.split(".")[0].rstrip()):
        yield f"a part where {part!r} is reserved by Windows"
    for character in part:
        if character in '<>:"|?*' or unicodedata.category(character) in _NOT_IN_NAMES:
            yield f"the character {character!r}"
    num_bytes = len(part.encode(errors="replace"))
    if num_bytes > MAX_PART_BYTES:
        yield f"a part of {num_bytes} bytes ({MAX_PART_BYTES} are the most)"


def dataset_roots() -> list[Path]:
    """The input directory, and what the server's owner lists as `lora_weave_datasets`."""
    extra = folder_paths.folder_names_and_paths.get(DATASET_ROOTS, ([], set()))[0]
    return [Path(folder_paths.get_input_directory()), *map(Path, extra)]


def dataset_folders() -> list[str]:
    """Names of folders with images: relative ones under input, whole paths under other roots."""
    input_root, *others = dataset_roots()
    names = [folder.relative_to(input_root).as_posix() for folder in _image_folders(input_root)]
    names += [str(folder) for root in others for folder in _image_folders(root)]
    return [name for name in names if name != "."]


def find_dataset_folder(name: str) -> Path:
    """The folder that a dataset node names, if it lies in an allowed root.

    Raises ValueError: for a folder outside the roots with the yaml line that would allow it.
    """
    roots = dataset_roots()
    if not name.strip() or "\0" in name:
        raise ValueError(f"no dataset folder is chosen; put one with images under {roots[0]}")
    # by its letters first: on Windows looking up \\server\share logs the user in there
    folder = Path(os.path.normpath(roots[0].absolute() / name))
    resolved_roots = [root.resolve() for root in roots]
    if any(folder.is_relative_to(root) for root in [*map(Path.absolute, roots), *resolved_roots]):
        folder = folder.resolve()
        if any(folder.is_relative_to(root) for root in resolved_roots):
            return folder
    raise ValueError(
        f'the dataset folder "{name}" is outside of the folders that this server may read '
        f"({', '.join(map(str, roots))}). Put it under the input folder, or let the server's "
        f"owner add these lines to extra_model_paths.yaml:\n"
        f"lora_weave:\n    {DATASET_ROOTS}: {folder}"
    )


def previews(paths: Iterable[Path]) -> list[dict[str, str]]:
    """How the browser finds images: those under the input directory, as the host's own nodes do."""
    root = Path(folder_paths.get_input_directory()).resolve()
    inside = [path for path in paths if path.resolve().is_relative_to(root)]
    return [
        {
            "filename": path.name,
            "subfolder": path.resolve().parent.relative_to(root).as_posix().removeprefix("."),
            "type": "input",
        }
        for path in inside
    ]


def _image_folders(root: Path, depth: int = 0) -> Iterator[Path]:
    """Folders that hold images themselves or in a kohya sub-folder, without following links."""
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return
    below = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if any(entry.suffix.lower() in ENDINGS for entry in entries):
        yield root
    elif any(entry.name.split("_")[0].isdigit() for entry in below):
        yield root
    if depth < MAX_FOLDER_DEPTH:
        for entry in below:
            if not entry.is_symlink():
                yield from _image_folders(entry, depth + 1)
