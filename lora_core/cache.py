"""A folder of encoded tensors on disk, limited in size: the least recently used go out first."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import write_atomically
from .safetensors_file import read_tensors, serialize

log = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 20 * 1000**3


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
        write_atomically(self._path(key), serialize(tensors, {"value": json.dumps(value)}))

    def trim(self) -> None:
        """Delete the least recently used entries until the rest is within the limit."""
        entries = [(path, path.stat()) for path in self.folder.glob("*/*.safetensors")]
        total = sum(stat.st_size for _, stat in entries)
        for path, stat in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
