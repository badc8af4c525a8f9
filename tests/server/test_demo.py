"""The demo as `dev.py demo` runs it, in a server of its own; only its pictures are smaller."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_weave.demo import run, workflow
from lora_weave.devtools import hosts

from .graphs import CHECKPOINTS, SAMPLE_PX
from .lab import metadata_of

STEPS = 4


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the demo queues. Pictures are made small: they take most of the time otherwise."""
    whole, queued = run.make_graph, []

    def make_graph(*arguments: Any) -> dict[str, Any]:
        graph = whole(*arguments)
        for node in graph.values():
            if node["class_type"] == "EmptyLatentImage":
                node["inputs"].update(width=SAMPLE_PX, height=SAMPLE_PX)
            if node["class_type"] == "KSampler":
                node["inputs"]["steps"] = 2
        queued.append(graph)
        return graph

    monkeypatch.setattr(run, "make_graph", make_graph)
    return queued


def ends_of(printed: str) -> dict[str, Path]:
    """The files that the demo ends with, by the names that it prints."""
    _, _, lines = printed.partition("Trained and sampled in")
    named = [line for line in lines.splitlines() if line.startswith("  ")]
    return {line[:15].strip(): Path(line[15:].strip()) for line in named}


def check_pictures(ends: dict[str, Path], base: Path) -> None:
    """Three before and three after, each changed by the training; grid and curve hold something."""
    folder = base / "output" / "lora_weave_demo"
    before, after = (sorted(folder.glob(f"{name}_0*.png")) for name in ("before", "after"))
    assert len(before) == len(after) == 3
    for old, new in zip(before, after, strict=True):
        assert (pixels(old) != pixels(new)).any()
    for name in ("Before, after", "Loss curve"):
        assert pixels(ends[name]).std() > 1


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def test_the_demo_with_files_of_ones_own(host, materials, tmp_path, capsys, graphs):
    """A folder that the server may not read but for the demo's yaml, and another kind of model."""
    images, base = tmp_path / "my photos", hosts.make_base(tmp_path / "base")
    shutil.copytree(materials.photos, images)
    checkpoint = materials.checkpoints / CHECKPOINTS["SD3"]
    own = ["--checkpoint", str(checkpoint), "--images", str(images)]
    assert run.run(run.parse([*own, "--steps", str(STEPS)]), host, base) == 0
    printed = capsys.readouterr().out
    ends = ends_of(printed)
    assert set(ends) == {"LoRA", "Before, after", "Loss curve"}
    assert all(path.is_file() and base in path.parents for path in ends.values())
    check_pictures(ends, base)
    metadata = metadata_of(ends["LoRA"])
    assert metadata["ss_base_model_version"] == "sd3"
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == str(STEPS)
    assert json.loads(metadata["ss_dataset_dirs"])["my photos"]["img_count"] == 4
    assert f"in the first tenth of {STEPS} steps" in printed
    assert len(run.read_losses(base, ends["LoRA"])) == STEPS
    prompt = graphs[0][workflow.find(graphs[0], "CLIPTextEncode", "Prompt")]["inputs"]["text"]
    assert prompt == "a photo of an astronaut in an orange suit, smiling"


def test_the_demo_as_it_is(host, materials, tmp_path, capsys):
    """Its own photographs; the tiny model is made only where it is not there yet."""
    base = hosts.make_base(tmp_path / "base")
    shutil.copy(materials.checkpoints / run.TINY, base / "models" / "checkpoints")
    assert run.run(run.parse(["--steps", "2"]), host, base) == 0
    printed = capsys.readouterr().out
    ends = ends_of(printed)
    assert "Making a tiny SD1.5 checkpoint" not in printed
    assert " ".join(run.ABSTRACT) in printed
    check_pictures(ends, base)
    metadata = metadata_of(ends["LoRA"])
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert json.loads(metadata["ss_dataset_dirs"])[run.PHOTO_FOLDER]["img_count"] == 12
