"""Writing files so that a reader sees the old one or the new one, never a half; free names."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    """Replace `path` by the joined chunks, or leave it as it is: temporary name, fsync, rename.

    Makes missing folders. Raises OSError; a full disk is told with what was needed and is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        needed = sum(memoryview(chunk).nbytes for chunk in chunks) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        message = (
            f"the disk is full: {needed:.1f} MB are needed, {free:.1f} MB are free in"
            f" {path.parent}; nothing was written over"
        )
        raise OSError(error.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def next_free(path: Path, is_free: Callable[[Path], bool]) -> Path:
    """`path`, or the first of `name-2`, `name-3`... that is free."""
    candidate, number = path, 2
    while not is_free(candidate):
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate
