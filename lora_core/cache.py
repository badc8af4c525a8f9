"""A folder of encoded tensors on disk, limited in size: the least recently used go out first."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import write_atomically
from .safetensors_file import Serialized, read_tensors

log = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 20 * 1000**3
ORPHAN_AGE_S = 24 * 3600.0  # a temporary file this old is of a process that died


class TensorCache:
    """Entries by key (hex digits), each a safetensors file with a JSON value beside the tensors."""

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def get(self, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """The entry's tensors and JSON value; None where there is none or it is damaged."""
        path = self._path(key)
        try:
            tensors, metadata = read_tensors(path)
            if metadata["sha256"] != _digest(Serialized.of(tensors), metadata["value"]):
                raise ValueError("its contents do not match its checksum")
            value = json.loads(metadata["value"])
            os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            log.warning("the cache entry %s is damaged and will be made again: %s", path, error)
            return None
        return tensors, value

    def put(self, key: str, tensors: Mapping[str, Tensor], value: Any = None) -> None:
        """Write an entry, whole or not at all. Raises OSError, for instance on a full disk."""
        serialized, text = Serialized.of(tensors), json.dumps(value)
        header = serialized.header({"value": text, "sha256": _digest(serialized, text)})
        write_atomically(self._path(key), header, serialized.body)

    def trim(self) -> None:
        """Delete the least recently used entries until the rest is within the limit.

        Entries that another process deletes first or has open (Windows) are passed over, and
        temporary files that a dead process left are deleted too.
        """
        for path in self.folder.glob("*/.*.tmp"):
            with suppress(FileNotFoundError, PermissionError):
                if path.stat().st_mtime < time.time() - ORPHAN_AGE_S:
                    path.unlink()
        entries = []
        for path in self.folder.glob("*/*.safetensors"):
            with suppress(FileNotFoundError, PermissionError):
                entries.append((path, path.stat()))
        total = sum(stat.st_size for _, stat in entries)
        for path, stat in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self.limit_bytes:
                return
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
                total -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _digest(serialized: Serialized, value: str) -> str:
    """sha256 of names, shapes, dtypes, numbers and the JSON value."""
    digest = hashlib.sha256(serialized.header({"value": value}))
    digest.update(serialized.body)
    return digest.hexdigest()
