"""BOFT: how it cuts, what its stages reach. The rest is in test_oft.py."""

from __future__ import annotations

import math

import pytest
import torch

from lora_weave.lora_core.adapters.boft import BOFT

from .test_oft import make


@pytest.mark.parametrize(
    ("out", "rank", "blocks"),
    [
        *((320, 16, (6, 32, 10)), (320, 20, (5, 16, 20)), (320, 9, (6, 32, 10))),
        *((1280, 8, (8, 128, 10)), (8, 2, (3, 4, 2)), (8, 3, (3, 4, 2)), (8, 99, (1, 1, 8))),
        *((10, 4, (1, 1, 10)), (15, 4, (1, 5, 3)), (13, 4, (1, 1, 13))),
    ],
)
def test_bofts_stages_and_blocks(out: int, rank: int, blocks: tuple[int, int, int]) -> None:
    adapter = BOFT.create((out, 6), rank, 1.0)
    assert adapter.tensors()["oft_blocks"].shape == (*blocks, blocks[2])
    assert adapter.rank == blocks[2]


@pytest.mark.parametrize("out", [8, 20, 96, 320])
@pytest.mark.parametrize("rank", [2, 4, 10, 12, 40])
def test_boft_cuts_as_lycoris_where_lycoris_can(out: int, rank: int) -> None:
    from lycoris.functional import power2factorization

    size, count = power2factorization(out, rank)
    if count:
        stages = int(math.log2(count)) + 1
        shape = BOFT.create((out, 6), rank, 1.0).tensors()["oft_blocks"].shape
        assert shape == (stages, count, size, size)


@pytest.mark.parametrize("out", [8, 12, 32])
def test_a_whole_butterfly_mixes_all_outputs(out: int) -> None:
    """And one stage less does not."""
    adapter = make("boft", (out, 6), rank=4).double()
    eye = torch.eye(out, dtype=torch.float64)
    assert (eye + adapter.delta(eye)).abs().min() > 0
    tensors = adapter.tensors()
    tensors["oft_blocks"] = tensors["oft_blocks"][:-1]
    if len(tensors["oft_blocks"]):
        less = BOFT.from_tensors(tensors, (out, out))
        assert (eye + less.delta(eye)).abs().min() == 0


@pytest.mark.parametrize(
    "blocks", [(2, 3, 4, 4), (4, 3, 4), (1, 2, 2, 4), (1, 4, 3, 3), (0, 3, 4, 4), (3,), (3, 4, 5)]
)
def test_blocks_that_are_no_butterfly_are_refused(blocks: tuple[int, ...]) -> None:
    """Of 12 outputs: 3 blocks can't be paired, odd ones have no half."""
    with pytest.raises(ValueError, match="oft_blocks is"):
        BOFT.from_tensors({"oft_blocks": torch.zeros(blocks)}, (12, 6))
