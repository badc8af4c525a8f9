"""Real ComfyUI servers with the pack, for tests over HTTP and websocket. Nothing is mocked.

One server serves most tests; a few need another base directory, or one that they may spoil.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_weave.demo.client import Client
from lora_weave.devtools import hosts
from lora_weave.devtools.paths import ROOT
from lora_weave.devtools.server import Server

from .lab import Lab, Materials


@pytest.fixture(scope="session")
def host() -> hosts.Host:
    """The ComfyUI that `dev.py` has set up. Without one the tests fail; they are never skipped."""
    path = Path(os.environ.get("LORA_WEAVE_COMFYUI", ROOT / ".host" / "ComfyUI"))
    if not (path / "main.py").is_file():
        pytest.fail(f"no ComfyUI in {path}: run `python3 dev.py setup`", pytrace=False)
    # Equal tensors need an equal number of threads, and the tiny models are too small for more.
    os.environ["OMP_NUM_THREADS"] = "1"
    return hosts.Host(path, Path(sys.executable), own=False)


@pytest.fixture(scope="session")
def materials(host: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials.make(host, tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="session")
def make_lab(
    host: hosts.Host, materials: Materials, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Lab]]:
    """make_lab(name, *arguments of ComfyUI): a base directory and its server, not started yet."""
    made: list[Lab] = []

    def make(name: str, *arguments: str) -> Lab:
        lab = Lab(host, tmp_path_factory.mktemp(name), materials, *arguments)
        made.append(lab)
        return lab

    yield make
    for lab in made:
        lab.stop()


@pytest.fixture(scope="session")
def lab(make_lab: Callable[..., Lab], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The server that most tests share. It may also read datasets from the folder `allowed`."""
    yaml = tmp_path_factory.mktemp("yaml") / "extra_model_paths.yaml"
    allowed = yaml.parent / "allowed"
    allowed.mkdir()
    yaml.write_text(f"lora_weave:\n    lora_weave_datasets: {allowed}\n", encoding="utf-8")
    shared = make_lab("shared", "--extra-model-paths-config", str(yaml))
    shared.allowed = allowed
    return shared.start()


@pytest.fixture(scope="session")
def other_lab(make_lab: Callable[..., Lab]) -> Lab:
    """A second server with a base directory of its own, which has never seen the first one."""
    return make_lab("other").start()


@pytest.fixture(scope="session")
def server(lab: Lab) -> Server:
    return lab.server


@pytest.fixture(scope="session")
def client(lab: Lab) -> Client:
    return lab.client
