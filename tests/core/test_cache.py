"""The cache on disk gives back what was put in or nothing, and stays within its limit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.cache import TensorCache
from lora_weave.lora_core.safetensors_file import serialize

KEYS = ["aa" + "0" * 62, "ab" + "1" * 62, "ab" + "2" * 62, "ff" + "3" * 62]
TENSORS = {"latent": torch.arange(24, dtype=torch.float32).reshape(1, 4, 2, 3)}


def files(cache: TensorCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def path_of(cache: TensorCache, key: str) -> Path:
    (path,) = cache.folder.rglob(f"{key}*")
    return path


def used_at(cache: TensorCache, key: str, seconds: int) -> None:
    """Pretend that an entry was used at this time."""
    os.utime(path_of(cache, key), (seconds, seconds))


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache")


@pytest.mark.parametrize(
    "tensors",
    [
        TENSORS,
        {},
        {"0": torch.tensor(2.5), "1": torch.tensor([1, -2], dtype=torch.int64)},
        {"half": torch.randn(3, 5, dtype=torch.float16), "brain": torch.randn(2).bfloat16()},
        {"strided": torch.arange(12.0).reshape(3, 4).T[1:]},
    ],
    ids=["latent", "none", "scalars", "half", "strided"],
)
@pytest.mark.parametrize("value", [None, {"list": [{"value": 1.5}, {"tensor": "0"}]}, "猫"])
def test_what_was_put_in_comes_back(cache: TensorCache, tensors: dict[str, Tensor], value) -> None:
    cache.put(KEYS[0], tensors, value)
    found, told = cache.get(KEYS[0]) or ({}, "nothing")
    assert told == value
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_nothing_is_found_before_it_is_put(cache: TensorCache) -> None:
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], TENSORS)
    assert cache.get(KEYS[1]) is None


def test_another_process_finds_it(cache: TensorCache) -> None:
    """Nothing is kept in memory."""
    cache.put(KEYS[0], TENSORS, 1)
    assert TensorCache(cache.folder).get(KEYS[0]) is not None


def test_putting_again_replaces(cache: TensorCache) -> None:
    cache.put(KEYS[0], TENSORS, 1)
    cache.put(KEYS[0], {"other": torch.ones(1)}, 2)
    found, value = cache.get(KEYS[0]) or ({}, None)
    assert (list(found), value) == (["other"], 2)
    assert len(files(cache)) == 1


def test_what_comes_back_is_the_callers_own(cache: TensorCache) -> None:
    cache.put(KEYS[0], TENSORS)
    first, _ = cache.get(KEYS[0]) or ({}, None)
    first["latent"].zero_()
    second, _ = cache.get(KEYS[0]) or ({}, None)
    assert torch.equal(second["latent"], TENSORS["latent"])


def damaged(whole: bytes) -> dict[str, bytes]:
    """What crashes, full disks and bad disks leave, and a file of somebody else."""
    return {
        "empty": b"",
        "only the length": whole[:8],
        "header cut": whole[:40],
        "body cut": whole[:-1],
        "longer": whole + b"\0",
        "zeros": bytes(len(whole)),
        "a byte of the header": whole[:12] + b"\xff" + whole[13:],
        "a byte of the body": whole[:-1] + bytes([whole[-1] ^ 1]),
        "another value": whole.replace(b'"value":"null"', b'"value":"1234"'),
        "no value": serialize(TENSORS),
        "no checksum": serialize(TENSORS, {"value": "null"}),
        "value that is no JSON": serialize(TENSORS, {"value": "{"}),
    }


@pytest.mark.parametrize("kind", damaged(serialize(TENSORS, {"value": "null"})))
def test_a_damaged_entry_counts_as_none_and_can_be_made_again(
    cache: TensorCache, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    cache.put(KEYS[0], TENSORS)
    path = path_of(cache, KEYS[0])
    path.write_bytes(damaged(path.read_bytes())[kind])
    assert cache.get(KEYS[0]) is None
    assert str(path) in caplog.text
    assert "is damaged and will be made again" in caplog.text
    cache.put(KEYS[0], TENSORS)
    assert cache.get(KEYS[0]) is not None


def test_a_folder_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(OSError):
        TensorCache(tmp_path / "cache").put(KEYS[0], TENSORS)


def test_a_failed_write_leaves_the_old_entry(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEYS[0], TENSORS, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        cache.put(KEYS[0], {"latent": torch.zeros(1)}, "new")
    assert (cache.get(KEYS[0]) or (None, None))[1] == "old"
    assert len(files(cache)) == 1, "no temporary file is left"


# --- the limit


def test_within_its_limit_everything_stays(cache: TensorCache) -> None:
    for key in KEYS:
        cache.put(key, TENSORS)
    cache.limit_bytes = sum(path.stat().st_size for path in files(cache))
    cache.trim()
    assert len(files(cache)) == len(KEYS)


def test_the_least_recently_used_go_out_first(cache: TensorCache) -> None:
    for seconds, key in enumerate(KEYS, start=1000):
        cache.put(key, TENSORS)
        used_at(cache, key, seconds)
    size = path_of(cache, KEYS[0]).stat().st_size
    assert cache.get(KEYS[0]) is not None  # now it is the last one used
    cache.limit_bytes = 2 * size
    cache.trim()
    assert {path.stem for path in files(cache)} == {KEYS[3], KEYS[0]}


def test_looking_for_an_entry_does_not_renew_others(cache: TensorCache) -> None:
    for seconds, key in enumerate(KEYS[:2], start=1000):
        cache.put(key, TENSORS)
        used_at(cache, key, seconds)
    cache.get(KEYS[1])
    assert path_of(cache, KEYS[0]).stat().st_mtime == 1000


def test_no_more_than_needed_goes_out(cache: TensorCache) -> None:
    """A big old entry makes room for all that is left."""
    cache.put(KEYS[0], {"big": torch.zeros(10_000)})
    used_at(cache, KEYS[0], 1000)
    for key in KEYS[1:]:
        cache.put(key, TENSORS)
    cache.limit_bytes = 20_000
    cache.trim()
    assert {path.stem for path in files(cache)} == set(KEYS[1:])


def test_an_entry_over_the_limit_goes_out_too(cache: TensorCache) -> None:
    cache.put(KEYS[0], TENSORS)
    cache.limit_bytes = 10
    cache.trim()
    assert files(cache) == []


def test_trimming_leaves_other_files_alone(cache: TensorCache, tmp_path: Path) -> None:
    cache.put(KEYS[0], TENSORS)
    beside = tmp_path / "runs.safetensors"
    beside.write_bytes(bytes(1000))
    cache.limit_bytes = 0
    cache.trim()
    assert beside.exists()


def test_trimming_what_is_not_there(tmp_path: Path) -> None:
    TensorCache(tmp_path / "never made").trim()
    assert not (tmp_path / "never made").exists()


def test_an_entry_that_another_process_trims_first(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers may share a folder: the file is gone between being listed and looked at."""
    cache.put(KEYS[0], TENSORS)
    cache.put(KEYS[1], TENSORS)
    path = path_of(cache, KEYS[0])
    really = Path.stat

    def stat(self: Path, **options: bool) -> os.stat_result:
        if self == path:
            path.unlink(missing_ok=True)
        return really(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    cache.limit_bytes = 0
    cache.trim()
    assert files(cache) == []


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_an_entry_that_is_gone_or_busy_is_passed_over(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """Windows refuses to delete what a program has open; the next entries make room instead."""
    for seconds, key in enumerate(KEYS[:3], start=1000):
        cache.put(key, TENSORS)
        used_at(cache, key, seconds)
    oldest, really = path_of(cache, KEYS[0]), Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self == oldest:
            if error is FileNotFoundError:
                really(self)
            else:
                raise error(13, "in use", str(self))
        really(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    cache.limit_bytes = oldest.stat().st_size
    cache.trim()
    kept = KEYS[2] if error is FileNotFoundError else KEYS[0]
    assert [path.stem for path in files(cache)] == [kept]


def test_trimming_deletes_temporary_files_of_dead_processes(cache: TensorCache) -> None:
    cache.put(KEYS[0], TENSORS)
    old, new = (cache.folder / "aa" / f".{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    cache.trim()
    assert files(cache) == sorted([new, path_of(cache, KEYS[0])])
