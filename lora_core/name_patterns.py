"""Regular expressions of module names, as PEFT's settings have them, matched without backtracking.

They come from files that anyone may have made, and Python's `re` takes for ever with some. Here
all places that a match can have come to are kept at once, as bits: bit p of a number stands for
the place before character p. A part of a pattern makes the places behind it of those before it, so
that a name takes as many steps as the pattern has parts, whatever they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

MAX_LENGTH = 4000  # characters of all of a table's patterns that are more than names
MAX_DEPTH = 8  # of groups in each other

# A name without wildcards; "." stands for itself in it, as it is meant.
_LITERAL = re.compile(r"(?:[^\\^$*+?{}\[\]()|]|\\[^a-zA-Z0-9])*")
_CLASS = re.compile(r"\[\^?(?:[\w.,:/]|-(?!-)|\\[dDwWsS.\\-])+\]|\\[dDwWsS]|\.")
_COUNT = re.compile(r"\{([0-9])(,?)([0-9]?)\}")
_COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Name:
    """A name and the places of its characters."""

    def __init__(self, text: str) -> None:
        self.end = 1 << len(text)
        self.where: dict[str, int] = defaultdict(int)
        for place, character in enumerate(text):
            self.where[character] |= 1 << place
        self._found: dict[re.Pattern[str], int] = {}

    def places(self, kind: str | re.Pattern[str]) -> int:
        """Those before a character, or before any of a class."""
        if isinstance(kind, str):
            return self.where.get(kind, 0)
        if kind not in self._found:
            fitting = kind.findall("".join(self.where))
            self._found[kind] = sum(self.where[character] for character in fitting)
        return self._found[kind]


Step = Callable[[int, Name], int]  # the places behind a part of a pattern, of those before it


def literal_names(pattern: str) -> frozenset[str] | None:
    """The names that a pattern without wildcards, "a" or "a|b|c", stands for; None for others."""
    names = pattern.split("|")
    if not all(_LITERAL.fullmatch(name) for name in names):
        return None
    return frozenset(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names)


@lru_cache(maxsize=4)
def whole_names(pattern: str) -> Callable[[str], bool]:
    """Whether a name is one that `pattern` stands for, as `re.fullmatch` tells it.

    Raises ValueError for patterns that are too long, and for any syntax beyond characters, classes
    of them, groups, "|", "^", "$" and quantifiers that are not within each other.
    """
    names = literal_names(pattern)
    if names is not None:
        return names.__contains__
    step = _parsed(pattern)

    def fits(text: str) -> bool:
        name = Name(text)
        return bool(step(1, name) & name.end)

    return fits


class PatternTable:
    """Values by patterns, the first that fits: all of a name, or what follows one of its dots.

    As PEFT finds a layer's rank and alpha (utils/other.py `get_pattern_key`), which it matches by
    `(.*\\.)?(pattern)$`. `problems` tells what can't be used.
    """

    def __init__(self, table: Mapping[str, float]) -> None:
        self.problems: list[str] = []
        self._names: dict[str, tuple[int, float]] = {}
        self._others: list[tuple[int, float, Step]] = []
        length = 0
        for order, (pattern, value) in enumerate(table.items()):
            names = literal_names(pattern)
            if names is None:
                length += len(pattern)
                self._add(order, value, pattern)
            for name in names or ():
                self._names.setdefault(name, (order, value))
        if length > MAX_LENGTH:
            self.problems.append(
                f"its patterns with wildcards have {length} characters; {MAX_LENGTH} are the most"
            )

    def _add(self, order: int, value: float, pattern: str) -> None:
        try:
            self._others.append((order, value, _parsed(pattern)))
        except ValueError as error:
            self.problems.append(str(error))

    def get(self, text: str, default: float) -> float:
        """The value of the name `text`. Only for tables without problems."""
        starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == ".")]
        found = [self._names[text[start:]] for start in starts if text[start:] in self._names]
        first, value = min(found, default=(None, default))
        if not self._others:
            return value
        name, places = Name(text), sum(1 << start for start in starts)
        for order, other, step in self._others:
            if first is not None and order > first:
                break
            if step(places, name) & name.end:
                return other
        return value


def _parsed(pattern: str) -> Step:
    """Raises ValueError: see `whole_names`."""
    shown = f"the pattern {pattern[:80]!r} is too complex"
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{shown}: it has {len(pattern)} characters, {MAX_LENGTH} are the most")
    parser = _Parser(pattern)
    try:
        step = parser.alternatives(MAX_DEPTH)
    except (_Unknown, re.error):
        step = None
    if step is None or parser.at < len(pattern):
        raise ValueError(f"{shown} at its character {parser.at + 1}")
    return step


class _Unknown(Exception):
    """What a pattern has is not known here."""


class _Parser:
    """Reads `pattern` from the character `at` on."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def _take(self, *texts: str) -> bool:
        """Go on behind the first of the texts that comes next."""
        found = next((text for text in texts if self.pattern.startswith(text, self.at)), "")
        self.at += len(found)
        return bool(found)

    def alternatives(self, depth: int) -> Step:
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _any_of(branches)

    def _sequence(self, depth: int) -> Step:
        steps = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            steps.append(self._part(depth))
        return _one_after_the_other(steps)

    def _part(self, depth: int) -> Step:
        if self._take("^"):
            return lambda places, name: places & 1
        if self._take("$"):
            return lambda places, name: places & name.end
        if self._take("(?:", "("):
            group = self.alternatives(depth - 1) if depth else None
            if group is None or not self._take(")"):
                raise _Unknown
            return _any_of([group, _nothing]) if self._count(groups=True) else group
        kind = self._characters()
        count = self._count()
        return _repeated(kind, *count) if count else _repeated(kind, 1, 1)

    def _characters(self) -> str | re.Pattern[str]:
        """A character, or a class of them."""
        if known := _CLASS.match(self.pattern, self.at):
            self.at = known.end()
            return re.compile(known[0])
        is_escaped = self._take("\\")
        character = self.pattern[self.at : self.at + 1]
        if not character or (character.isalnum() if is_escaped else character in "*+?{["):
            raise _Unknown
        self.at += 1
        return character

    def _count(self, groups: bool = False) -> tuple[int, int | None] | None:
        """(least, most) of a quantifier; a group may have "?" alone."""
        start = self.at
        if known := _COUNT.match(self.pattern, start):
            self.at = known.end()
            least, most = int(known[1]), int(known[3]) if known[3] else None
            most = most if known[2] else least
        elif self._take(*_COUNTS):
            least, most = _COUNTS[self.pattern[start]]
        else:
            return None
        if (groups and (least, most) != (0, 1)) or (most is not None and least > most):
            self.at = start
            raise _Unknown
        self._take("?")  # as few as possible: the same names
        return least, most


def _nothing(places: int, name: Name) -> int:
    return places


def _one_after_the_other(steps: Sequence[Step]) -> Step:
    def step(places: int, name: Name) -> int:
        for one in steps:
            if not places:
                break
            places = one(places, name)
        return places

    return step


def _any_of(steps: Sequence[Step]) -> Step:
    def step(places: int, name: Name) -> int:
        found = 0
        for one in steps:
            found |= one(places, name)
        return found

    return step


def _repeated(kind: str | re.Pattern[str], least: int, most: int | None) -> Step:
    """Characters of a kind, one after the other, `least` to `most` of them."""

    def step(places: int, name: Name) -> int:
        fitting = name.places(kind)
        for _ in range(least):
            places = (places & fitting) << 1
        if most is None:
            # The sum carries each place to the end of the run of fitting characters it is in.
            return (((places & fitting) + fitting) ^ fitting) | places
        for _ in range(most - least):
            places |= (places & fitting) << 1
        return places

    return step
