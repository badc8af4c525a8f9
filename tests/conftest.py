"""Tests import the pack as `lora_weave`, whatever its folder is called."""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The pack's `nodes/` must not shadow the host's `nodes.py` (`python -m pytest` puts the root here).
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

if "lora_weave" not in sys.modules:
    _pack = types.ModuleType("lora_weave")
    _pack.__path__ = [str(ROOT)]
    sys.modules["lora_weave"] = _pack
