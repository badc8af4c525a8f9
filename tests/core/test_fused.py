"""Pieces of fused layers: joined to exactly the change that they make together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS, BIASES, Adapter
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.dora import Decomposable
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.adapters.pieces import Pieces
from lora_weave.lora_core.fused import Piece, cut, joined, piece_shape, swapped
from lora_weave.lora_core.lora_file import KeyMap, LayerKey, LoraFile, LoraFileError
from lora_weave.lora_core.lora_model import LoraModel

from .layer_kinds import cases, fill

Close = Callable[..., None]
SHAPE = (20, 6)
ROWS = {"q": (0, 0, 8), "k": (0, 8, 4), "v": (0, 12, 8)}
BASE = "diffusion_model.double_blocks.0.img_attn."
NAMES = {word: f"transformer.transformer_blocks.0.attn.to_{word}" for word in ROWS}
LAYER = LayerKey(
    BASE + "qkv",
    SHAPE,
    "lora_unet_double_blocks_0_img_attn_qkv",
    slices={NAMES[word]: rows for word, rows in ROWS.items()},
    diffusers=tuple(NAMES.values()),
)
SWAPPED = LayerKey(
    "diffusion_model.final", (8, 6), "lora_unet_final", swapped=("transformer.norm_out.linear",)
)
KEYMAP = KeyMap("Flux", {layer.path: layer for layer in (LAYER, SWAPPED)})


def piece(kind: str, word: str, *, alpha: float = 3.0, rank: int = 2, seed: int = 0) -> Piece:
    """A piece of a type, all of its factors random."""
    shape = piece_shape(SHAPE, ROWS[word])
    generator = torch.Generator().manual_seed(seed + ord(word))
    adapter = ADAPTERS[kind].create(
        shape, rank, alpha, options=CreateOptions(), generator=generator
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return Piece(adapter, ROWS[word])


def delta(adapter: Adapter, weight: Tensor | None = None) -> Tensor:
    weight = torch.zeros(adapter.shape) if weight is None else weight
    return copy.deepcopy(adapter).double().delta(weight.double()).detach()


def dense(pieces: list[Piece], shape: tuple[int, ...] = SHAPE) -> Tensor:
    exact = torch.zeros(shape, dtype=torch.float64)
    for one in pieces:
        exact[one.place] = delta(one.adapter)
    return exact


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("words", ["qkv", "vq", "k"])
def test_pieces_are_the_dense_change(kind: str, words: str) -> None:
    pieces = [piece(kind, word, alpha=1.0 + n, rank=1 + n) for n, word in enumerate(words)]
    whole = joined(pieces, SHAPE)
    assert tuple(whole.shape) == SHAPE
    torch.testing.assert_close(delta(whole), dense(pieces), rtol=1e-5, atol=1e-6)
    missing = [n for word in set("qkv") - set(words) for n in range(*_range(word))]
    assert not delta(whole)[missing].any()


def _range(word: str) -> tuple[int, int]:
    _, start, length = ROWS[word]
    return start, start + length


def test_types_may_be_mixed() -> None:
    pieces = [piece("lora", "q"), piece("loha", "k"), piece("lokr", "v")]
    torch.testing.assert_close(delta(joined(pieces, SHAPE)), dense(pieces), rtol=1e-5, atol=1e-6)


def test_a_stacked_lora_has_the_sum_of_the_ranks_and_a_scale_of_1() -> None:
    whole = joined([piece("lora", "q", rank=3), piece("lora", "v", rank=2)], SHAPE)
    assert isinstance(whole, LoRA)
    assert (whole.rank, whole.alpha, whole.scale) == (5, 5.0, 1.0)


def test_pieces_of_convolutions() -> None:
    shape = (6, 3, 3, 3)
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for start in (0, 4):
        lora = ADAPTERS["lora"].create((2, 3, 3, 3), 2, 1.0, generator=generator)
        lora.up.data.normal_(generator=generator)
        pieces.append(Piece(lora, (0, start, 2)))
    whole = joined(pieces, shape)
    assert whole.down.shape == (4, 3, 3, 3) and whole.up.shape == (6, 4, 1, 1)
    torch.testing.assert_close(delta(whole), dense(pieces, shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_lora_that_was_cut_comes_back_bit_for_bit(magnitude: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lora = ADAPTERS["lora"].create(SHAPE, 3, 0.7, generator=generator)
    lora.up.data.normal_(generator=generator)
    if magnitude:
        lora.magnitude = torch.nn.Parameter(torch.rand(SHAPE[0], 1, generator=generator))
    pieces = cut(lora, ROWS)
    again = joined([Piece(pieces[word], rows) for word, rows in ROWS.items()], SHAPE)
    assert again.tensors().keys() == lora.tensors().keys()
    assert all(torch.equal(again.tensors()[n], t) for n, t in lora.tensors().items())


# Rows after which every case below can be cut: a multiple of OFT's blocks and of LoKr's second one.
CUT = {"q": (0, 0, 12), "v": (0, 12, 12)}
UNCUT = ("boft", "constrained")  # rotations of all rows together
FORMS = [name for name in cases() if not any(word in name for word in UNCUT)]


def whole_adapter(name: str, shape: tuple[int, ...]) -> Adapter:
    """One of `cases`, every factor random, for a layer of `shape`."""
    case, generator = cases()[name], torch.Generator().manual_seed(0)
    adapter = case.type.create(shape, 4, 0.75, options=case.options, generator=generator)
    if case.decomposed:
        assert isinstance(adapter, Decomposable)
        adapter.decompose(torch.randn(shape, generator=generator))
    fill(adapter, generator)
    return adapter


@pytest.mark.parametrize("shape", [(24, 6), (24, 6, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("name", FORMS)
def test_every_type_that_can_be_cut_is_cut_and_joined_bit_for_bit(
    name: str, shape: tuple[int, ...], assert_close: Close
) -> None:
    adapter = whole_adapter(name, shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pieces = [Piece(part, CUT[word]) for word, part in cut(adapter, CUT).items()]
    assert all(type(one.adapter) is type(adapter) for one in pieces)
    again = joined(pieces[::-1], shape)
    assert type(again) is type(adapter)
    assert again.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(again.tensors()[n], t) for n, t in adapter.tensors().items())
    for one in pieces:
        part = delta(one.adapter, weight[one.place])
        assert_close(part, delta(adapter, weight)[one.place], torch.float32)


@pytest.mark.parametrize("name", FORMS)
def test_rows_that_no_piece_has_stay(name: str, assert_close: Close) -> None:
    """As pieces where zeros in the type's tensors would change a row."""
    adapter, weight = whole_adapter(name, (24, 6)), torch.randn(24, 6)
    pieces = [Piece(part, CUT[word]) for word, part in cut(adapter, CUT).items() if word == "v"]
    whole = joined(pieces, (24, 6))
    assert isinstance(whole, Pieces) == adapter.needs_all_rows
    expected = delta(adapter, weight)
    expected[:12] = 0.0
    assert_close(delta(whole, weight), expected, torch.float32)


