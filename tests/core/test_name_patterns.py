"""Patterns of module names: as Python's `re` matches them, in a time that nobody can stretch."""

from __future__ import annotations

import random
import re
import time

import pytest

from lora_weave.lora_core.name_patterns import (
    MAX_LENGTH,
    PatternTable,
    literal_names,
    whole_names,
)
from lora_weave.lora_core.safetensors_file import MAX_NAME

PARTS = ("a", "b", r"\.", ".", "1", r"\d", r"\w", "[ab]", "[^.]", "[a-b1]", "^", "$")
QUANTIFIERS = ("", "", "", "*", "+", "?", "*?", "{2}", "{1,}", "{0,2}")


def some_pattern(rng: random.Random, depth: int = 2) -> str:
    """A pattern of all that is known, of random parts."""
    text = ""
    for _ in range(rng.randrange(1, 5)):
        if depth and rng.random() < 0.3:
            branches = [some_pattern(rng, depth - 1) for _ in range(rng.choice((1, 2, 3)))]
            start, end = rng.choice(("(", "(?:")), rng.choice((")", ")", ")?"))
            text += start + "|".join(branches) + end
        else:
            part = rng.choice(PARTS)
            text += part if part in "^$" else part + rng.choice(QUANTIFIERS)
    return text


def some_name(rng: random.Random) -> str:
    return "".join(rng.choice("ab.1") for _ in range(rng.randrange(9)))


def value(pattern: str, name: str) -> float:
    table = PatternTable({pattern: 1.0})
    assert not table.problems, pattern
    return table.get(name, 0.0)


def test_patterns_match_what_re_matches() -> None:
    """Whole names, and those that end with a match behind a dot."""
    rng = random.Random(0)
    fitting = 0
    for _ in range(4000):
        pattern = some_pattern(rng)
        names = literal_names(pattern)  # in which a "." stands for itself
        exact = pattern if names is None else "|".join(map(re.escape, names))
        for name in (some_name(rng) for _ in range(6)):
            whole = re.fullmatch(exact, name) is not None
            assert whole_names(pattern)(name) == whole, (pattern, name)
            behind = re.match(rf"(.*\.)?({exact})$", name) is not None
            assert value(pattern, name) == behind, (pattern, name)
            fitting += behind
    assert fitting > 2000


@pytest.mark.parametrize(
    "pattern, name, other",
    [
        (
            r"down_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.0\.attn1\.to_q",
            "down_blocks.1.attentions.10.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.10.transformer_blocks.1.attn1.to_q",
        ),
        (".*attn1.*to_q", "blocks.3.attn1.to_q", "blocks.3.attn2.to_q"),
        (
            r"^blocks\.(0|1[0-9])\..*(q|k|v)_proj$",
            "blocks.17.attn.k_proj",
            "x.blocks.17.attn.k_proj",
        ),
        ("attn.to_q", "blocks.0.attn.to_q", "blocks.0.xattn.to_q"),
        (r"a\.to_out\.0|b\.fc1", "x.b.fc1", "x.b.fc2"),
        ("(?:img|txt)_mod", "blocks.1.txt_mod", "blocks.1.mod"),
    ],
)
def test_usual_patterns(pattern: str, name: str, other: str) -> None:
    assert (value(pattern, name), value(pattern, other)) == (1.0, 0.0)


def test_the_first_pattern_counts() -> None:
    tables = [
        {"to_q": 1.0, "blocks.0.to_q": 2.0, ".*to_q": 3.0},
        {".*to_q": 3.0, "to_q": 1.0, "blocks.0.to_q": 2.0},
        {"to_k": 4.0, "blocks.0.to_q": 2.0, "to_q": 1.0},
        {"to_k": 4.0, "b": 5.0},
    ]
    assert [PatternTable(it).get("blocks.0.to_q", 0.0) for it in tables] == [1.0, 3.0, 2.0, 0.0]


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a|b)*", "(a*)*b", "((a)?b){2}", "a**", "a*+", "*a", "a{3,1}", "a{999}", "{"),
        *("(", "a)", "(a", "[", "[]", "[b-a]", "[a--b]", "\\", r"(a)\1", r"a\b", "(?=a)b", "(?i)a"),
        *("(?P<n>a)", "(" * 9 + "a" + ")" * 9, "a*" * 2001),
    ],
)
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="^the pattern .* is too complex"):
        whole_names(pattern)
    (problem,) = PatternTable({pattern: 1.0}).problems[:1]
    assert "is too complex" in problem


@pytest.mark.filterwarnings("error")
def test_any_text_is_matched_or_refused() -> None:
    rng = random.Random(1)
    for _ in range(20_000):
        pattern = "".join(rng.choice("ab.\\[]{}()|*+?^$-,12d&~") for _ in range(rng.randrange(12)))
        for problem in PatternTable({pattern: 1.0}).problems:
            assert "is too complex" in problem


HOSTILE = (".*", ".*x", "a?", "a*", "[^b]+", "(a|aa)?", r"\w+\.?", "a{9}", "a{0,9}", "(a*|b*)?")


@pytest.mark.parametrize("part", HOSTILE)
def test_no_pattern_takes_long(part: str) -> None:
    """The longest table on the longest names: about 1 ms each, without backtracking."""
    pattern = part * ((MAX_LENGTH - 1) // len(part)) + "!"
    table = PatternTable({pattern: 1.0})
    assert not table.problems
    started = time.perf_counter()
    for name in ("a" * MAX_NAME, "a." * (MAX_NAME // 2), "ab" * (MAX_NAME // 2)):
        assert table.get(name, 0.0) == 0.0
    assert time.perf_counter() - started < 1


def test_a_table_has_only_so_many_wildcards() -> None:
    table = PatternTable({f"{index}.*": 1.0 for index in range(2000)})
    (problem,) = table.problems
    assert problem == "its patterns with wildcards have 10890 characters; 4000 are the most"
    assert not PatternTable({f"blocks.{index}.to_q": 1.0 for index in range(50_000)}).problems
