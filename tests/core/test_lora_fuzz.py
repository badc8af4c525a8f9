"""Thousands of damaged files: each is read, or refused with a clear error that names it."""

from __future__ import annotations

import json
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.inspection import inspect_file
from lora_weave.lora_core.key_map import KeyMap, LayerKey
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.peft_config import CONFIG, METADATA, WEIGHTS

NUM_FILES = 5000
MAX_SECONDS = 60
MAX_GROWTH_KB = 400_000

Header = dict[str, Any]
Mutation = Callable[[random.Random, bytes], bytes]

LAYERS = [
    LayerKey("diffusion_model.a", (8, 6), "lora_unet_a", ("unet.a", "base_model.model.a")),
    LayerKey("diffusion_model.b", (4, 6, 3, 3), "lora_unet_b", ("unet.b",)),
    LayerKey(
        "diffusion_model.qkv",
        (12, 6),
        "lora_unet_qkv",
        slices={f"unet.to_{word}": (0, 4 * n, 4) for n, word in enumerate("qkv")},
        swapped=("unet.turned",),
    ),
    LayerKey("text_encoders.clip_l.transformer.c", (6, 6), "lora_te_c", ("text_encoder.c",)),
]
NORM = LayerKey("diffusion_model.norm", (4,), "lora_unet_norm")
KEYMAP = KeyMap(
    "SD1.5",
    {layer.path: layer for layer in LAYERS},
    {NORM.path: NORM},
    frozenset({"diffusion_model.a", "diffusion_model.qkv", NORM.path}),
)


def pair(name: str, out: int, columns: tuple[int, ...], rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    up = torch.randn(out, rank, generator=generator)
    down = torch.randn(rank, *columns, generator=generator)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def seeds() -> list[bytes]:
    """Good files of several dialects and types, each of which is read as it is."""
    made = {
        name: kind.create((8, 6), 2, 1.0, generator=torch.Generator().manual_seed(0)).tensors()
        for name, kind in ADAPTERS.items()
    }
    each = [{f"lora_unet_a.{key}": t for key, t in tensors.items()} for tensors in made.values()]
    peft: dict[str, Tensor] = {"base_model.model.a.ia3_l": torch.full((8, 1), 1.5)}
    for word in "qkv":
        peft[f"unet.to_{word}.oft_R.weight"] = torch.full((3, 1), 0.5)
        peft[f"unet.to_{word}.oft_R.terms"] = torch.tensor(5)
    settings = {
        **{"unet.r": 2, "unet.lora_alpha": 4, "unet.use_rslora": True},
        **{"unet.alpha_pattern": {"to_q": 3, "^a": 2}, "unet.rank_pattern": {}},
    }
    split = pair("unet.to_q", 4, (6,)) | pair("unet.to_v", 4, (6,)) | pair("unet.a", 8, (6,))
    magnitude = {"base_model.model.a.lora_magnitude_vector": torch.ones(8)}
    norm = {"lora_unet_norm.w_norm": torch.ones(4), "lora_unet_norm.b_norm": torch.ones(4)}
    files: list[tuple[dict[str, Tensor], dict[str, str]]] = [
        *((tensors, {"ss_base_model_version": "sd_v1"}) for tensors in each),
        (peft, {}),
        (split, {METADATA: json.dumps(settings)}),
        (pair("base_model.model.a", 8, (6,)) | magnitude, {}),
        (pair("unet.b", 4, (6, 3, 3)) | pair("text_encoder.c", 6, (6,)), {"format": "pt"}),
        (pair("unet.turned", 12, (6,)) | norm | {"unet.a.diff_b": torch.ones(8)}, {}),
    ]
    half = {name: tensor.half() for name, tensor in split.items()}
    return [safetensors.torch.save(*file) for file in [*files, (half, {})]]


def taken_apart(data: bytes) -> tuple[Header, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Header | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def a_key(rng: random.Random, header: Header) -> str:
    return rng.choice([key for key in header if key != "__metadata__"])


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 64))


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bits anywhere, most of them in the header."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = len(data) if rng.random() < 0.3 else min(len(data), 600)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def huge_length(rng: random.Random, data: bytes) -> bytes:
    return struct.pack("<Q", rng.choice((2**63, 2**40, 10**8, len(data), 0, 1))) + data[8:]


