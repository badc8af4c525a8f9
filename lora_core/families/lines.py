"""Lines of a family's file: a layer or norm each, or a run of them that differ by one number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Line = dict[str, Any]  # see docs/families.md
_DIGITS = re.compile(r"(\d+)")
_RUN = "*"  # stands for the number in the texts of a run; as a key: [first, last]


def expanded(lines: Iterable[Line]) -> Iterator[Line]:
    """A line for each layer: every "*" in a run's texts becomes each of its numbers."""
    for line in lines:
        if _RUN not in line:
            yield line
            continue
        first, last = line[_RUN]
        text = json.dumps({key: value for key, value in line.items() if key != _RUN})
        for number in range(first, last + 1):
            yield json.loads(text.replace(_RUN, str(number)))


def grouped(lines: Sequence[Line]) -> list[Line]:
    """The opposite of `expanded`: of the runs that a line can begin, the longest."""
    left = {line["at"]: _parts(line) for line in lines}
    groups = []
    while left:
        path = next(iter(left))
        parts = left.pop(path)
        places = [place for place, part in enumerate(_DIGITS.split(path)) if part.isdigit()]
        runs = [_run(path, parts, place, left) for place in places]
        text, first, followers = max(runs, key=lambda run: len(run[2]), default=("", 0, []))
        if not followers:
            groups.append(json.loads("".join(parts)))
            continue
        for follower in followers:
            del left[follower]
        run = json.loads(text)
        last = first + len(followers)
        groups.append({"at": run.pop("at"), _RUN: [first, last], **run})
    return groups


def _parts(line: Line) -> list[str]:
    """A line's text, taken apart into numbers and what is between them."""
    return _DIGITS.split(json.dumps(line))


def _run(
    path: str, parts: Sequence[str], place: int, left: dict[str, list[str]]
) -> tuple[str, int, list[str]]:
    """(text with "*", first number, paths that follow) of the run that counts on at `place`."""
    words = _DIGITS.split(path)
    first, followers = int(words[place]), []
    template: list[str] = []
    for number in range(first + 1, first + 1 + len(left)):
        words[place] = str(number)
        following = left.get("".join(words))
        if following is None or len(following) != len(parts):
            break
        template = template or _template(parts, following, first)
        if [str(number) if part == _RUN else part for part in template] != following:
            break
        followers.append("".join(words))
    return "".join(template), first, followers


def _template(parts: Sequence[str], following: Sequence[str], first: int) -> list[str]:
    """A line's parts with "*" for the run's number: where, within a text, the next differs."""
    quotes, template = 0, []
    for mine, other in zip(parts, following, strict=True):
        counts = quotes % 2 == 1 and mine == str(first) and mine != other
        template.append(_RUN if counts else mine)
        quotes += mine.count('"')
    return template
