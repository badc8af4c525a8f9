"""Folders of the project, links between them, and the one kind of error that set-up reports."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
HOST = ROOT / ".host"
PACK_NAME = "lora-weave"


class SetupError(Exception):
    """What went wrong and what to do about it, in one sentence for the person at the terminal."""


def is_link(path: Path) -> bool:
    """Whether `path` is a symbolic link or a Windows junction, also a dangling one."""
    try:
        os.readlink(path)
    except (OSError, ValueError):
        return False
    return True


def link(target: Path, at: Path) -> None:
    """Make `at` lead to the folder `target`. A link to elsewhere is replaced, a folder never."""
    if is_link(at):
        if at.exists() and os.path.samefile(at, target):
            return
        os.unlink(at)
    elif at.exists():
        raise SetupError(f"{at} is a folder where a link to {target} belongs: move it away")
    at.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        import _winapi  # a junction needs no administrator rights, a symbolic link does

        _winapi.CreateJunction(str(target), str(at))
    else:
        at.symlink_to(target, target_is_directory=True)


def remove_tree(path: Path) -> None:
    """Delete a folder and what is in it. Links are taken away, what they lead to stays."""
    if is_link(path):
        os.unlink(path)
        return
    if not path.is_dir():
        return
    with os.scandir(path) as entries:
        for entry in entries:
            child = Path(entry.path)
            if is_link(child):
                os.unlink(child)
            elif entry.is_dir(follow_symlinks=False):
                remove_tree(child)
            else:
                if sys.platform == "win32":  # a read-only file can't be deleted there
                    os.chmod(child, stat.S_IWRITE)
                os.unlink(child)
    os.rmdir(path)


def read_json(path: Path) -> dict:
    """The file's object; an empty one where the file is missing or cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict) -> None:
    """Write by way of a temporary file: the file is the old one or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; waits, and says so, while another process has it.

    The system frees the lock when its process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if not _try_lock(file.fileno(), wait=False):
            print("Waiting for another set-up of this folder ...", flush=True)
            _try_lock(file.fileno(), wait=True)
        yield  # closing the file frees it


def _try_lock(descriptor: int, *, wait: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt
        import time

        while True:
            try:
                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
                time.sleep(0.5)
            else:
                return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free
