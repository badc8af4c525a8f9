"""One class and one registry entry make a new type: the tests that exist cover it as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lora_weave.lora_core.adapters import ADAPTERS

from . import closed_forms, rows, test_adapter_layers, test_adapters, test_starts
from .layer_kinds import KINDS, make_layer

ROOT = Path(__file__).resolve().parents[2]
MODULES = (test_adapter_layers, test_adapters, test_starts)
FILES = ROOT / "tests/host/test_files.py"  # needs the host, so it is not imported here
SHAPES = {tuple(make_layer(kind).weight.shape): kind for kind in reversed(KINDS)}.values()
PLUGIN = f"""
import importlib

def pytest_sessionstart():
    importlib.import_module({rows.__name__!r}).register()
"""


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """(test function, parameters) of all tests of the new type, which ran with it registered."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows_plugin.py").write_text(PLUGIN, encoding="utf-8")
    report = folder / "report.xml"
    files = [*(str(module.__file__) for module in MODULES), str(FILES)]
    command = [sys.executable, "-m", "pytest", "-p", "rows_plugin", *files, "-k", "rows", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*command, f"--junit-xml={report}"], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    cases = len(KINDS) * len(test_adapters.DTYPES)
    assert f"adapter oracles: {cases} cases passed (1 forms" in done.stdout
    assert f"file oracles: {len(SHAPES) * 3} cases passed (1 forms" in done.stdout
    tests = ElementTree.parse(report).getroot().iter("testcase")
    names = (test.attrib["name"].rstrip("]").partition("[") for test in tests)
    return {(name, case) for name, _, case in names}


def with_parameter(module: object, parameter: str) -> set[str]:
    """The test functions of a module that are parametrised over `parameter`."""
    return {
        name
        for name, function in vars(module).items()
        for mark in getattr(function, "pytestmark", [])
        if mark.name == "parametrize" and parameter in mark.args[0]
    }


def test_every_check_of_adapters_ran_on_it(passed: set[tuple[str, str]]) -> None:
    expected = with_parameter(test_adapter_layers, "case")
    assert "test_gradcheck" in expected and len(expected) > 10
    assert expected <= {name for name, _ in passed}
    kinds = {kind for name, case in passed for kind in KINDS if case == f"inside-{kind}-rows"}
    assert kinds == KINDS.keys()


def test_its_formula_was_compared_with_it(passed: set[tuple[str, str]]) -> None:
    compared = {case for name, case in passed if name == "test_change_is_the_oracles"}
    dtypes = ["float32", "float64"]
    assert compared == {f"rows-{kind}-closed-form-{dtype}" for kind in KINDS for dtype in dtypes}


def test_its_files_were_written_and_read(passed: set[tuple[str, str]]) -> None:
    found = {case for name, case in passed if name.startswith("test_a_written_file")}
    dtypes = ["float32", "bfloat16", "float16"]
    assert found == {f"rows-{kind}-formula-{dtype}" for kind in SHAPES for dtype in dtypes}


def test_its_start_and_strengths_were_tested(passed: set[tuple[str, str]]) -> None:
    expected = with_parameter(test_starts, "name") | with_parameter(test_adapters, "sample")
    assert len(expected) > 2 and expected <= {name for name, _ in passed}


def test_nothing_of_it_is_left() -> None:
    assert rows.Rows.name not in ADAPTERS and rows.Rows.name not in closed_forms.FORMULAS
