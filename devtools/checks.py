"""`dev.py test`: lint, types and every test suite, each as a process of its own."""

from __future__ import annotations

import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .hosts import Host
from .page_tools import PageTools
from .paths import ROOT
from .processes import run_child

LINTS = {
    "ruff check": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "."),
    "mypy lora_core": ("mypy", "lora_core"),
}
SUITES = {
    "core tests": ("tests/core", "tests/dev"),
    "host tests": ("tests/host",),
    "server tests": ("tests/server",),
    "browser tests": ("tests/browser",),
}
TEST_MODULES = {
    "pytest": "pytest",
    "ruff": "ruff",
    "mypy": "mypy",
    "peft": "peft",
    "lycoris": "lycoris_lora",
    "skimage": "scikit-image",
    "playwright": "playwright",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one step. Lint steps count no tests."""

    name: str
    ok: bool
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    is_suite: bool = False

    def line(self) -> str:
        counts = ""
        if self.is_suite:
            counts = f"{self.passed} passed, {self.failed} failed"
            counts += f", {self.skipped} skipped" if self.skipped else ""
        state = "ok    " if self.ok else "FAILED"
        return f"{state}  {self.name:14} {self.seconds:7.1f} s  {counts}".rstrip()


def run_all(host: Host, tools: PageTools) -> bool:
    """Every step, also after one failed; the last lines say what ran. True if all is well."""
    outcomes = [_lint(host, name, line) for name, line in LINTS.items()]
    outcomes += [_types_of_scripts(host, tools), _script_suite(host, tools)]
    outcomes += [_suite(host, name, folders) for name, folders in SUITES.items()]
    print("\n".join(summary(outcomes)), flush=True)
    return all(outcome.ok for outcome in outcomes)


def run_pytest(host: Host, arguments: Sequence[str]) -> int:
    return _call(host, ["-m", "pytest", *arguments])


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    return ["", *(outcome.line() for outcome in outcomes), "", f"{passed} passed, {failed} failed"]


def _lint(host: Host, name: str, line: Sequence[str]) -> Outcome:
    print(f"\n=== {name}", flush=True)
    start = time.monotonic()
    code = _call(host, ["-m", *line])
    return Outcome(name, ok=code == 0, seconds=time.monotonic() - start)


def _suite(host: Host, name: str, folders: Sequence[str]) -> Outcome:
    print(f"\n=== {name}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = _call(host, ["-m", "pytest", *folders, "--durations=5", f"--junit-xml={report}"])
        passed, failed, skipped = count(report)
    if code != 0 and failed == 0:
        failed = 1  # pytest itself failed: nothing collected, an import error, a crash
    ok = code == 0 and passed > 0 and failed == 0
    return Outcome(name, ok, time.monotonic() - start, passed, failed, skipped, is_suite=True)


def _types_of_scripts(host: Host, tools: PageTools) -> Outcome:
    print("\n=== tsc web", flush=True)
    start = time.monotonic()
    line = [str(tools.node), str(tools.tsc), "--noEmit", "--project", str(ROOT)]
    code = run_child(line, host.environment(stubbed=False), ROOT)
    return Outcome("tsc web", ok=code == 0, seconds=time.monotonic() - start)


def _script_suite(host: Host, tools: PageTools) -> Outcome:
    """The page's modules that need no page, in node's own test runner."""
    print("\n=== js tests", flush=True)
    start = time.monotonic()
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/js").glob("*.mjs"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        reporters = ["--test-reporter=spec", "--test-reporter-destination=stdout"]
        reporters += ["--test-reporter=junit", f"--test-reporter-destination={report}"]
        line = [str(tools.node), "--test", *reporters, *files]
        code = run_child(line, host.environment(stubbed=False), ROOT)
        passed, failed, skipped = count_cases(report)
    failed = max(failed, 1) if code != 0 else failed
    ok = code == 0 and passed > 0 and failed == 0
    seconds = time.monotonic() - start
    return Outcome("js tests", ok, seconds, passed, failed, skipped, is_suite=True)


def count_cases(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of node's JUnit report, whose suites have no sums."""
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return 0, 0, 0
    failed = sum(case.find("failure") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - failed - skipped, failed, skipped


def count(report: Path) -> tuple[int, int, int]:
    """Passed, failed (with errors) and skipped tests of a JUnit report; zeros without a report."""
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return 0, 0, 0
    tests = failed = skipped = 0
    for suite in suites:
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return max(0, tests - failed - skipped), failed, skipped


def _call(host: Host, arguments: Sequence[str]) -> int:
    # Host and server tests add the stubs themselves; others must not see any.
    return run_child([str(host.python), *arguments], host.environment(stubbed=False), ROOT)