@pytest.mark.parametrize("name", [name for name in cases() if name not in FORMS])
def test_rotations_of_all_rows_can_not_be_cut(name: str) -> None:
    with pytest.raises(ValueError, match="can't be cut into rows"):
        cut(whole_adapter(name, (24, 6)), CUT)


def test_where_blocks_are_cut() -> None:
    with pytest.raises(ValueError, match="after every 4 rows only, not into rows 0 to 6"):
        cut(whole_adapter("oft", (24, 6)), {"q": (0, 0, 6)})
    lora = whole_adapter("lora", (24, 6))
    lora.magnitude = torch.nn.Parameter(torch.ones(1, 6))
    with pytest.raises(ValueError, match="this DoRA of columns can't be cut into rows"):
        cut(lora, CUT)


def test_magnitudes_of_all_rows_are_joined() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    pieces = [piece("lora", word, seed=1) for word in ROWS]
    exact = torch.zeros(SHAPE, dtype=torch.float64)
    for one in pieces:
        one.adapter.magnitude = torch.nn.Parameter(torch.rand(one.rows[2], 1, generator=generator))
    whole = joined(pieces, SHAPE)
    for one in pieces:
        exact[one.place] = delta(one.adapter, weight[one.place])
    torch.testing.assert_close(delta(whole, weight), exact, rtol=1e-5, atol=1e-6)