def wrong_offsets(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    entry = header[a_key(rng, header)]
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        ([end, begin], [begin, end + 4], [0, end - begin], [-4, end], [begin, 2**62], [begin])
    )
    return put_together(header, body)


def wrong_shape(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    entry = header[a_key(rng, header)]
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        (shape[::-1], [*shape, 1], [1, *shape], shape[1:], [2**31, 2**31], [0], [-1], "x", [[]])
    )
    return put_together(header, body)


def wrong_dtype(rng: random.Random, data: bytes) -> bytes:
    """Another name, where all tensors are of one size also another type of the same size."""
    header, body = taken_apart(data)
    entry = header[a_key(rng, header)]
    entry["dtype"] = rng.choice(("I32", "U32", "F16", "BF16", "F64", "C64", "BOOL", "Q4", 7, None))
    return put_together(header, body)


def renamed(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    for _ in range(rng.randrange(1, 4)):
        key = a_key(rng, header)
        other = rng.choice(
            (
                *("", "x", key[1:], key[:-1], key + ".weight", key.replace(".", "_"), "." + key),
                *("lora_unet_a.diff", "lora_unet_a.hada_w1_a", "unet.a.lora_up.bias"),
                *("unet.to_k.lora_A.weight", "diffusion_model.qkv.lora_up.weight", "\ud800"),
                *("lora_unet_a.set_weight", "lora_te_c.lora_down.weight", "lora_unet_a.weight"),
                *("lora_unet_b.lora_mid.weight", "unet.a.lora_magnitude_vector", key * 400),
            )
        )
        header = {other if name == key else name: entry for name, entry in header.items()}
    return put_together(header, body)


def duplicated(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    key = a_key(rng, header)
    text = json.dumps(header).encode()
    double = f", {json.dumps(key)}: {json.dumps(header[key])}}}".encode()
    return put_together(text[:-1] + double, body)


def deep(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    depth = rng.choice((5, 900, 50_000))
    opening = rng.choice(("[", '{"a":'))
    closing = "]" if opening == "[" else "}"
    nested = (opening * depth + "1" + closing * depth).encode()
    return put_together(b'{"x": ' + nested + b", " + json.dumps(header).encode()[1:], body)


def other_metadata(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    deep_text = "[" * rng.choice((3, 100_000))
    values: tuple[Any, ...] = (
        *(1, None, [], {"a": 1}, {"a": "b" * 10_000}, {METADATA: "{}"}, {METADATA: deep_text}),
        *({METADATA: '{"unet.r": 0, "unet.lora_alpha": 1}'}, {METADATA: '{"unet.r": 1e400}'}),
        {METADATA: '{"unet.r": 2, "unet.lora_alpha": NaN, "unet.alpha_pattern": {"(": 1}}'},
        {METADATA: '{"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": {"(a*)*b": 2}}'},
        {METADATA: '{"r": 2, "lora_alpha": 2, "alpha_pattern": 5}'},
    )
    header["__metadata__"] = rng.choice(values)
    return put_together(header, body)


def odd_numbers(rng: random.Random, data: bytes) -> bytes:
    header, body = taken_apart(data)
    changed = bytearray(body)
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 0.0, -1.0))
    for _ in range(rng.randrange(1, 5)):
        start = 4 * rng.randrange(len(body) // 4)
        changed[start : start + 4] = struct.pack("<f", value)
    return put_together(header, bytes(changed))


def no_file_of_the_kind(rng: random.Random, data: bytes) -> bytes:
    beginnings = (b"", b"{", b"PK\x03\x04", b"\x80\x02", b"GGUF", b"<html>", b"\x00" * 9)
    return rng.choice(beginnings) + rng.randbytes(rng.randrange(40))


MUTATIONS: tuple[Mutation, ...] = (
    *(truncated, longer, flipped, flipped, flipped, huge_length, wrong_offsets, wrong_shape),
    *(wrong_dtype, renamed, renamed, duplicated, deep, other_metadata, odd_numbers),
    no_file_of_the_kind,
)


def test_the_seeds_are_good(tmp_path: Path) -> None:
    for index, data in enumerate(seeds()):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(data)
        assert LoraFile.read(path, KEYMAP).adapters


@pytest.mark.filterwarnings("error")
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """Nothing but success or a ValueError with the file's name; no hang, no large allocation."""
    rng, good = random.Random(0), seeds()
    ends: Counter[str] = Counter()
    before = peak_kb()
    started, slowest = time.perf_counter(), 0.0
    for index in range(NUM_FILES):
        data, done = rng.choice(good), []
        for mutation in rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2))):
            try:
                data = mutation(rng, data)
                done.append(mutation.__name__)
            except (ValueError, IndexError, KeyError, TypeError, struct.error, RecursionError):
                pass  # what the first one left can't be taken apart
        path = tmp_path / f"file{index}.safetensors"
        path.write_bytes(data)
        begun = time.perf_counter()
        for strict in (True, False):
            ends[outcome(path, strict, done)] += 1
        slowest = max(slowest, time.perf_counter() - begun)
        path.unlink()
    assert ends["read"] > NUM_FILES // 50 and ends["refused"] > NUM_FILES
    assert slowest < 5
    assert time.perf_counter() - started < MAX_SECONDS
    assert peak_kb() - before < MAX_GROWTH_KB


