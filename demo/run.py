"""The demo, run by `dev.py demo`: train a LoRA in a real ComfyUI and show what it changed."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
if "lora_weave" not in sys.modules:  # the pack has this name, whatever its folder is called
    _pack = types.ModuleType("lora_weave")
    _pack.__path__ = [str(ROOT)]
    sys.modules["lora_weave"] = _pack

from lora_weave.demo import photos, pictures, workflow  # noqa: E402
from lora_weave.demo.client import Client, PromptError, raise_failure  # noqa: E402
from lora_weave.demo.progress_bar import Bar  # noqa: E402
from lora_weave.devtools import hosts  # noqa: E402
from lora_weave.devtools.commands import STEPS_HELP, count_of  # noqa: E402
from lora_weave.devtools.paths import SetupError  # noqa: E402
from lora_weave.devtools.processes import heed_termination  # noqa: E402
from lora_weave.devtools.server import Server  # noqa: E402
from lora_weave.lora_core import captions  # noqa: E402

WORKFLOW = ROOT / "example_workflows" / "train_and_compare.json"
TINY = "tiny_sd15.ckpt"
PHOTO_FOLDER = "lora_weave_photos"
ABSTRACT = (
    "The tiny base model has random weights, so its pictures are abstract:",
    "the demo shows that training changes them, not how good a LoRA can look.",
)


def main() -> int:
    heed_termination()
    options = parse()
    host = hosts.Host(Path(os.environ["LORA_WEAVE_COMFYUI"]), Path(sys.executable), own=False)
    try:
        return run(options, host, hosts.make_base())
    except (SetupError, PromptError, ConnectionError, TimeoutError) as problem:
        print(f"\nError: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one was.", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=count_of, help=STEPS_HELP)
    parser.add_argument("--checkpoint", type=Path, help="your own base model")
    parser.add_argument("--images", type=Path, help="your own folder of images and captions")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, host: hosts.Host, base: Path) -> int:
    """Everything that is made goes below `base`, a base directory with the pack in it."""
    arguments = prepare(options, host, base)
    print("Starting ComfyUI ...", flush=True)
    with Server(host, base, log=base / "demo.log", arguments=arguments) as server:
        with Client(server.address) as client:
            graph = make_graph(options, client.get("/object_info"))
            shown, seconds = queue(client, graph)
            try:
                made = results(options, client, graph, shown, base)
            except KeyError as problem:
                raise PromptError(f"the server did not show the result of {problem}") from None
    print(f"\nTrained and sampled in {seconds:.0f} s.")
    for name, path in made.items():
        print(f"  {name:13} {path}")
    if not options.checkpoint:
        print(" ".join(ABSTRACT))
    return 0


def prepare(options: argparse.Namespace, host: hosts.Host, base: Path) -> list[str]:
    """Make what the user did not bring; returns the server arguments by which it finds the rest."""
    section: dict[str, Any] = {"is_default": True}
    if options.checkpoint:
        section["checkpoints"] = str(options.checkpoint.resolve().parent)
    else:
        checkpoints = base / "models" / "checkpoints"
        script = ROOT / "demo" / "tiny_checkpoint.py"
        if not newer(checkpoints / TINY, script):
            print("Making a tiny SD1.5 checkpoint ...", flush=True)
            line = [str(host.python), str(script), str(checkpoints), "--comfyui", str(host.path)]
            made = subprocess.run([*line, "--family", "sd15"], capture_output=True, text=True)
            if made.returncode:
                raise SetupError(f"The tiny checkpoint could not be made:\n{made.stderr[-2000:]}")
    if options.images:
        section["lora_weave_datasets"] = str(options.images.resolve())
    else:
        images = photos.write(base / "input" / PHOTO_FOLDER)
        print(f"{len(images)} photographs with captions are in {images[0].parent}", flush=True)
    # A yaml of its own says what the server may read besides its base directory; JSON is YAML.
    yaml = base / "demo_model_paths.yaml"
    yaml.write_text(json.dumps({"lora_weave_demo": section}, indent=1) + "\n", encoding="utf-8")
    return ["--extra-model-paths-config", str(yaml)]


def newer(path: Path, than: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= than.stat().st_mtime


def make_graph(options: argparse.Namespace, object_info: dict[str, Any]) -> dict[str, Any]:
    """The example workflow, with the user's files and steps."""
    saved = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    graph = workflow.to_api(saved, object_info)

    def inputs(class_type: str, title: str = "") -> dict[str, Any]:
        return graph[workflow.find(graph, class_type, title)]["inputs"]

    train = inputs("LoRAWeaveTrain")
    if options.checkpoint:
        inputs("CheckpointLoaderSimple")["ckpt_name"] = options.checkpoint.name
        # 0 is automatic: by the model's family and the number of images
        inputs("LoRAWeaveImageFolder").update(resolution=0, bucket_step=64)
        train.update(rank=0, steps=0, learning_rate=0.0, batch_size=0)
        inputs("EmptyLatentImage").update(width=512, height=512)
        for title in ("Sample without the LoRA", "Sample with the LoRA"):
            inputs("KSampler", title).update(steps=20, cfg=5.0)
    if options.images:
        folder = options.images.resolve()
        inputs("LoRAWeaveImageFolder")["folder"] = str(folder)
        inputs("CLIPTextEncode", "Prompt")["text"] = first_caption(folder)
    if options.steps is not None:
        train["steps"] = options.steps
    return graph


