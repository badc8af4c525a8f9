"""What was used last, up to a number of bytes; and what tells a file from its earlier self."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")
Stamp = tuple[str, int, int, int]


def stamp_of(path: Path) -> Stamp:
    """A file's real path, time, size and inode.

    The inode tells two files of equal size that replaced each other within one clock tick.
    """
    key = os.path.realpath(path)
    status = os.stat(key)
    return key, status.st_mtime_ns, status.st_size, status.st_ino


class Recent(Generic[Value]):
    """Values by key, the least used out first once they have more than `limit_bytes`. Thread-safe.

    Values are shared between callers, who must not change them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep a value; one that is larger than the limit is not kept."""
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = (value, num_bytes)
            while self.num_bytes > self.limit_bytes:
                self._values.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self._values.values())

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
