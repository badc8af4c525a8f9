"""Real servers with ComfyUI's page in several versions, and a real Chromium. Nothing is mocked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from lora_weave.devtools import hosts, page_tools
from lora_weave.devtools.paths import ROOT
from lora_weave.devtools.server import Server

from .loras import write_loras, write_names
from .stack_page import StackPage, new_context, warnings_without_us

# Chromium looks for its maker's hosts otherwise; as root it has no sandbox.
CHROMIUM = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync", "--no-sandbox"]
CLASSIC, NODES_2 = "classic", "Nodes 2.0"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of all servers, with LoRA files."""
    folder = hosts.make_base(tmp_path_factory.mktemp("browser"))
    write_loras(folder / "models" / "loras")
    write_names(folder)
    return folder


@pytest.fixture(scope="session")
def server_of(base: Path) -> Iterator[Callable[[str], Server]]:
    """server_of(version): a server with that version of the page, started when it is asked for."""
    path = Path(os.environ.get("LORA_WEAVE_COMFYUI", ROOT / ".host" / "ComfyUI"))
    if not (path / "main.py").is_file():
        pytest.fail(f"no ComfyUI in {path}: run `python3 dev.py setup`", pytrace=False)
    host = hosts.Host(path, Path(sys.executable), own=False)
    started: dict[str, Server] = {}
    with ExitStack() as servers:

        def server_of(version: str) -> Server:
            if version not in started:
                page = page_tools.page_folder(version)
                if not (page / "index.html").is_file():
                    pytest.fail(f"no page {version}: run `python3 dev.py setup`", pytrace=False)
                arguments = ("--front-end-root", str(page))
                log = base / f"server-{version}.log"
                server = Server(host, base, log=log, arguments=arguments)
                started[version] = servers.enter_context(server)
            return started[version]

        yield server_of


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = page_tools.find_browser(Path(sys.executable))
    if found is None:
        pytest.fail("no Chromium: run `python3 dev.py setup`", pytrace=False)
    with sync_playwright() as tools:
        yield tools.chromium.launch(executable_path=str(found), args=CHROMIUM)


@pytest.fixture(scope="session")
def context_of(browser: Browser) -> Callable[[str], BrowserContext]:
    """context_of(version): a browser's profile for each, so that scripts are compiled once."""
    made: dict[str, BrowserContext] = {}

    def context_of(version: str) -> BrowserContext:
        if version not in made:
            made[version] = new_context(browser)
        return made[version]

    return context_of


@pytest.fixture(scope="session")
def usual_warnings(
    context_of: Callable[[str], BrowserContext], server_of: Callable[[str], Server]
) -> Callable[[str], Any]:
    """usual_warnings(version): what the page warns of without our scripts."""
    known: dict[str, frozenset[str]] = {}

    def usual(version: str) -> frozenset[str]:
        if version not in known:
            address = server_of(version).address
            known[version] = warnings_without_us(context_of(version), address)
        return known[version]

    return usual


@pytest.fixture
def open_page(
    context_of: Callable[[str], BrowserContext],
    server_of: Callable[[str], Server],
    usual_warnings: Callable[[str], Any],
) -> Iterator[Callable[..., StackPage]]:
    """open_page(version, mode, **settings): a page with one LoRA Stack. It must end without a
    warning about an interface that is deprecated, and without an error of ours."""
    opened: list[tuple[str, StackPage]] = []

    def open_page(version: str, mode: str, **settings: Any) -> StackPage:
        vue = {"Comfy.VueNodes.Enabled": mode == NODES_2}
        page = StackPage.open(context_of(version), server_of(version), {**vue, **settings})
        opened.append((version, page))
        return page

    yield open_page
    for version, page in opened:
        problems = page.problems(usual_warnings(version))
        page.close()
        assert problems == []
