"""Reading and writing safetensors: hostile headers, other files, atomicity, the cache."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_weave.lora_core import files
from lora_weave.lora_core.files import write_atomically
from lora_weave.lora_core.safetensors_file import (
    DTYPES,
    ReadCache,
    forget_headers,
    read_tensors,
    serialize,
    shared_header,
)

F32_AT_0 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
F32_AT_8 = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def with_header(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4, generator=generator),
        "a.weight": torch.randn(5, generator=generator).bfloat16(),
        "alpha": torch.tensor(4.0),
        "half": torch.randn(2, 1, 3, 3, generator=generator).half(),
        "empty": torch.zeros(0, 3),
        "whole": torch.tensor([1, 2], dtype=torch.int64),
    }


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"key": "välue"})
    read, metadata = read_tensors(path)
    assert metadata == {"key": "välue"}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert all(read[name].dtype == tensors[name].dtype for name in tensors)


def test_library_reads_what_we_wrote(tmp_path: Path) -> None:
    tensors, metadata = some_tensors(), {"b": 'quo"te', "a": "日本語\n\x7f\x01"}
    path = write(tmp_path / "x.safetensors", serialize(tensors, metadata))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


def test_bytes_are_the_librarys_but_with_sorted_metadata() -> None:
    tensors = some_tensors()
    assert serialize(tensors) == safetensors.torch.save(tensors)
    metadata = {"z": "1", "a": "é\n", "m": "2"}
    ours, theirs = serialize(tensors, metadata), safetensors.torch.save(tensors, metadata)
    assert len(ours) == len(theirs)
    length = int.from_bytes(ours[:8], "little")
    assert ours[8 + length :] == theirs[8 + length :]
    assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + length])
    assert list(json.loads(ours[8 : 8 + length])["__metadata__"]) == ["a", "m", "z"]


def test_order_and_layout_of_the_input_do_not_matter() -> None:
    tensors = some_tensors()
    shared = torch.arange(12.0).reshape(3, 4)
    tensors |= {"view": shared[1:], "other view": shared[:2], "turned": shared.t()}
    turned = {
        name: tensor.clone() if name == "turned" else tensor
        for name, tensor in reversed(tensors.items())
    }
    assert serialize(tensors, {"a": "1", "b": "2"}) == serialize(turned, {"b": "2", "a": "1"})


def test_every_known_dtype_is_read(tmp_path: Path) -> None:
    for dtype, num_bytes in ((name, t.itemsize) for name, t in DTYPES.items()):
        header = {"x": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * num_bytes]}}
        path = write(tmp_path / f"{dtype}.safetensors", with_header(header, bytes(3 * num_bytes)))
        assert read_tensors(path)[0]["x"].nbytes == 3 * num_bytes


HOSTILE = {
    "huge length": (with_header(b"{}", length=2**63), "header claims 9223372036854775808 bytes"),
    "length past the end": (with_header(b"{}", length=500), "is truncated: it has 10 bytes"),
    "truncated body": (with_header({"x": F32_AT_0}, bytes(5)), "truncated: 5 of 8 tensor bytes"),
    "body too long": (with_header({"x": F32_AT_0}, bytes(9)), "1 bytes at the end belong to no"),
    "duplicate keys": (
        with_header(b'{"x": %s, "x": %s}' % ((json.dumps(F32_AT_0).encode(),) * 2), bytes(8)),
        'the key "x" appears twice',
    ),
    "duplicate metadata": (
        with_header(b'{"__metadata__": {"a": "1", "a": "2"}}'),
        'the key "a" appears twice',
    ),
    "deep": (with_header(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested 100001 deep"),
    "deep and open": (with_header(b'{"x":' + b"[{" * 5), "nested 11 deep"),
    "deep within a string": (with_header(b'{"\\"[[[[": "\\\\\\"{{{{"}'), "must have exactly dtype"),
    "deep after a string": (with_header(b'{"\\\\": [[[[1]]]]}'), "nested 5 deep"),
    "not JSON": (with_header(b"{nope}"), "is not valid JSON"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "is not valid JSON"),
    "long number": (with_header(b'{"x": %s}' % (b"9" * 9000)), "safetensors header"),
    "unknown dtype": (
        with_header({"x": {**F32_AT_0, "dtype": "F33"}}, bytes(8)),
        '"x" has the unknown dtype "F33"',
    ),
    "dtype of a wrong type": (
        with_header({"x": {**F32_AT_0, "dtype": ["F32"]}}, bytes(8)),
        "unknown dtype",
    ),
    "overlap": (
        with_header({"x": F32_AT_0, "y": {**F32_AT_8, "data_offsets": [4, 12]}}, bytes(12)),
        '"y" starts at byte 4 and overlaps',
    ),
    "gap": (
        with_header({"x": F32_AT_0, "y": {**F32_AT_8, "data_offsets": [9, 17]}}, bytes(17)),
        '"y" starts at byte 9 and leaves a gap',
    ),
    "outside": (
        with_header({"x": F32_AT_0, "y": F32_AT_8}, bytes(8)),
        "truncated: 8 of 16 tensor bytes",
    ),
    "backwards": (
        with_header({"x": {**F32_AT_0, "data_offsets": [8, 0]}}, bytes(8)),
        "impossible offsets",
    ),
    "negative": (
        with_header({"x": {**F32_AT_0, "shape": [-2]}}, bytes(8)),
        "impossible shape",
    ),
    "shape that does not fill it": (
        with_header({"x": {**F32_AT_0, "shape": [3]}}, bytes(8)),
        '"x" takes 8 bytes; F32 [3] needs 12',
    ),
    "overflowing shape": (
        with_header({"x": {**F32_AT_0, "shape": [2**40, 2**40]}}, bytes(8)),
        "impossible shape",
    ),
    "boolean shape": (
        with_header({"x": {**F32_AT_0, "shape": [True, 2]}}, bytes(8)),
        "impossible shape",
    ),
    "long name": (
        with_header({"x" * 1001: F32_AT_0}, bytes(8)),
        'xxx..." has a name of 1001 characters; 1000 are the most',
    ),
    "missing field": (with_header({"x": {"dtype": "F32"}}), '"x" must have exactly dtype, shape'),
    "extra field": (with_header({"x": {**F32_AT_0, "code": 1}}, bytes(8)), "must have exactly"),
    "metadata not strings": (with_header({"__metadata__": {"a": 1}}), '"a" is not a string'),
    "metadata not an object": (with_header({"__metadata__": "a"}), "not an object"),
    "tensor not an object": (with_header({"x": 3}), "must have exactly"),
}


@pytest.mark.parametrize("data, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_give_one_clear_error(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", data)
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert "bad.safetensors" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", [b'{"' + b'\\"' * 40_000, b'{"' + b"\\" * 80_001, b'{"' * 40_000])
def test_open_strings_take_no_time(tmp_path: Path, text: bytes) -> None:
    """The first took 18 s, by one search for the end at each of its quotes."""
    path = write(tmp_path / "bad.safetensors", with_header(text))
    started = time.perf_counter()
    with pytest.raises(ValueError, match="bad.safetensors: the safetensors header is n"):
        read_tensors(path)
    assert time.perf_counter() - started < 2


def test_all_problems_of_a_header_at_once(tmp_path: Path) -> None:
    header = {"x": {**F32_AT_0, "dtype": "F33"}, "y": {**F32_AT_8, "shape": [7]}, "z": 1}
    path = write(tmp_path / "bad.safetensors", with_header(header, bytes(16)))
    with pytest.raises(ValueError, match="F33(.|\n)*needs 28(.|\n)*must have exactly"):
        read_tensors(path)


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (torch_file(), "can run code when they are opened and are refused"),
        (pickle.dumps({"x": list(range(10))}), "can run code when they are opened and are refused"),
        (b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "it has only 0 bytes"),
        (b"\x08\0\0", "it has only 3 bytes"),
        (b"hello there, this is text", "does not start with a JSON header"),
    ],
    ids="torch pickle gguf html lfs empty short text".split(),
)
def test_other_files_are_refused_by_content(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "other.safetensors", data)
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert str(caught.value).startswith("other.safetensors is not a safetensors file")
    assert message in str(caught.value)


def test_a_header_length_that_spells_a_pickle_is_fine(tmp_path: Path) -> None:
    """A header of 640 bytes starts the file with 80 02, as a pickle of protocol 2 does."""
    text = json.dumps({"x": F32_AT_0}).encode().ljust(640)
    path = write(tmp_path / "x.safetensors", with_header(text, bytes(8)))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_tensors(path)[0]["x"].tolist() == [0.0, 0.0]


def test_mutated_files_end_in_success_or_a_value_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = serialize(some_tensors(), {"ss_output_name": "x"})
    path = tmp_path / "mutated.safetensors"
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 20)]
            elif kind == 2:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 30)]
            else:
                data[at] = rng.choice(b'0123456789[]{}",:')
        path.write_bytes(data)
        try:
            read_tensors(path)
        except ValueError as error:
            assert "mutated.safetensors" in str(error)
            refused += 1
    assert 500 < refused < 1500


def test_reading_closes_and_copies_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", serialize({"x": torch.ones(4)}))
    tensors, _ = read_tensors(path)
    write(path, serialize({"x": torch.zeros(4)}))
    assert tensors["x"].tolist() == [1.0] * 4
    if os.path.isdir("/proc/self/fd"):
        opened = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]
        assert str(path) not in opened
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.bin"
    write_atomically(path, b"old")
    write_atomically(path, b"ne", memoryview(b"w"))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["x.bin"]
    if os.name == "posix":
        plain = write(tmp_path / "plain", b"")
        assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = write(tmp_path / "x.safetensors", b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    if failing == "write":
        chunks = [b"new", "not bytes"]
    else:
        monkeypatch.setattr(files.os, failing, fail)
        chunks = [b"new"]
    with pytest.raises((OSError, TypeError)):
        write_atomically(path, *chunks)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_full_disk_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.safetensors", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"disk is full: 2\.5 MB are needed, .* free in") as caught:
        write_atomically(path, bytes(2_500_000))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is full")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(tmp_path / "x", bytes(100_000))


def test_cache_reads_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ReadCache(10**6)
    path = write(tmp_path / "x.safetensors", serialize({"x": torch.ones(4)}))
    checked: list[object] = []
    assert cache.read(path, checked.append)[0]["x"].tolist() == [1.0] * 4
    assert cache.read(path, checked.append)[0]["x"].tolist() == [1.0] * 4
    assert len(checked) == 1
    stamp = path.stat().st_mtime_ns
    write_atomically(path, serialize({"x": torch.zeros(4)}))
    os.utime(path, ns=(stamp, stamp))  # same name, size and time: only the inode tells
    assert cache.read(path, checked.append)[0]["x"].tolist() == [0.0] * 4
    path.write_bytes(serialize({"x": torch.full((4,), 2.0)}))
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert cache.read(path, checked.append)[0]["x"].tolist() == [2.0] * 4
    assert len(checked) == 3


def test_cache_is_bounded_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = ReadCache(3 * 400)
    paths = [
        write(tmp_path / f"{index}.safetensors", serialize({"x": torch.full((100,), index)}))
        for index in map(float, range(4))
    ]
    reads: list[str] = []

    def read(index: int) -> None:
        cache.read(paths[index], lambda _: reads.append(str(index)))

    for index in (0, 1, 2, 0, 3, 0, 2, 3, 1):  # 3 drops 1
        read(index)
    assert reads == ["0", "1", "2", "3", "1"]
    big = write(tmp_path / "big.safetensors", serialize({"x": torch.zeros(1000)}))
    assert cache.read(big)[0]["x"].numel() == 1000
    assert cache.num_bytes <= 1200


def test_cache_from_many_threads(tmp_path: Path) -> None:
    cache = ReadCache(2000)
    paths = [
        write(tmp_path / f"{index}.safetensors", serialize({"x": torch.full((100,), index)}))
        for index in map(float, range(8))
    ]
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            index = rng.randrange(8)
            if cache.read(paths[index])[0]["x"][0].item() != index:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.num_bytes <= 2000


def test_a_shared_header_is_read_once_and_again_after_a_change(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", serialize({"x": torch.ones(4)}, {"a": "1"}))
    first = shared_header(path)
    assert shared_header(path) is first and first.metadata == {"a": "1"}
    write_atomically(path, serialize({"x": torch.ones(4)}, {"a": "2"}))
    assert shared_header(path).metadata == {"a": "2"}
    forget_headers()
    assert shared_header(path) is not first