HOSTILE_NAMES = {
    "a long name": ["unet.down_blocks." + "attn2." * 60_000 + "x"],
    "a long number": [f"transformer.transformer_blocks.{'1' * 5000}.attn.to_q"],
    "numbers as long as may be": [
        f"double_blocks.{index}{'1' * 900}.img_attn.qkv" for index in range(50)
    ],
    **{
        f"{part} again and again": [
            f"unet.{index}." + part * (900 // len(part)) for index in range(50)
        ]
        for part in (
            *("a.", "attn2.", "down_block", "mod.lin", "transformer_blocks.1.attn.", "to_"),
            *("double_blocks.1.", "blocks.1", "a.processor.", "x.oft_a", "1", ".string_to_param"),
        )
    },
}


@pytest.mark.parametrize("names", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_hostile_names_take_no_time(tmp_path: Path, names: list[str]) -> None:
    """Searches for families and dialects in names that were made to take long."""
    tensors = {key: tensor for name in names for key, tensor in pair(name, 8, (6,)).items()}
    path = tmp_path / "hostile.safetensors"
    safetensors.torch.save_file(tensors | pair("unet.a", 8, (6,)), path)
    started = time.perf_counter()
    for strict in (True, False):
        outcome(path, strict, ["names"])
    assert time.perf_counter() - started < 10


def peak_kb() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outcome(path: Path, strict: bool, done: list[str]) -> str:
    try:
        lora = LoraFile.read(path, KEYMAP, strict=strict)
        inspect_file(path)
        assert lora.adapters and not (strict and lora.problems)
        for where, adapter in lora.adapters.items():
            assert adapter.shape == KEYMAP.shape(where)
            assert all(parameter.isfinite().all() for parameter in adapter.parameters())
        return "read"
    except ValueError as error:
        assert path.name in str(error), f"{done} {strict}: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{done} {strict}: {type(error).__name__} {error}") from error


WRAPPED = "base_model.model.a"
FOLDERS: dict[str, tuple[dict[str, Tensor], dict[str, object]]] = {
    "LORA": (pair(WRAPPED, 8, (6,)), {"r": 2, "lora_alpha": 4, "alpha_pattern": {"a": 2}}),
    "OFT": (
        {f"{WRAPPED}.oft_R.weight": torch.ones(3, 1)},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": True, "eps": 1e-3},
    ),
    "IA3": ({f"{WRAPPED}.ia3_l": torch.ones(8, 1)}, {"feedforward_modules": ".*(b|c)"}),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_configurations_of_folders(tmp_path: Path, kind: str) -> None:
    rng, (tensors, settings) = random.Random(1), FOLDERS[kind]
    text = json.dumps({**settings, "peft_type": kind})
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(text)
    assert LoraFile.read(tmp_path, KEYMAP).adapters
    for _ in range(500):
        data = flipped(rng, text.encode())
        whole = data if rng.random() < 0.5 else data[: rng.randrange(len(data) + 1)]
        (tmp_path / CONFIG).write_bytes(whole or b"[")
        try:
            assert LoraFile.read(tmp_path, KEYMAP).adapters
        except ValueError as error:
            assert WEIGHTS in str(error) or CONFIG in str(error)
