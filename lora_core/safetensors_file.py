"""Safetensors files: headers checked before reading, repeatable bytes, a cache of what was read."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .recent import Recent, stamp_of

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DEPTH = 3  # {name: {"shape": [...]}}
MAX_AXES = 16
MAX_NAME = 1000  # characters; the longest in use have some 150
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"C64": torch.complex64, "BOOL": torch.bool},
}

# What the first bytes of other files look like, where they can't be a safetensors header.
_OTHER_FILES = {
    b"PK\x03\x04": "a PyTorch (.pt, .ckpt, .bin) or other zip archive",
    b"\x80": "a Python pickle (.pt, .ckpt, .bin)",
    b"GGUF": "a GGUF file",
    b"<": "a web page, probably saved instead of the download",
    b"version https://git-lfs": "a Git LFS pointer; the file itself was not downloaded",
}
_PICKLED = ("PyTorch", "pickle")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header; `begin` and `end` are bytes within the body."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. `body_start` is the body's offset in the file, in bytes."""

    metadata: dict[str, str]
    entries: dict[str, TensorEntry]
    body_start: int


Contents = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata
_HEADERS: Recent[Header] = Recent(64)  # headers, each counted as one


def read_tensors(path: Path, check: Callable[[Header], None] | None = None) -> Contents:
    """All tensors (on the CPU, in the file's dtypes) and metadata; the file is closed afterwards.

    `check` sees the header before anything else is read and may raise. Raises ValueError naming the
    file when it is of another kind, truncated, or when the header is hostile: too long, too deep,
    duplicate keys, long names, unknown dtypes, tensors that overlap, leave gaps or reach outside
    the file; OSError when the file can't be opened.
    """
    with open(path, "rb") as file:
        header = _checked_header(file, path.name)
        if check is not None:
            check(header)
        return _mapped(file, header), header.metadata


def read_header(path: Path) -> Header:
    """The header alone, checked as `read_tensors` does; no byte of a tensor is read."""
    with open(path, "rb") as file:
        return _checked_header(file, path.name)


def shared_header(path: Path) -> Header:
    """Like `read_header`, and the same object while the file is the same; nobody may change it."""
    stamp = stamp_of(path)
    known = _HEADERS.get(stamp)
    if known is None:
        known = read_header(path)
        _HEADERS.put(stamp, known, 1)
    return known


def forget_headers() -> None:
    """Drop every header that `shared_header` keeps."""
    _HEADERS.clear()


def _mapped(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """Copies of all tensors through a memory map of the file, so that nothing is read twice."""
    if not any(entry.end > entry.begin for entry in header.entries.values()):
        return {name: _empty(entry) for name, entry in header.entries.items()}
    # A private map: torch warns of memory that it may not write to.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        return {
            name: _copied(view, header.body_start + entry.begin, entry)
            for name, entry in header.entries.items()
        }


def _copied(view: mmap.mmap, offset: int, entry: TensorEntry) -> Tensor:
    """An own copy; as bytes first, since tensors in a file need not be aligned."""
    if entry.end == entry.begin:
        return _empty(entry)
    count = entry.end - entry.begin
    raw = torch.frombuffer(view, dtype=torch.uint8, count=count, offset=offset).clone()
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _empty(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])


def _checked_header(file: BinaryIO, name: str) -> Header:
    num_bytes = os.fstat(file.fileno()).st_size
    start = file.read(32)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        raise ValueError(f"{name} is not a safetensors file: {_looks_like(start)}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{name}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
        )
    if 8 + length > num_bytes:
        raise ValueError(
            f"{name} is truncated: it has {num_bytes} bytes, its header alone needs {8 + length}"
        )
    file.seek(8)
    document = _parsed(file.read(length), name)
    metadata, problems = _metadata(document.pop("__metadata__", {}))
    entries: dict[str, TensorEntry] = {}
    for key, value in document.items():
        entry = _entry(value)
        if len(key) > MAX_NAME:
            problems.append(
                f"{_quoted(key)} has a name of {len(key)} characters; {MAX_NAME} are the most"
            )
        elif isinstance(entry, str):
            problems.append(f"{_quoted(key)} {entry}")
        else:
            entries[key] = entry
    problems += _layout_problems(entries, num_bytes - 8 - length)
    if problems:
        shown = "\n".join(f"- {problem}" for problem in problems[:8])
        more = f"\n- and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{name}: the safetensors header is damaged:\n{shown}{more}")
    return Header(metadata, entries, 8 + length)


