"""torchvision and torchaudio: a stub where no build fits, an error where pip failed otherwise.

pip is real and installs into an environment of its own. Indexes are local: a folder, or a server.
"""

import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lora_weave.devtools import environment
from lora_weave.devtools.environment import SetupError

MODULE, REQUIREMENT = "lora_weave_companion", "lora_weave_companion==1.0"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with pip that nothing else uses."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    return environment.python_of(venv)


@pytest.fixture
def builds(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that is all pip knows of packages."""
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    yield tmp_path
    environment.run(environment.pip(python, "uninstall", "--yes", MODULE))


def write_wheel(folder: Path, source: str, *, tag: str = "py3-none-any") -> Path:
    wheel = folder / f"{MODULE}-1.0-{tag}.whl"
    facts = f"{MODULE}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{MODULE}.py", source)
        archive.writestr(
            f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 1.0"
        )
        archive.writestr(f"{facts}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}")
        archive.writestr(f"{facts}/RECORD", "")
    return wheel


@contextmanager
def index(status: int) -> Iterator[str]:
    """The address of a package index that answers everything with one HTTP status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


def use_index(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")


def try_it(python: Path) -> None:
    environment._try_companion(python, MODULE, REQUIREMENT)


def test_a_build_that_loads_is_kept(python, builds, capsys):
    write_wheel(builds, "")
    try_it(python)
    assert environment.can_import(python, MODULE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "build", [None, ("", "py3-none-some_other_system"), ("import no_such_module", "py3-none-any")]
)
def test_a_stub_where_no_build_fits(python, builds, capsys, build):
    """None at all, one for another system, one that does not load: the last is taken off again."""
    if build:
        write_wheel(builds, build[0], tag=build[1])
    try_it(python)
    assert f"{MODULE} has no build for this torch" in capsys.readouterr().out
    assert environment.missing_modules(python, (MODULE,)) == [MODULE]


def test_a_stub_where_the_index_does_not_know_it(python, builds, monkeypatch, capsys):
    with index(404) as address:
        use_index(monkeypatch, address)
        try_it(python)
    assert "a stub stands in for it" in capsys.readouterr().out


def test_a_damaged_download_is_an_error(python, builds, capsys):
    write_wheel(builds, "").write_bytes(b"cut off")
    with pytest.raises(SetupError, match=f"^pip failed while installing {MODULE}: ERROR: "):
        try_it(python)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("status", [403, 503])
def test_an_index_that_gives_nothing_is_an_error(python, builds, monkeypatch, capsys, status):
    """pip itself says "No matching distribution found" and nothing of the reason."""
    with index(status) as address:
        use_index(monkeypatch, address)
        with pytest.raises(SetupError, match=f"^No network: pip could not download {MODULE};"):
            try_it(python)
    assert capsys.readouterr().out == ""


def test_no_connection_is_an_error(python, builds, monkeypatch):
    with index(404) as address:
        pass  # nobody listens there any more
    use_index(monkeypatch, address)
    with pytest.raises(SetupError, match="^No network"):
        try_it(python)
