"""The project's own Python environment, `.venv`: made once, mended when a set-up was cut off."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .paths import VENV, SetupError, free_bytes, is_link, read_json, remove_tree, write_json

REQUIREMENTS = Path(__file__).resolve().parent
# Downloads and what is installed: 0.5 + 1.4 GB with a CPU build of torch, 3 + 5.5 GB with CUDA.
NEEDED_BYTES = 3_000_000_000
CUDA_BYTES = 9_000_000_000
# ComfyUI imports both; their builds are tied to a torch build, so each is tried and else stubbed.
TORCH_COMPANIONS = {"torchvision": "torchvision==0.28.0", "torchaudio": "torchaudio==2.11.0"}


class PipFailure(SetupError):
    """pip failed. `changed_nothing` is set where it can't have begun to copy files."""

    def __init__(self, sentence: str, *, changed_nothing: bool) -> None:
        super().__init__(sentence)
        self.changed_nothing = changed_nothing


class NoBuild(PipFailure):
    """pip asked everywhere, and no build of the package fits here."""


@dataclass(frozen=True)
class Step:
    """One call of pip: a requirement file, and what to say while it runs."""

    file: str
    says: str
    options: tuple[str, ...] = ()


TORCH = Step("requirements-torch.txt", "torch (the largest download)")
HOST_PACKAGES = Step("requirements-host.txt", "what ComfyUI needs")
TEST_TOOLS = Step("requirements-test.txt", "test tools")
ORACLES = Step("requirements-oracles.txt", "peers to compare with", ("--no-deps",))
TO_RUN = (TORCH, HOST_PACKAGES)
TO_TEST = (*TO_RUN, TEST_TOOLS, ORACLES)


def ensure(steps: tuple[Step, ...], venv: Path = VENV) -> Path:
    """The environment's Python, with everything of `steps` installed.

    `.venv/lora-weave.json` records the content of each requirement file that is installed, and
    `busy` while something is being installed. An environment that was left busy is made again: pip
    takes a package of which half was copied for a whole one.
    """
    stamp_file = venv / "lora-weave.json"
    stamp = read_json(stamp_file)
    python = python_of(venv)
    if not (stamp.get("location") == str(venv) and not stamp.get("busy") and works(python)):
        _create(venv, stamp_file, stamp)
        stamp = {"location": str(venv), "busy": True, "installed": {}}
    installed: dict[str, str] = stamp["installed"]
    for step in steps:
        wanted = fingerprint(step)
        if installed.get(step.file) == wanted:
            continue
        print(f"Installing {step.says} ...", flush=True)
        write_json(stamp_file, {**stamp, "busy": True})
        try:
            _pip_install(python, step)
            if step is HOST_PACKAGES:
                for module, requirement in TORCH_COMPANIONS.items():
                    _try_companion(python, module, requirement)
        except PipFailure as failure:
            if failure.changed_nothing:
                write_json(stamp_file, {**stamp, "busy": False})
            raise
        installed[step.file] = wanted
        write_json(stamp_file, {**stamp, "busy": False})
    return python


