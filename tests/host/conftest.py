"""The real host in this process: `.host/ComfyUI`, or the one that LORA_WEAVE_COMFYUI names."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from lora_weave.devtools import hosts, inprocess
from lora_weave.devtools.paths import HOST

COMFYUI = Path(os.environ.get("LORA_WEAVE_COMFYUI") or HOST / "ComfyUI")
BASE = Path(tempfile.mkdtemp(prefix="lora-weave-host-"))

# Tests that run without the host would prove nothing, so there is no skipping.
if not (COMFYUI / "main.py").is_file():
    raise pytest.UsageError(f"no ComfyUI in {COMFYUI}: run `python3 dev.py test`")

hosts.make_folders(BASE)
sys.path.extend(str(path) for path in hosts.stub_paths(Path(sys.executable)))
# Tiny models gain nothing by threads, and on a busy machine two take ten times as long as one.
torch.set_num_threads(1)
inprocess.enter(COMFYUI, "--cpu", "--fp32-text-enc", "--base-directory", str(BASE))


def pytest_sessionfinish():
    shutil.rmtree(BASE, ignore_errors=True)