def magnitudes(pieces: list[Piece], axes: tuple[int | None, ...]) -> None:
    """Make DoRAs of the pieces, along the axes given."""
    for one, axis in zip(pieces, axes, strict=True):
        if axis is not None:
            size = (one.rows[2], 1) if axis == 0 else (1, SHAPE[1])
            seed = torch.Generator().manual_seed(one.rows[1])
            one.adapter.magnitude = torch.nn.Parameter(torch.rand(size, generator=seed) + 0.5)


@pytest.mark.parametrize(
    "words, axes",
    [("qk", (0, 0)), ("qkv", (0, None, 0)), ("qkv", (1, 1, 1)), ("v", (1,)), ("qkv", (0, 1, None))],
    ids=["not all rows", "a row without", "of columns", "one of columns", "mixed"],
)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_magnitudes_of_some_rows_or_of_columns_stay_with_their_rows(
    kind: str, words: str, axes: tuple[int | None, ...], assert_close: Close
) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    pieces = [piece(kind, word) for word in words]
    magnitudes(pieces, axes)
    whole = joined(pieces, SHAPE)
    assert isinstance(whole, Pieces)
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for one in pieces:
        expected[one.place] = delta(one.adapter, weight[one.place])
    assert_close(delta(whole, weight), expected, torch.float32)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_pieces_hold_no_more_numbers_than_the_file(kind: str) -> None:
    pieces = [piece(kind, word) for word in "qkv"]
    whole = joined(pieces, SHAPE)
    numbers = [
        sum(p.numel() for p in one.parameters()) for one in (*(p.adapter for p in pieces), whole)
    ]
    assert numbers[-1] == sum(numbers[:-1])


def test_pieces_of_a_bias_are_changes_of_one_kind() -> None:
    rows = {"q": (0, 0, 8), "k": (0, 8, 4)}
    pieces = [
        Piece(BIASES[kind].create((r[2],), 1, 1.0), r)
        for kind, r in zip(BIASES, rows.values(), strict=True)
    ]
    with pytest.raises(ValueError, match=r"in several ways \(bias, bias gain\)"):
        joined(pieces, SHAPE[:1])


def test_pieces_are_taken_apart_by_their_rows_alone() -> None:
    pieces = [piece("loha", word) for word in "qk"]
    found = cut(joined(pieces, SHAPE), ROWS)
    assert found == {"q": pieces[0].adapter, "k": pieces[1].adapter}
    with pytest.raises(ValueError, match="changes of the rows 0 to 8 are of none of them"):
        cut(joined(pieces, SHAPE), {"k": ROWS["k"]})


def test_rows_that_are_there_twice() -> None:
    pieces = [piece("lora", "q"), Piece(piece("lora", "k").adapter, (0, 6, 4))]
    with pytest.raises(ValueError, match="rows 6 to 8 are there twice"):
        joined(pieces, SHAPE)
    with pytest.raises(ValueError, match="axis 1; only rows"):
        piece_shape(SHAPE, (1, 0, 2))


@pytest.mark.parametrize("name", FORMS)
def test_swapped_halves(name: str, assert_close: Close) -> None:
    adapter, weight = whole_adapter(name, (24, 6)), torch.randn(24, 6)
    turned = swapped(adapter)
    assert type(turned) is type(adapter)
    expected = _halves(delta(adapter, _halves(weight)))
    assert_close(delta(turned, weight), expected, torch.float32)


