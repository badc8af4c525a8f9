"""Rows of a stack in the JSON of our node and of others."""

import json

import pytest

from lora_weave.lora_core.stack_rows import Row, parse_rows

OURS = {
    "v": 1,
    "rows": [
        {"on": True, "name": "a.safetensors", "model": 0.8},
        {"on": False, "name": "b/c.safetensors", "model": 1, "clip": 0.5, "blocks": {"IN": 0.5}},
        {
            "name": "d.safetensors",
            "model": -1.5,
            "schedule": "0:0, 1:1",
            "note": "not read",
        },
    ],
}


def test_string_object_and_wrapped_value_are_the_same():
    rows = parse_rows(OURS)
    assert rows == parse_rows(json.dumps(OURS)) == parse_rows({"__value__": OURS["rows"]})
    assert [(row.name, row.model, row.clip, row.on) for row in rows] == [
        ("a.safetensors", 0.8, 0.8, True),
        ("b/c.safetensors", 1.0, 0.5, False),
        ("d.safetensors", -1.5, -1.5, True),
    ]
    assert rows[1].block_weights().of("IN03") == 0.5
    assert rows[2].schedule.at(0.5) == 0.5
    assert rows[2].label == "row 3 (d.safetensors)"


@pytest.mark.parametrize(
    "row",
    [
        {"lora_name": "a", "strength": 0.6, "enabled": False},  # core's LoadLoraModel
        {"lora_name": "a", "strength_model": 0.6, "strength_clip": 0.6, "on": False},
        {"on": False, "lora": "a", "strength": 0.6, "strengthTwo": None},  # rgthree
        {"name": "a", "strength": "0.6", "clipStrength": "0.6", "active": False},  # Lora Manager
    ],
)
def test_spellings_of_other_packs(row):
    assert parse_rows({"rows": [row]}) == [Row(0, "a", 0.6, 0.6, False)]


def test_rgthree_s_inputs_as_they_are():
    given = {
        "lora_1": {"on": True, "lora": "a", "strength": 1.0, "strengthTwo": 0.5},
        "lora_2": {"on": True, "lora": "b", "strength": 0.5},
    }
    assert [(row.name, row.model, row.clip) for row in parse_rows(given)] == [
        ("a", 1.0, 0.5),
        ("b", 0.5, 0.5),
    ]


def test_core_s_inputs_as_they_are():
    """Of LoadLoraModel, as the node's list and as the flat keys of a prompt, in their order."""
    rows = [
        {"lora_name": f"{n}.safetensors", "strength": n / 10, "enabled": n != 3} for n in range(12)
    ]
    flat = {f"loras.{n}.{key}": value for n, row in enumerate(rows) for key, value in row.items()}
    others = {"model": ["4", 0], "loras": 12}
    found = parse_rows({"rows": rows})
    assert found[3] == Row(3, "3.safetensors", 0.3, 0.3, False)
    assert found == parse_rows({"loras": rows}) == parse_rows({**others, **flat})
    assert found == parse_rows(dict(reversed(flat.items()))) == parse_rows(json.dumps(flat))
    assert parse_rows({"loras": []}) == []


@pytest.mark.parametrize("name", ["None", " None "])
def test_rows_called_none_are_off(name):
    (row,) = parse_rows([{"on": True, "lora": name, "strength": 0.5}])
    assert not row.on


@pytest.mark.parametrize("empty", ["", "  ", "[]", '{"rows": []}', {"v": 1, "rows": []}])
def test_no_rows(empty):
    assert parse_rows(empty) == []


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ("IN04=x", "IN04 is 'x', not a number"),
        ([1, 2, 3], "3 block weights; known numbers of them are SD1.5: 17 or 26 or 27"),
        ("1,2,3", "3 block weights; known numbers"),
        ('{"IN04": }', "not valid JSON"),
        ([*[1] * 16, "x"], "hold 'x'"),
        (True, "block weights are True"),
    ],
)
def test_block_weights_that_can_not_be_read_name_the_row(blocks, said):
    rows = [{"name": "a"}, {"name": "b", "blocks": blocks}]
    with pytest.raises(ValueError) as error:
        parse_rows(rows)
    assert str(error.value).startswith("row 2: ") and said in str(error.value)


@pytest.mark.parametrize("blocks", [[1.0] * 20, "NAME:" + ",".join(["1"] * 20), [0.5] * 17])
def test_numbers_of_a_known_count_are_read_with_the_file(blocks):
    """20 mean blocks of SDXL or of Flux: only the LoRA tells which."""
    (row,) = parse_rows([{"name": "a", "blocks": blocks}])
    assert row.blocks == blocks


@pytest.mark.parametrize("blocks", [None, "", "  ", {}, [], "[]", "{ }", " [ ] "])
def test_blocks_that_say_nothing_are_none(blocks):
    """As on the page."""
    assert parse_rows([{"name": "a", "blocks": blocks}]) == [Row(0, "a")]


def test_everything_wrong_is_said_by_row():
    rows = [
        *({"name": 5}, "text", {"name": "a", "model": "much"}, {"name": "a", "on": "yes"}),
        *({"name": "a", "schedule": "1"}, {"name": "a", "blocks": {"IN": "x"}}, {"name": "good"}),
    ]
    with pytest.raises(ValueError) as error:
        parse_rows({"rows": rows})
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"row {n}" for n in range(1, 7)]
    for part, line in zip(
        ("not text", "expected an object", "'much'", "neither", "no point", "IN is 'x'"),
        lines,
        strict=True,
    ):
        assert part in line


@pytest.mark.parametrize(
    ("value", "said"),
    [("{", "not valid JSON"), (5, "rows are 5"), ({}, '"rows"'), ({"loras": "a"}, '"rows"')],
)
def test_no_list(value, said):
    with pytest.raises(ValueError, match=said):
        parse_rows(value)
