"""Tests import the pack as `lora_weave`, whatever its folder is called."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The pack's `nodes/` must not shadow the host's `nodes.py` (`python -m pytest` puts the root here).
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

if "lora_weave" not in sys.modules:
    _pack = types.ModuleType("lora_weave")
    _pack.__path__ = [str(ROOT)]
    sys.modules["lora_weave"] = _pack


@pytest.fixture
def count_case(request: pytest.FixtureRequest) -> Callable[..., None]:
    """count_case(title, forms=..., layers=...): this test passed for one of each; see below."""

    def count(title: str, **case: object) -> None:
        named = tuple((axis, str(value)) for axis, value in case.items())
        request.node.user_properties.append((title, named))

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a title: the number of counted cases that passed, and of the values on each axis."""
    counted: dict[str, list[dict[str, str]]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for title, case in report.user_properties:
            if isinstance(case, tuple):
                counted.setdefault(title, []).append(dict(case))
    for title, cases in counted.items():
        sizes = {axis: len({case[axis] for case in cases}) for axis in cases[0]}
        product = " x ".join(f"{size} {axis}" for axis, size in sizes.items())
        terminalreporter.write_line(
            f"{title}: {len(cases)} cases passed ({product}, where each applies)"
        )