def test_swapped_halves_of_a_block() -> None:
    """A LoKr whose w1 has an odd number of rows is swapped as a LoRA."""
    tensors = {"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(2, 3)}
    adapter = ADAPTERS["lokr"].from_tensors(tensors, (6, 6))
    torch.testing.assert_close(delta(swapped(adapter)), _halves(delta(adapter)))


def _halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def file_of(words: str = "qkv") -> dict[str, Tensor]:
    tensors = {}
    for n, word in enumerate(words):
        lora = piece("lora", word, alpha=0.5 + n, seed=2).adapter
        tensors[f"{NAMES[word]}.lora_A.weight"] = lora.down.detach()
        tensors[f"{NAMES[word]}.lora_B.weight"] = lora.up.detach()
        tensors[f"{NAMES[word]}.alpha"] = torch.tensor(0.5 + n)
    return tensors


def test_a_file_with_split_names_is_read_and_written_whole() -> None:
    lora = LoraFile.from_state_dict(file_of("qk"), KEYMAP)
    pieces = [piece("lora", word, alpha=0.5 + n, seed=2) for n, word in enumerate("qk")]
    found = lora.adapters[LAYER.path]
    torch.testing.assert_close(delta(found), dense(pieces), rtol=1e-5, atol=1e-6)
    named = lora.to_kohya(KEYMAP)
    assert named.keys() == {
        f"{LAYER.kohya}.{n}" for n in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    again = LoraFile.from_state_dict(named, KEYMAP)
    assert all(torch.equal(t, again.to_kohya(KEYMAP)[n]) for n, t in named.items())


def split(kind: str, words: str = "qkv") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A file with a type on the rows of `words`, the layer's W, and ΔW in float64."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    tensors, exact = {}, torch.zeros(SHAPE, dtype=torch.float64)
    pieces = [piece(kind.split("+")[0], word) for word in words]
    if "+" in kind:
        magnitudes(pieces, (int(kind[-1]),) * len(words))
    for word, one in zip(words, pieces, strict=True):
        tensors |= {f"{NAMES[word]}.{name}": t for name, t in one.adapter.tensors().items()}
        exact[one.place] = delta(one.adapter, weight[one.place])
    return tensors, weight, exact


SPLIT = [("loha", "qkv"), ("lokr", "qk"), ("lora+0", "qk"), ("lora+1", "qkv"), ("lokr+0", "v")]


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("kind, words", SPLIT)
def test_pieces_are_written_under_the_names_of_their_rows(
    kind: str, words: str, format: str, tmp_path: Path, assert_close: Close
) -> None:
    tensors, weight, exact = split(kind, words)
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    assert isinstance(lora.adapters[LAYER.path], Pieces)
    path = tmp_path / "x.safetensors"
    if format == "diffusers" and kind == "lora+1":
        with pytest.raises(LoraFileError, match="DoRA is of the weight's columns, which PEFT"):
            lora.save(path, KEYMAP, format=format)
        return
    carried = LoraModel.from_file(lora, KEYMAP)
    for saved in (lora, carried.to_file()):
        saved.save(path, KEYMAP, format=format)
        again = LoraFile.read(path, KEYMAP).adapters[LAYER.path]
        assert isinstance(again, Pieces)
        assert_close(delta(again, weight), exact, torch.float32)
        if format != "diffusers":
            named = again.tensors()
            assert all(
                torch.equal(t, named[n]) for n, t in lora.adapters[LAYER.path].tensors().items()
            )
    carried.save(path, format=format)
    assert_close(
        delta(LoraFile.read(path, KEYMAP).adapters[LAYER.path], weight), exact, torch.float32
    )
    assert carried.keys() == lora.to_kohya(KEYMAP).keys() == tensors.keys()


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers"])
def test_the_bias_of_pieces_is_written_beside_them(
    format: str, tmp_path: Path, assert_close: Close
) -> None:
    tensors, weight, exact = split("lokr", "qk")
    change = torch.zeros(SHAPE[0])
    for word in "qv":  # of v the bias alone
        change[slice(*_range(word))] = torch.arange(8.0) - 3.0
        tensors[f"{NAMES[word]}.diff_b"] = torch.arange(8.0) - 3.0
    keymap = replace(KEYMAP, biases=frozenset({LAYER.path}))
    path = tmp_path / "x.safetensors"
    LoraFile.from_state_dict(tensors, keymap).save(path, keymap, format=format)
    again = LoraFile.read(path, keymap).adapters
    assert_close(delta(again[LAYER.path], weight), exact, torch.float32)
    assert torch.equal(again[f"{LAYER.path}.bias"].delta(change), change)
    tensors[f"{LAYER.kohya}.diff_b"] = change
    with pytest.raises(LoraFileError, match=rf"bias is there twice: {NAMES['q']}, {LAYER.kohya}"):
        LoraFile.from_state_dict(tensors, keymap)


def test_the_metadata_of_pieces_is_that_of_their_types(tmp_path: Path) -> None:
    least = LoraFile.from_state_dict(split("loha")[0], KEYMAP).least_metadata("Flux", "x")
    assert (least["ss_network_dim"], least["ss_network_alpha"]) == ("2", "3.0")
    assert "loha" in least["ss_network_args"]


def test_pieces_without_names_of_their_rows_are_told() -> None:
    lora = LoraFile(LoraFile.from_state_dict(split("loha", "qk")[0], KEYMAP).adapters)
    bare = KeyMap("Flux", {LAYER.path: replace(LAYER, slices={}, diffusers=())})
    for write in (lora.to_generic, lambda: lora.to_kohya(bare)):
        with pytest.raises(LoraFileError) as caught:
            write()
        assert len(caught.value.problems) == 2
        assert f"{LAYER.path}: the loha of the rows 8 to 12 can be written" in str(caught.value)
    assert lora.to_generic(KEYMAP).keys() == split("loha", "qk")[0].keys()


def test_pieces_whose_numbers_multiply_beyond_float32_are_refused() -> None:
    tensors = split("loha")[0]
    tensors[f"{NAMES['k']}.hada_w1_a"] *= 1e30
    tensors[f"{NAMES['k']}.hada_w2_a"] *= 1e30
    with pytest.raises(LoraFileError, match="numbers are too large for float32"):
        LoraFile.from_state_dict(tensors, KEYMAP)


def test_diffusers_has_some_fused_layers_whole() -> None:
    whole = KeyMap("Flux", {LAYER.path: replace(LAYER, diffusers=("transformer.whole",))})
    lora = LoraFile.from_state_dict(split("loha")[0], whole)
    with pytest.raises(LoraFileError, match="diffusers has it whole, but here some rows have"):
        lora.to_format(whole, "diffusers")


def test_problems_of_pieces_are_told_and_the_others_loaded_without_strict() -> None:
    tensors = file_of()
    tensors[f"{NAMES['k']}.lora_B.weight"] = torch.zeros(5, 2)
    tensors[f"{LAYER.path}.lora_A.weight"] = torch.zeros(1, 6)
    tensors[f"{LAYER.path}.lora_B.weight"] = torch.zeros(20, 1)
    with pytest.raises(LoraFileError) as caught:
        LoraFile.from_state_dict(tensors, KEYMAP)
    text = str(caught.value)
    assert f"{LAYER.path} ({NAMES['k']}): lora_up.weight is (5, 2), expected (4, 2)" in text
    assert f"{LAYER.path} is there twice: {NAMES['q']}, {LAYER.path}" in text
    lora = LoraFile.from_state_dict(tensors, KEYMAP, strict=False)
    assert len(lora.problems) == 2
    assert not delta(lora.adapters[LAYER.path])[8:12].any()
    assert delta(lora.adapters[LAYER.path])[:8].any()


def test_swapped_names_in_a_file() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator)
    name = SWAPPED.swapped[0]
    lora = LoraFile.from_state_dict({f"{name}.lora_A": down, f"{name}.lora_B": up}, KEYMAP)
    exact = torch.cat([up[4:], up[:4]]).double() @ down.double()
    torch.testing.assert_close(delta(lora.adapters[SWAPPED.path]), exact)
