"""Values of a sweep."""

import pytest

from lora_weave.lora_core.sweep import MAX_VALUES, parse_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..1 | 5", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("1..-1|3", [1.0, 0.0, -1.0]),
        ("0..1 : 0.25", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("0 .. 1 : 0.4", [0.0, 0.4, 0.8]),
        ("1..0 : 0.5", [1.0, 0.5, 0.0]),
        ("0.5..0.5 : 1", [0.5]),
        ("-1, .5\n2e0,", [-1.0, 0.5, 2.0]),
        ("0, 0.5..1 | 3", [0.0, 0.5, 0.75, 1.0]),
    ],
)
def test_values(text, values):
    assert parse_values(text) == pytest.approx(values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no value"),
        ("a, 1..2, 0.5", "'a' is no number and no range; '1..2' is no number"),
        ("0..1 | 1", "asks for 1 values"),
        ("0..1 | 2.5", "asks for 2.5 values"),
        ("0..1 : 0", "which is not above 0"),
        (f"0..{MAX_VALUES + 1} : 1", "1000 are the most"),
        ("0..1 | 600, 0..1 | 600", "there are 1200 values"),
        ("nan", "'nan' is no number"),
        ("1e999", "1e999 is too large"),
        ("0..1 : 1e-320", "1000 are the most"),
    ],
)
def test_what_is_no_value(text, said):
    with pytest.raises(ValueError) as error:
        parse_values(text)
    assert said in str(error.value)
