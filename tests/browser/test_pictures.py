"""The pictures of the README and the help pages, taken as the page draws them.

With LORA_WEAVE_PICTURES=docs/images they are written there; else they are only looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import FloatRect

from lora_weave.devtools.page_tools import PAGES
from lora_weave.devtools.paths import ROOT

from .conftest import CLASSIC, NODES_2
from .loras import CHECKPOINT, DETAIL, FOLDER, GRAIN, PEOPLE, STYLES
from .stack_page import CLEAR, StackPage

FULL = PAGES[1]
QUIET = {"Comfy.Graph.CanvasMenu": False}
LIGHT = {"Comfy.ColorPalette": "light"}
AT = (420, 160)
# The host looks for a help page's pictures from web/docs, not from the page's folder.
IN_HELP = ROOT / "web" / "docs" / "LoRAWeaveStack" / "lora-stack.png"
ROWS = [
    {"on": True, "name": PEOPLE, "model": 0.8},
    {
        **{"on": True, "name": STYLES, "model": 0.65, "clip": 0.4},
        **{"blocks": {"IN04": 0.5, "OUT": 0.75}, "schedule": "0:0, 0.3:1, 1:0.5"},
    },
    {"on": False, "name": DETAIL, "model": -0.4},
    {"on": True, "name": GRAIN, "model": 0.35},
]
# A graph from images to a blended LoRA: type, place, width, and values of widgets by name.
GRAPH = [
    ("CheckpointLoaderSimple", [100, 160], 290, {"ckpt_name": CHECKPOINT}),
    (
        "LoRAWeaveImageFolder",
        [100, 350],
        290,
        {"folder": FOLDER, "trigger_word": "gingercat", "resolution": 512},
    ),
    ("LoRAWeaveTrain", [450, 160], 320, {"output_name": "ginger_cat", "training_seed": 42}),
    ("LoRAWeaveStack", [830, 160], 480, {"normalise": "sum to 1", "mode": "live"}),
]
LINKS = [(0, 0, 2, "model"), (1, 0, 2, "dataset"), (0, 1, 2, "clip"), (0, 2, 2, "vae")]
LINKS += [(0, 0, 3, "model"), (0, 1, 3, "clip"), (2, 0, 3, "lora_1")]
BUILD = """([graph, links]) => {
    const nodes = graph.map(([type, at, width, values]) => {
        const node = LiteGraph.createNode(type);
        node.pos = at;
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) {
            node.widgets.find((widget) => widget.name === name).value = value;
        }
        node.setSize([width, node.computeSize()[1]]);
        return node;
    });
    for (const [from, slot, to, name] of links) {
        nodes[from].connect(slot, nodes[to], nodes[to].findInputSlot(name));
    }
    app.graph.setDirtyCanvas(true, true);
}"""
# Nodes with their titles, in the page's pixels: the canvas is at 100 %.
BOUNDS = """() => app.graph.nodes.map((node) => [...node.pos, ...node.size])"""


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., Image.Image]:
    """take(stack, name, *elements): a picture of all nodes and of those elements, whole."""
    folder = os.environ.get("LORA_WEAVE_PICTURES")

    def take(stack: StackPage, name: str, *elements: str) -> Image.Image:
        path = (ROOT / folder if folder else tmp_path) / f"{name}.png"
        stack.page.wait_for_timeout(500)
        stack.page.screenshot(path=path, clip=frame(stack, elements))
        with Image.open(path) as shot:
            picture = shot.convert("RGB")
        picture.save(path, optimize=True)
        if folder and name == IN_HELP.stem:
            shutil.copy(path, IN_HELP)
        return picture

    return take


def frame(stack: StackPage, elements: tuple[str, ...]) -> FloatRect:
    margin, title = 24, 34
    boxes = [(x, y - title, x + w, y + h) for x, y, w, h in stack.page.evaluate(BOUNDS)]
    for selector in elements:
        box = stack.page.locator(selector).first.bounding_box()
        assert box is not None
        boxes.append((box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]))
    left, top = min(box[0] for box in boxes) - margin, min(box[1] for box in boxes) - margin
    right, bottom = max(box[2] for box in boxes) + margin, max(box[3] for box in boxes) + margin
    size = stack.page.viewport_size
    assert size is not None
    assert left >= 60 and top >= 90, "the page's bars would be in the picture"
    assert right <= size["width"] and bottom <= size["height"], "a node is cut off"
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


def opened(open_page: Callable[..., StackPage], mode: str, **settings: object) -> StackPage:
    stack = open_page(FULL, mode, **{**QUIET, **settings})
    stack.page.evaluate(CLEAR)
    return stack


def with_rows(
    open_page: Callable[..., StackPage], mode: str, at: tuple[int, int] = AT, **settings: object
) -> StackPage:
    stack = opened(open_page, mode, **settings)
    stack.add(*at)
    stack.set_rows(*ROWS)
    stack.set_widget("normalise", "sum to 1")
    stack.page.get_by_text("people · SD1.5 · rank 4").wait_for()
    return stack


def test_picture_of_a_training_graph(open_page, take):
    stack = opened(open_page, NODES_2)
    stack.page.evaluate(BUILD, [GRAPH, LINKS])
    stack.set_rows(*ROWS[:2])
    stack.page.get_by_text("people · SD1.5 · rank 4").wait_for()
    picture = take(stack, "training-graph")
    assert picture.width > 1200 and len(picture.getcolors(1 << 20) or []) > 60


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [("lora-stack", NODES_2, {}), ("lora-stack-light", CLASSIC, LIGHT)],
)
def test_picture_of_the_stack(open_page, take, name, mode, settings):
    stack = with_rows(open_page, mode, **settings)
    stack.row(0).locator(".lw-name").hover()
    stack.page.locator(".lw-hover img").wait_for()
    take(stack, name, ".lw-hover")


@pytest.mark.parametrize("locale", ["en", "ja"])
def test_help_shows_the_picture_of_the_stack(open_page, locale):
    """Found as the page does it: from the docs of the folder that the host has loaded us from."""
    page = opened(open_page, NODES_2).page
    help_text, docs = page.evaluate(
        """async (locale) => {
            const node = (await (await fetch('/object_info/LoRAWeaveStack')).json()).LoRAWeaveStack;
            const docs = `/extensions/${node.python_module.split('.')[1]}/docs/`;
            const answer = await fetch(`${docs}${node.name}/${locale}.md`);
            return [await answer.text(), docs];
        }""",
        locale,
    )
    (source,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", help_text)
    served = page.request.get(f"{page.url.rstrip('/')}{docs}{source}")
    assert served.ok and served.headers["content-type"] == "image/png"
    assert served.body() == (ROOT / "docs" / "images" / "lora-stack.png").read_bytes()
    assert len(served.body()) < 150_000


def test_picture_of_the_picker(open_page, take):
    stack = with_rows(open_page, NODES_2)
    stack.button("Add LoRA").click()
    stack.page.get_by_role("combobox", name="Search LoRAs").fill("a")
    stack.page.locator(".lw-picker-side img").wait_for()
    take(stack, "lora-stack-picker", ".lw-popover")


def test_picture_of_the_block_editor(open_page, take):
    stack = with_rows(open_page, NODES_2, at=(760, 160))  # the editor opens to the left
    stack.page.set_viewport_size({"width": 1400, "height": 1200})
    stack.row(1).get_by_role("button", name="Blocks and schedule").click()
    stack.page.get_by_role("slider").first.wait_for()
    take(stack, "lora-stack-blocks", ".lw-popover")


def test_picture_of_the_template_of_a_sweep(open_page, take):
    text = (ROOT / "example_workflows" / "stack_and_sweep.json").read_text("utf-8")
    for name, known in {
        "lora_weave_demo.safetensors": PEOPLE,
        "tiny_sd15.ckpt": CHECKPOINT,
    }.items():
        text = text.replace(name, known)
    workflow = json.loads(text)
    for node in workflow["nodes"]:
        node["pos"] = [node["pos"][0] + 60, node["pos"][1] + 240]
    stack = opened(open_page, NODES_2)
    stack.page.set_viewport_size({"width": 3100, "height": 1100})
    stack.load_workflow(workflow)
    stack.page.evaluate("app.canvas.ds.reset(); app.canvas.setDirty(true, true)")
    stack.page.get_by_text("people · SD1.5 · rank 4").wait_for()
    assert stack.page.evaluate("app.graph.links.size ?? Object.keys(app.graph.links).length") == 15
    take(stack, "stack-and-sweep")
