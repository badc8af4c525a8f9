"""What is said and done where node, Chromium or the page are missing. Nothing is downloaded."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from lora_weave.devtools import checks, environment, page_tools
from lora_weave.devtools.paths import SetupError


def answer(code: int = 0, stdout: str = "", stderr: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], code, stdout, stderr)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with nothing on it, where every command fails; the commands that were tried."""
    tried = []

    def fail(command, **_):
        tried.append(command)
        return answer(1, stderr="ERROR: Temporary failure in name resolution")

    monkeypatch.setattr(page_tools, "NODE_FOLDER", tmp_path / ".node")
    monkeypatch.setattr(page_tools.shutil, "which", lambda _: None)
    monkeypatch.setattr(environment, "run", fail)
    monkeypatch.setattr(page_tools.subprocess, "run", fail)
    return tried


def test_without_node_one_sentence_says_what_to_install(bare):
    with pytest.raises(SetupError, match=r"node 20 or newer is needed .* install node and npm"):
        page_tools._node(Path("python"))
    assert page_tools.NODE_WHEEL in bare[0]


def test_an_old_node_of_the_machine_is_not_used(monkeypatch, bare):
    monkeypatch.setattr(page_tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    for version, is_used in (("v18.19.0", False), ("v20.2.0", True), ("v24.1.0", True)):
        monkeypatch.setattr(environment, "run", lambda _, said=version: answer(stdout=said))
        if is_used:
            assert page_tools._node(Path("python")) == (Path("/usr/bin/node"), ["/usr/bin/npm"])
        else:
            with pytest.raises(SetupError):
                page_tools._node(Path("python"))


def test_without_chromium_everything_is_tried_before_one_sentence_tells(bare, monkeypatch):
    monkeypatch.setattr(
        page_tools.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None
    )
    monkeypatch.setattr(page_tools.sys, "platform", "linux")
    monkeypatch.setattr(page_tools.os, "geteuid", lambda: 0, raising=False)
    with pytest.raises(SetupError, match="apt install chromium") as caught:
        page_tools.ensure_browser(Path("python"))
    assert "\n" not in str(caught.value)
    told = [" ".join(map(str, command)) for command in bare]
    assert any(line.startswith("apt-get install") and "chromium" in line for line in told)
    assert "python -m playwright install chromium" in told


def test_npm_that_fails_leaves_no_stamp(bare, tmp_path):
    with pytest.raises(SetupError, match="npm could not install typescript"):
        page_tools._ensure_packages(["npm"])
    assert not (tmp_path / ".node" / "lora-weave.json").exists()


def test_a_page_is_unpacked_once_without_source_maps(tmp_path, monkeypatch):
    def download(command):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "page.whl", "w") as wheel:
            wheel.writestr(f"{page_tools.PAGE_INSIDE}index.html", "<html>")
            wheel.writestr(f"{page_tools.PAGE_INSIDE}assets/a.js", "1")
            wheel.writestr(f"{page_tools.PAGE_INSIDE}assets/a.js.map", "2")
            wheel.writestr("comfyui_frontend_package/__init__.py", "")
        return answer()

    monkeypatch.setattr(environment, "run", download)
    page = page_tools.ensure_page(Path("python"), "1.2.3", tmp_path)
    found = sorted(path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file())
    assert found == ["assets/a.js", "index.html"]
    monkeypatch.setattr(environment, "run", lambda _: pytest.fail("downloaded again"))
    assert page_tools.ensure_page(Path("python"), "1.2.3", tmp_path) == page


def test_tests_of_node_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testcase name='a'/><testsuite><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    assert checks.count_cases(report) == (1, 1, 1)
    assert checks.count_cases(tmp_path / "none.xml") == (0, 0, 0)
