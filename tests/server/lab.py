"""A base directory with the pack, tiny models and photographs, the ComfyUI that serves it, and
how to read what it has written.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from lora_weave.demo import client as _client
from lora_weave.demo import photos
from lora_weave.devtools import hosts
from lora_weave.devtools.paths import ROOT
from lora_weave.devtools.server import Server

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
PHOTO_PX = 96  # the shorter side
SILENCE_S = 600.0  # without a message from the server: far more than any step takes


@dataclass(frozen=True)
class Materials:
    """What every base directory gets; made once in a session."""

    checkpoints: Path
    photos: Path

    @classmethod
    def make(cls, host: hosts.Host, folder: Path) -> Materials:
        checkpoints, images = folder / "checkpoints", folder / "photos"
        script = ROOT / "demo" / "tiny_checkpoint.py"
        line = [str(host.python), str(script), str(checkpoints), "--comfyui", str(host.path)]
        made = subprocess.run(line, env=host.environment(), capture_output=True, text=True)
        assert made.returncode == 0, f"no tiny checkpoints:\n{made.stderr[-3000:]}"
        images.mkdir()
        source = Path(photos.importlib.util.find_spec("skimage").origin).parent / "data"
        for name in PHOTOS:
            box, caption = photos.PHOTOS[name]
            image = photos.cut_out(source / name, box)
            image.thumbnail((10_000, PHOTO_PX))
            path = images / f"{Path(name).stem}.png"
            image.save(path)
            path.with_suffix(".txt").write_text(f"a photo of {caption}\n", encoding="utf-8")
        return cls(checkpoints, images)


@dataclass(frozen=True)
class Outcome:
    """How a prompt ended: every message about it, and what the server remembers of it."""

    messages: list[tuple[str, Any]]
    history: dict[str, Any]

    @property
    def ended(self) -> str:
        """`execution_success`, `execution_error` or `execution_interrupted`."""
        return self.messages[-1][0]

    @property
    def error(self) -> str:
        return self.messages[-1][1]["exception_message"].strip()

    @property
    def outputs(self) -> dict[str, Any]:
        return self.history["outputs"]

    def of(self, kind: str, node: str | None = None) -> list[Any]:
        """The data of the messages of one kind, about one node."""
        found = [data for name, data in self.messages if name == kind]
        return [data for data in found if node is None or data.get("node") == node]

    def ran(self) -> set[str]:
        """The nodes that were really executed, not taken from the server's cache."""
        return {data["node"] for data in self.of("executing") if data["node"]}

    def texts(self, node: str) -> list[str]:
        return [data["text"] for data in self.of("text", node)]


