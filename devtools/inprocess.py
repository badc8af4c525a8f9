"""Let a process import ComfyUI's modules as its own `main.py` would (tests, benchmarks, demo)."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

from .paths import ROOT


def enter(comfyui: Path, *arguments: str) -> None:
    """Put the host first on `sys.path`, and give its argument parser `arguments` such as `--cpu`.

    Must run before the first import of a host module: they read the arguments while they are
    imported. Raises RuntimeError where that is too late, FileNotFoundError where there is no host.
    """
    if not (comfyui / "comfy" / "options.py").is_file():
        raise FileNotFoundError(f"no ComfyUI in {comfyui}: run `python3 dev.py setup`")
    if "comfy.cli_args" in sys.modules:
        raise RuntimeError("the host's modules are already imported, with other arguments")
    # First on the path, so that the host's `nodes.py` and `utils` win over folders of that name.
    sys.path.insert(0, str(comfyui))
    own_arguments = sys.argv
    sys.argv = [str(comfyui / "main.py"), *arguments]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (parses sys.argv while it is imported)

        # As main.py does: later the host's `nodes.py` puts `comfy/`, with a `utils.py`, first.
        import utils  # noqa: F401
    finally:
        sys.argv = own_arguments


def pack_module(name: str) -> types.ModuleType:
    """A module of the pack, "nodes" or "lora_core.families", in a process that has the host."""
    if "lora_weave" not in sys.modules:
        pack = types.ModuleType("lora_weave")
        pack.__path__ = [str(ROOT)]
        sys.modules["lora_weave"] = pack
    return importlib.import_module(f"lora_weave.{name}")