def first_caption(folder: Path) -> str:
    """The first caption that can be read. Those that can't are the training's to complain of."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in captions.CAPTION_ENDINGS:
            continue
        try:
            text, _ = captions.read(path)
        except ValueError:
            continue
        if text:
            return text
    return ""


def queue(client: Client, graph: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Run the graph, showing progress; returns what its nodes showed, and how long it took."""
    start = time.monotonic()
    bar = Bar({node_id: node["_meta"]["title"] for node_id, node in graph.items()})
    prompt_id = client.queue(graph)
    try:
        for kind, data in client.follow(prompt_id):
            bar.see(kind, data)
            raise_failure(kind, data)
    except KeyboardInterrupt:
        client.interrupt()  # the training writes its state before it ends
        for _ in client.follow(prompt_id, timeout_s=60):
            pass
        raise
    finally:
        bar.close()
    return client.outputs(prompt_id), time.monotonic() - start


def results(
    options: argparse.Namespace,
    client: Client,
    graph: dict[str, Any],
    shown: dict[str, Any],
    base: Path,
) -> dict[str, Path]:
    """Draw the pictures; returns every file to look at by its name."""
    folder = base / "output" / "lora_weave_demo"
    folder.mkdir(parents=True, exist_ok=True)
    lora = Path(shown[workflow.find(graph, "PreviewAny")]["text"][0])

    def images(title: str) -> list[Image.Image]:
        listed = shown[workflow.find(graph, "SaveImage", title)]["images"]
        return [Image.open(io.BytesIO(client.image(image))) for image in listed]

    prompt = graph[workflow.find(graph, "CLIPTextEncode", "Prompt")]["inputs"]["text"]
    caption = [f"Prompt: {prompt}"] + ([] if options.checkpoint else list(ABSTRACT))
    grid = folder / "before_after.png"
    pictures.before_after(images("Before"), images("After"), caption).save(grid)
    made = {"LoRA": lora, "Before, after": grid}
    losses = read_losses(base, lora)
    if losses:
        curve = folder / "loss.png"
        pictures.loss_curve(losses).save(curve)
        made["Loss curve"] = curve
        made_of = losses[: len(losses) // 10 or 1], losses[-(len(losses) // 10 or 1) :]
        first, last = (sum(part) / len(part) for part in made_of)
        print(
            f"Mean loss: {first:.3f} in the first tenth of {len(losses)} steps, "
            f"{last:.3f} in the last tenth"
        )
    return made


def read_losses(base: Path, lora: Path) -> list[float]:
    """The losses of the run that wrote this LoRA; a step that was done again counts once."""
    for record in (base / "user").glob("__lora_weave/runs/*/run.json"):
        if json.loads(record.read_text(encoding="utf-8")).get("output") != str(lora):
            continue
        losses: dict[int, float] = {}
        for line in (record.parent / "events.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "stepped" and not event["skipped"]:
                losses[event["step"]] = event["loss"]
        return [losses[step] for step in sorted(losses)]
    return []


if __name__ == "__main__":
    sys.exit(main())