class Lab:
    """One base directory and its server. `start` and `stop` as often as wanted."""

    def __init__(self, host: hosts.Host, base: Path, materials: Materials, *arguments: str) -> None:
        self.host, self.base, self.arguments = host, base, arguments
        self.input, self.output = base / "input", base / "output"
        self.loras = self.output / "loras"
        self.weave = base / "user" / "__lora_weave"
        self._open = ExitStack()
        self.client: Any = None
        self.server: Any = None
        hosts.make_base(base)
        (base / "page").mkdir(exist_ok=True)  # the real page is not needed, nor installed perhaps
        for path in materials.checkpoints.iterdir():
            shutil.copy(path, base / "models" / "checkpoints")
        self.photos = self.folder("photos", materials.photos)

    def folder(self, name: str, source: Path | None = None) -> Path:
        """A dataset folder under input: a copy of `source`, or empty."""
        path = self.input / name
        shutil.rmtree(path, ignore_errors=True)
        if source is None:
            path.mkdir(parents=True)
        else:
            shutil.copytree(source, path)
        return path

    def start(self) -> Lab:
        page = ("--front-end-root", str(self.base / "page"))
        self.server = self._open.enter_context(
            Server(
                self.host,
                self.base,
                log=self.base / "server.log",
                arguments=(*page, *self.arguments),
            )
        )
        self.client = self._open.enter_context(_client.Client(self.server.address))
        return self

    def stop(self) -> None:
        self._open.close()

    def restart(self) -> Lab:
        self.stop()
        return self.start()

    # --- prompts

    def run(self, graph: Mapping[str, Any], *, interrupt_at: int | None = None) -> Outcome:
        """Queue a graph and wait for its end; interrupt when its training has come to a step.

        `interrupt_at` counts steps that were reported; the one after it is under way by then.
        """
        client = self.client
        already, interrupted = len(client.messages), False
        prompt_id = client.queue(graph)
        for kind, data in client.follow(prompt_id, SILENCE_S):
            if interrupt_at is None or interrupted or kind != "progress":
                continue
            trains = graph[data["node"]]["class_type"] == "LoRAWeaveTrain"
            steps = graph[data["node"]]["inputs"].get("steps")
            if trains and data["max"] == steps and data["value"] >= interrupt_at:
                client.interrupt()
                interrupted = True
        for _ in range(200):  # the history is written a moment after the last message
            history = client.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return Outcome(client.messages[already:], history[prompt_id])
            time.sleep(0.05)
        raise AssertionError("the server has no history of the prompt")

    def forget(self) -> None:
        """Empty the host's own cache of node outputs: it keeps those of the last prompt only."""
        text = {"class_type": "PreviewAny", "inputs": {"source": time.time()}}
        self.succeed({"only": text})

    def succeed(self, graph: Mapping[str, Any]) -> Outcome:
        outcome = self.run(graph)
        assert outcome.ended == "execution_success", f"{outcome.error}\n{self.server.log_tail(60)}"
        return outcome

    def fail(self, graph: Mapping[str, Any]) -> str:
        """The message with which a node of the graph ends it."""
        outcome = self.run(graph)
        assert outcome.ended == "execution_error", outcome.ended
        return outcome.error

    def reject(self, graph: Mapping[str, Any]) -> str:
        """The message of the one or the other: hosts differ in what they look at beforehand."""
        try:
            return self.fail(graph)
        except _client.PromptError as error:
            return str(error)

    def refuse(self, graph: Mapping[str, Any]) -> str:
        """The message with which the server does not even queue the graph."""
        try:
            self.client.queue(graph)
        except _client.PromptError as error:
            return str(error)
        raise AssertionError("the graph was queued")

    def pixels(self, outcome: Outcome, node: str, index: int = 0, of: int = 1) -> np.ndarray:
        """A picture `of` those that a SaveImage node has written, (H, W, 3) in steps of 1/255."""
        images = outcome.outputs[node]["images"]
        assert len(images) == of
        shown = images[index]
        with Image.open(io.BytesIO(self.client.image(shown))) as image:
            return np.asarray(image.convert("RGB")).astype(np.int16)

    def defaults(self, class_type: str) -> dict[str, Any]:
        """Values for a core node's inputs, which differ by the host's version."""
        required = self.client.get(f"/object_info/{class_type}")[class_type]["input"]["required"]
        return {
            name: spec[1]["default"]
            for name, spec in required.items()
            if len(spec) > 1 and "default" in spec[1]
        }

    # --- what runs leave on disk

    def runs(self) -> dict[str, dict[str, Any]]:
        """`run.json` of every run by the run's id."""
        records = (self.weave / "runs").glob("*/run.json")
        return {path.parent.name: json.loads(path.read_text("utf-8")) for path in records}

    def run_of(self, output: Path) -> tuple[Path, dict[str, Any]]:
        """Folder and record of the run that owns a LoRA file."""
        for run_id, record in self.runs().items():
            if record["output"] == str(output):
                return self.weave / "runs" / run_id, record
        raise AssertionError(f"no run owns {output}")


def trained_steps(outcome: Outcome, steps: int) -> tuple[int, ...]:
    """The first and the last step that was shown while the prompt ran; () without training.

    0.33 leaves out some of those between, when they are less than 100 ms apart.
    """
    shown = [data for data in outcome.of("progress", "train") if data["max"] == steps]
    values = [data["value"] for data in shown]
    assert values == sorted(values)
    return (values[0], values[-1]) if values else ()


# --- reading files with the library, not with ours


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def body_of(path: Path) -> bytes:
    """What kohya's `addnet_hash_safetensors` hashes: everything behind the header."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
