"""Blocks by name, their weights, and number vectors of the common schemas."""

import pytest

from lora_weave.lora_core.blocks import (
    SCHEMAS,
    BlockWeights,
    block_of,
    canonical,
    from_numbers,
    in_order,
    summary,
)
from lora_weave.lora_core.families import FAMILIES, family_key_map

PATHS = {
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": "IN04",
    "diffusion_model.middle_block.1.proj_in": "MID01",
    "diffusion_model.output_blocks.11.0.in_layers.2": "OUT11",
    "diffusion_model.time_embed.0": "BASE",
    "diffusion_model.out.2": "BASE",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1": "BASE",
    "diffusion_model.double_blocks.7.img_attn.qkv": "DOUBLE07",
    "diffusion_model.single_blocks.37.linear1": "SINGLE37",
    "diffusion_model.joint_blocks.3.x_block.attn.qkv": "JOINT03",
    "diffusion_model.layers.5.attention.qkv": "LAYER05",
    "diffusion_model.noise_refiner.1.attention.out": "NOISE01",
    "diffusion_model.transformer_blocks.59.attn.to_q": "BLOCK59",
    "diffusion_model.blocks.12.self_attn.q": "BLOCK12",
}


@pytest.mark.parametrize(("path", "block"), PATHS.items())
def test_block_of(path, block):
    assert block_of(path) == block


@pytest.mark.parametrize(
    ("written", "name"),
    [("in4", "IN04"), ("IN04", "IN04"), ("M00", "MID"), ("out", "OUT"), ("%default", "ALL")]
    + [("in1-4", "IN01-04"), ("single10-20", "SINGLE10-20"), ("Double7", "DOUBLE07")],
)
def test_spellings(written, name):
    assert canonical(written) == name


def test_the_most_exact_name_counts():
    weights = BlockWeights.parse("%default=1.5, in=0.1, in1-4=0.2, IN04=0.3, M00=0")
    found = {block: weights.of(block) for block in ("IN00", "IN03", "IN04", "MID01", "OUT02")}
    assert found == {"IN00": 0.1, "IN03": 0.2, "IN04": 0.3, "MID01": 0.0, "OUT02": 1.5}
    assert BlockWeights.parse({"IN04": 0.5}).of("OUT01") == 1.0


def test_paths():
    weights = BlockWeights.parse('{"IN04": 0.5, "OUT": 0.8, "BASE": 0}')
    found = [weights.for_path(path) for path in PATHS]
    assert found[:6] == [0.5, 1.0, 0.8, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("family", "count"),
    [(family, len(names)) for family, schemas in SCHEMAS.items() for names in schemas],
)
def test_number_vectors_become_names(family, count):
    numbers = [number / count for number in range(count)]
    names = from_numbers(numbers, family)
    assert list(names.values()) == numbers
    assert all(canonical(name) == name for name in names)
    text = "NAME:" + ",".join(map(str, numbers))
    assert BlockWeights.parse(text, family).weights == names


def test_the_schemas_are_those_of_the_issue():
    counts = {len(names) for schemas in SCHEMAS.values() for names in schemas}
    assert counts == {12, 17, 20, 21, 26, 27, 57, 58}


def test_known_places_of_known_vectors():
    """As in the presets of sd-webui-lora-block-weight: MIDD of 17 has IN08 before the middle."""
    seventeen = from_numbers([*range(17)], "SD1.5")
    assert [seventeen[name] for name in ("BASE", "IN01", "IN08", "MID", "OUT03", "OUT11")] == [
        *(0, 1, 6, 7, 8, 16)
    ]
    twelve = from_numbers([*range(12)], "SDXL")
    assert [twelve[name] for name in ("IN04", "IN08", "MID", "OUT00", "OUT05")] == [1, 4, 5, 6, 11]
    flux = from_numbers([*range(58)], "Flux")
    assert [flux[name] for name in ("DOUBLE00", "DOUBLE18", "SINGLE00", "SINGLE37")] == [
        *(1, 19, 20, 57)
    ]


def test_twenty_numbers_need_the_family():
    with pytest.raises(ValueError, match="mean other blocks in other families"):
        from_numbers([1.0] * 20)
    assert "IN00" in from_numbers([1.0] * 20, "SDXL")
    assert "DOUBLE00" in from_numbers([1.0] * 20, "Flux")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.0] * 13, "13 block weights; known numbers of them are SD1.5: 17 or 26 or 27"),
        ("1,x,3", "'x', which is not a number"),
        ({"IN" + "4" * 5000: 1}, "is no name"),
        ({"IN04": "a", "?": 1, "OUT": float("nan")}, "IN04 is 'a', not a number; '?' is no name"),
        ({"IN04": True}, "IN04 is True"),
        ('{"IN04": }', "not valid JSON"),
        (5, "block weights are 5"),
        ([*[1.0] * 16, float("nan")], "block weights hold nan"),
        ("[" * 100_000, "are not valid JSON"),
        ({"IN4": 0.5, "IN04": 0.6}, "IN04 is there twice"),
        ({"IN04": 10**400}, "not a number"),
        ("IN04=x", "IN04 is 'x'"),
        ("IN04:x", "IN04 is 'x'"),
        ("IN04:0.5, OUT", "'OUT', which is not a number"),
        ("IN04:0.5, OUT=", "OUT is ''"),
        ("NAME:1,x,3", "'x', which is not a number"),
    ],
)
def test_what_can_not_be_read(value, said):
    with pytest.raises(ValueError) as error:
        BlockWeights.parse(value)
    assert said in str(error.value)


@pytest.mark.parametrize("nothing", [None, "", "  ", {}, [], "{}", "[]", " [ ] ", ","])
def test_nothing_said_is_none(nothing):
    assert BlockWeights.parse(nothing) is None


@pytest.mark.parametrize(
    "text",
    ["IN04:0.5, OUT:0.8", "in4 = .5; OUT: 0.8", "IN04=0.5\nOUT=0.8", "SD-OUT:IN04=0.5, OUT=0.8"],
)
def test_names_and_weights_as_people_write_them(text):
    assert BlockWeights.parse(text).weights == {"IN04": 0.5, "OUT": 0.8}


def test_one_name_and_weight():
    assert BlockWeights.parse("IN04:0.5").weights == {"IN04": 0.5}
    assert BlockWeights.parse("IN04=0.5").weights == {"IN04": 0.5}


def test_names_that_the_model_lacks():
    blocks = ["BASE", *(f"IN{n:02}" for n in range(12)), "MID00"]
    weights = BlockWeights.parse({"IN04": 1, "OUT": 1, "IN14": 1, "ALL": 1, "MID": 1, "IN20-22": 0})
    assert weights.check(blocks) == [
        f"there is no block {name}; the model has BASE, IN00 to IN11, MID00"
        for name in ("OUT", "IN14", "IN20-22")
    ]
    assert summary(["OUT00"]) == "OUT00"


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_a_family_are_in_order(family):
    """Each kind together, from 00 on without a gap."""
    found = in_order(map(block_of, family_key_map(family).layers))
    kinds: dict[str, list[str]] = {}
    for block in found:
        kinds.setdefault(block.rstrip("0123456789"), []).append(block)
    assert [block for of_kind in kinds.values() for block in of_kind] == list(found)
    for kind, of_kind in kinds.items():
        numbers = [f"{kind}{number:02}" for number in range(len(of_kind))]
        assert of_kind == ([kind] if kind == "BASE" else numbers)