def fingerprint(step: Step) -> str:
    """Changes when the step would install something else."""
    digest = hashlib.sha256(repr((step.options, sorted(TORCH_COMPANIONS.values()))).encode())
    for name in (step.file, "constraints.txt"):
        digest.update((REQUIREMENTS / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def works(python: Path) -> bool:
    """Whether this Python starts: its base installation may be gone."""
    try:
        return run([str(python), "-c", "import pip"]).returncode == 0
    except OSError:
        return False


def can_import(python: Path, module: str) -> bool:
    return run([str(python), "-c", f"import {module}"]).returncode == 0


def _create(venv: Path, stamp_file: Path, stamp: dict) -> None:
    if is_link(venv) or (venv.exists() and not stamp and any(venv.iterdir())):
        raise SetupError(
            f"{venv} was not made by dev.py, so it is left alone: move it away and run this again"
        )
    _check_space(venv.parent)
    if venv.exists():
        print("Making .venv again: it was not finished, or was moved here ...", flush=True)
        _remove_keeping_stamp(venv, stamp_file)
    venv.mkdir(exist_ok=True)
    write_json(stamp_file, {"location": str(venv), "busy": True, "installed": {}})
    print(f"Making .venv with Python {sys.version.split()[0]} ...", flush=True)
    result = run([sys.executable, "-m", "venv", str(venv)])
    if result.returncode or not works(python_of(venv)):
        raise SetupError(
            f"This Python ({sys.executable}) can't make a virtual environment: install its venv "
            "and pip parts (Debian, Ubuntu: apt install python3-venv) or use another Python"
        )


def _check_space(folder: Path) -> None:
    """Refuse where no torch fits, warn where the one with CUDA does not: pip alone knows which."""
    free = free_bytes(folder)
    if free < NEEDED_BYTES:
        raise SetupError(
            f"Too little disk space: {NEEDED_BYTES / 1e9:.0f} GB are needed in {folder}, "
            f"{free / 1e9:.1f} GB are free"
        )
    if free < CUDA_BYTES and sys.platform == "linux":
        print(
            f"{free / 1e9:.1f} GB are free, which a CPU build of torch fits in; "
            f"a torch with CUDA needs {CUDA_BYTES / 1e9:.0f} GB",
            flush=True,
        )


def _remove_keeping_stamp(venv: Path, stamp_file: Path) -> None:
    """Empty the folder, the stamp last: a removal that is cut off is still known as ours."""
    for child in venv.iterdir():
        if child.is_dir() or is_link(child):
            remove_tree(child)
        elif child != stamp_file:
            child.unlink()
    stamp_file.unlink()


def _pip_install(python: Path, step: Step) -> None:
    command = pip(python, "install", "--no-compile", *step.options)
    command += ["--constraint", str(REQUIREMENTS / "constraints.txt")]
    command += ["--requirement", str(REQUIREMENTS / step.file)]
    if not (step is TORCH and sys.stdout.isatty()):
        command.append("--quiet")  # torch is large enough to want pip's progress bar
    # `stdout` is shared with the terminal, `stderr` is read for what went wrong
    result = subprocess.run(command, stderr=subprocess.PIPE, env=clean_environment(), **TEXT)
    if result.returncode:
        raise explain(result.stderr, step.says)


def _try_companion(python: Path, module: str, requirement: str) -> None:
    """Install a companion of torch, keep it only if it loads: CUDA builds fail on a CPU torch.

    Raises PipFailure where pip failed for another reason than that no build fits.
    """
    # An index that can't be reached looks to pip like an empty one, and only -vv tells them apart.
    result = run(pip(python, "install", "-vv", "--no-deps", "--only-binary=:all:", requirement))
    if result.returncode == 0 and can_import(python, module):
        return
    if result.returncode:
        unread = [line for line in _UNREAD_PAGE.findall(result.stdout) if "404 " not in line]
        failure = explain("\n".join([*unread, result.stderr]), module)
        if not isinstance(failure, NoBuild):
            raise failure
    run(pip(python, "uninstall", "--quiet", "--yes", module))
    print(f"  {module} has no build for this torch: a stub stands in for it", flush=True)


def pip(python: Path, command: str, *arguments: str) -> list[str]:
    return [str(python), "-m", "pip", command, "--disable-pip-version-check", *arguments]


TEXT: dict = {"text": True, "encoding": "utf-8", "errors": "replace"}


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command to its end, without a Python path: ours may hold stubs already."""
    return subprocess.run(command, capture_output=True, env=clean_environment(), **TEXT)


def clean_environment() -> dict[str, str]:
    """This process's variables for a child: UTF-8 everywhere, and nobody's own Python path."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**variables, "PYTHONUTF8": "1"}


# What pip's error output says -> what to tell. The first that matches counts.
_NO_NETWORK = (
    r"name resolution|establish a new connection|getaddrinfo|nodename nor servname|"
    r"NewConnectionError|ConnectTimeout|"
    r"Network is unreachable|Connection (refused|reset|aborted)|ProxyError|Cannot connect to proxy|"
    r"Read timed out|Max retries exceeded|SSLError|Could not fetch URL"
)
_NO_COMPILER = (
    r"Microsoft Visual C\+\+|unable to execute '?(gcc|cc|clang|g\+\+|c\+\+)|"
    r"command '?[^'\s]*(gcc|cc|clang|g\+\+|c\+\+|cl\.exe)'? failed|"
    r"No such file or directory: '?[^'\s]*(gcc|cc|clang|g\+\+|c\+\+)\b|"
    r"linker `cc` not found|Rust compiler|cargo[^\n]{0,40}not (installed|found)|"
    r"CMAKE_C(XX)?_COMPILER"
)
_UNREAD_PAGE = re.compile(r"Could not fetch URL .*")  # in pip's own words, at -vv
_NO_BUILD = r"No matching distribution found for (?P<what>\S+)"
_DISK_FULL = r"No space left on device|Errno 28|not enough space on the disk"


def explain(errors: str, doing: str) -> PipFailure:
    """One sentence for what pip wrote to its error output while installing `doing`."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if re.search(_DISK_FULL, errors):
        needed = CUDA_BYTES if sys.platform == "linux" else NEEDED_BYTES
        sentence = f"The disk is full: free {needed / 1e9:.0f} GB and run this again"
        return PipFailure(sentence, changed_nothing=False)
    if re.search(_NO_COMPILER, errors):
        tools = {"win32": "the Visual Studio build tools", "darwin": "Xcode's command line tools"}
        needed = tools.get(sys.platform, "gcc (Debian, Ubuntu: apt install build-essential)")
        sentence = (
            f"A package has no ready build for {python} here and the compiler is missing or "
            f"failed: use Python 3.11, or install {needed}, and run this again"
        )
        return PipFailure(sentence, changed_nothing=True)
    if re.search(_NO_NETWORK, errors):
        sentence = (
            f"No network: pip could not download {doing}; connect (or set pip's proxy) and run "
            "this again, finished parts are kept"
        )
        return PipFailure(sentence, changed_nothing=True)
    match = re.search(_NO_BUILD, errors)
    if match:
        sentence = (
            f"{match['what']} has no build for {python} on this system: run this with Python 3.11 "
            "(3.10 to 3.13 may work)"
        )
        return NoBuild(sentence, changed_nothing=True)
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "")
    sentence = f"pip failed while installing {doing}: {reason or 'it gave no reason'}"
    return PipFailure(sentence, changed_nothing=False)


def missing_modules(python: Path, modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that this Python can't find; nothing is imported."""
    code = (
        "import importlib.util, sys; "
        "print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    )
    result = run([str(python), "-c", code, *modules])
    if result.returncode:
        raise SetupError(f"{python} does not run as a Python: {result.stderr.strip()[-200:]}")
    return result.stdout.split()