def _looks_like(start: bytes) -> str:
    if len(start) < 9:
        return f"it has only {len(start)} bytes"
    for magic, kind in _OTHER_FILES.items():
        if start.startswith(magic):
            if not any(word in kind for word in _PICKLED):
                return f"it looks like {kind}"
            return (
                f"it looks like {kind}. Such files can run code when they are opened and are"
                " refused; convert it to safetensors first"
            )
    return "it does not start with a JSON header"


def _parsed(text: bytes, name: str) -> dict[str, object]:
    """The header's JSON object; duplicate keys and deep nesting are refused before parsing."""
    depth = deepest = 0
    unescaped = re.sub(rb"\\.", b"", text, flags=re.DOTALL)
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    for bracket in re.findall(rb"[][{}]", outside_strings):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(
            f"{name}: the safetensors header is nested {deepest} deep; {MAX_DEPTH} is the most"
        )
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{name}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{name}: the safetensors header is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {_quoted(twice)} appears twice")
    return unique


def _metadata(value: object) -> tuple[dict[str, str], list[str]]:
    """The strings of __metadata__, and what is wrong with the rest."""
    if not isinstance(value, dict):
        return {}, ["__metadata__ is not an object"]
    strings = {key: text for key, text in value.items() if isinstance(text, str)}
    wrong = [key for key in value if key not in strings]
    return strings, [f"the metadata value of {_quoted(key)} is not a string" for key in wrong]


def _entry(value: object) -> TensorEntry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the unknown dtype {_quoted(str(dtype))}"
    if not _is_sizes(shape) or len(shape) > MAX_AXES or math.prod(shape) >= 2**60:
        return f"has the impossible shape {_quoted(str(shape))}"
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the impossible offsets {_quoted(str(offsets))}"
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        return f"takes {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {wanted}"
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**60 for n in value)


def _layout_problems(entries: Mapping[str, TensorEntry], body_bytes: int) -> list[str]:
    """Tensors must follow one another without overlap or gap and fill the body exactly."""
    problems, position = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            how = "overlaps the tensor before it" if entry.begin < position else "leaves a gap"
            problems.append(f"{_quoted(name)} starts at byte {entry.begin} and {how} ({position})")
        position = max(position, entry.end)
    if position > body_bytes:
        problems.append(f"the file is truncated: {body_bytes} of {position} tensor bytes are there")
    elif position < body_bytes:
        problems.append(f"{body_bytes - position} bytes at the end belong to no tensor")
    return problems


def _quoted(text: str) -> str:
    """Text from a file for a message: short, and escaped to ASCII."""
    return json.dumps(text if len(text) <= 120 else text[:117] + "...")


@dataclass(frozen=True)
class Serialized:
    """Tensors as they lie in a file. `header` puts any metadata before the same body."""

    entries: dict[str, object]
    body: memoryview

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Serialized:
        """From tensors of any device and layout, in the library's order: dtype, then name."""
        owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in owned.values()}
        if len(storages) < len(owned):  # the library refuses tensors that share memory
            owned = {name: tensor.clone() for name, tensor in owned.items()}
        data = safetensors.torch.save(owned)
        length = int.from_bytes(data[:8], "little")
        return cls(json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :])

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Length and JSON header, padded to 8 bytes; metadata sorted by name.

        The library writes metadata in random order (its map is hashed), so the same input would
        give other bytes in each process.
        """
        document = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        text = json.dumps(
            {**document, **self.entries}, ensure_ascii=False, separators=(",", ":")
        ).encode("utf-8", "replace")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a whole file; equal for equal input."""
    serialized = Serialized.of(tensors)
    return serialized.header(metadata or {}) + serialized.body


class ReadCache:
    """The files read last, up to `limit_bytes` of tensors; a file that changed is read again.

    Thread-safe. The tensors are shared between callers, who must copy before changing them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._files: Recent[Contents] = Recent(limit_bytes)

    def read(self, path: Path, check: Callable[[Header], None] | None = None) -> Contents:
        """Like `read_tensors`; `check` is called only when the file is really read."""
        stamp = stamp_of(path)
        known = self._files.get(stamp)
        if known is None:
            known = read_tensors(path, check)
            self._files.put(stamp, known, sum(tensor.nbytes for tensor in known[0].values()))
        return known

    @property
    def num_bytes(self) -> int:
        return self._files.num_bytes

    def clear(self) -> None:
        self._files.clear()
