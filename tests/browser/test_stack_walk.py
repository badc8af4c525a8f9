"""What a user does with a LoRA Stack, from an empty node to the prompt that is sent."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from lora_weave.devtools.page_tools import PAGES

from .conftest import CLASSIC, NODES_2
from .loras import DETAIL, GRAIN, PEOPLE, STYLES
from .stack_page import StackPage

FULL = PAGES[1]
HOSTS = [(version, mode) for version in PAGES for mode in (CLASSIC, NODES_2)]
SHORT = [case for case in HOSTS if case[0] != FULL]


@pytest.fixture(params=[CLASSIC, NODES_2])
def stack(request: pytest.FixtureRequest, open_page: Callable[..., StackPage]) -> StackPage:
    return open_page(FULL, request.param)


@pytest.mark.parametrize(("version", "mode"), SHORT)
def test_a_short_walk(open_page: Callable[..., StackPage], version: str, mode: str):
    stack = open_page(version, mode)
    page = stack.page
    stack.add_lora("anna")
    stack.add_lora("water")
    assert stack.names() == [PEOPLE, STYLES]
    stack.row(1).get_by_role("switch").click()
    stack.drag(stack.row(0).locator(".lw-grip"), 0, 42)
    stack.until(lambda: stack.names() == [STYLES, PEOPLE], "the row was not moved")
    stack.drag(stack.model(1), 40, 0)
    assert stack.rows()[1]["model"] == 1.5
    page.keyboard.press("Control+z")
    stack.until(lambda: stack.rows()[1]["model"] == 1, "undo did not change the row")
    stack.until(lambda: stack.model(1).inner_text() == "1.00", "undo is not shown")
    stack.model(1).focus()
    page.keyboard.type("0.55")
    page.keyboard.press("Enter")
    stack.until(lambda: stack.rows()[1]["model"] == 0.55, "the row is not the one of the graph")
    saved = stack.saved()
    value = stack.text()
    page.reload()
    stack.load()
    stack.load_workflow(saved)
    assert stack.text() == value
    assert stack.shown_names() == ["watercolour soft", "anna"]
    (sent,) = stack_nodes(page.evaluate("async () => (await app.graphToPrompt()).output"))
    assert sent["inputs"] == {"normalise": "off", "master": 1, "mode": "patch", "rows": value}


def test_the_whole_walk(stack: StackPage):
    """Add, search, toggle, reorder, strengths, blocks, schedule, normalise, save, reload, queue."""
    page = stack.page
    for query in ("anna", "wtrclr", "twe", "grain"):
        stack.add_lora(query)
    assert stack.names() == [PEOPLE, STYLES, DETAIL, GRAIN]
    assert stack.shares() == ["25%"] * 4

    reorder(stack)
    assert stack.names() == [STYLES, DETAIL, PEOPLE, GRAIN]
    change_strengths(stack)
    change_blocks_and_schedule(stack)
    stack.row(3).get_by_role("switch").click()
    stack.until(lambda: stack.shares()[3] == "–", "a row that is off has a share")

    wanted = [
        {"on": True, "name": STYLES, "model": 0.6, "clip": 0.25},
        {"on": True, "name": DETAIL, "model": 0.2, "blocks": {"IN04": 0.5, "OUT03": 0}},
        {"on": True, "name": PEOPLE, "model": 1, "schedule": "0:0, 0.4:1"},
        {"on": False, "name": GRAIN, "model": 1},
    ]
    assert stack.rows() == wanted
    stack.set_widget("normalise", "sum to 1")
    used = page.locator(".lw-row .lw-used")
    stack.until(lambda: used.all_inner_texts()[:2] == ["0.33", "0.11"], "not normalised")
    assert stack.shares() == ["33%", "11%", "56%", "–"]

    saved = stack.saved()
    page.reload()
    stack.load()
    stack.load_workflow(saved)
    assert stack.rows() == wanted
    assert stack.shown_names() == ["watercolour soft", "detail_tweaker", "anna", "film_grain"]
    page.evaluate(
        """() => {
            const [node] = app.graph.nodes;
            const shown = LiteGraph.createNode('PreviewAny');
            app.graph.add(shown);
            node.connect(4, shown, 0);
        }"""
    )
    (sent,) = stack_nodes(stack.queue())
    rows = json.loads(sent["inputs"].pop("rows"))
    assert rows == {"v": 1, "rows": wanted}
    assert sent["inputs"] == {"normalise": "sum to 1", "master": 1, "mode": "patch"}


def stack_nodes(prompt: dict) -> list[dict]:
    return [node for node in prompt.values() if node["class_type"] == "LoRAWeaveStack"]


def reorder(stack: StackPage) -> None:
    """anna two down by mouse, then up and down again by keys."""
    stack.drag(stack.row(0).locator(".lw-grip"), 0, 84)
    stack.until(lambda: stack.names()[2] == PEOPLE, "the row was not dragged")
    stack.page.keyboard.press("Alt+ArrowUp")
    assert stack.names()[1] == PEOPLE
    stack.page.keyboard.press("Alt+ArrowDown")
    assert stack.names()[2] == PEOPLE
    label = stack.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("3 of 4: anna")


def change_strengths(stack: StackPage) -> None:
    """By typing, wheel, arrow keys, drag and double click; the clip's follows until unlinked."""
    page = stack.page
    stack.model(0).click()
    page.keyboard.type("0,7")
    page.keyboard.press("Enter")
    assert stack.rows()[0]["model"] == 0.7
    page.mouse.wheel(0, 100)
    stack.until(lambda: stack.rows()[0]["model"] == 0.65, "the wheel did nothing")
    page.keyboard.press("ArrowDown")
    assert stack.rows()[0] == {"on": True, "name": STYLES, "model": 0.6}
    assert stack.clip(0).inner_text() == "0.60"
    stack.row(0).get_by_role("button", name="Give the text encoder").click()
    stack.clip(0).focus()
    page.keyboard.type("0.25")
    page.keyboard.press("Enter")
    stack.drag(stack.model(1), -64, 0)
    assert stack.rows()[1]["model"] == pytest.approx(0.2)
    stack.model(2).focus()
    page.keyboard.press("PageUp")
    assert stack.rows()[2]["model"] == 1.5
    stack.model(2).dblclick()
    assert stack.rows()[2]["model"] == 1


def change_blocks_and_schedule(stack: StackPage) -> None:
    page = stack.page
    stack.row(1).hover()
    stack.row(1).get_by_role("button", name="Blocks and schedule").click()
    sliders = page.get_by_role("slider")
    sliders.first.wait_for()
    labels = [slider.get_attribute("aria-label") for slider in sliders.all()]
    assert len(labels) == 1 + 12 + 3 + 12  # the family's, not only those of the file
    assert {"Weight of block IN04", "Weight of block OUT03"} <= set(labels)
    dimmed = page.locator(".lw-slider.lw-absent").all()
    assert len(dimmed) == len(labels) - 4
    assert "this file does not change it" in (dimmed[0].get_attribute("title") or "")
    four = page.get_by_role("slider", name="Weight of block IN04")
    track = four.locator(".lw-slider-track").bounding_box()
    assert track is not None
    page.mouse.click(track["x"] + 5, track["y"] + track["height"] * 0.75)
    stack.until(lambda: stack.rows()[1].get("blocks") == {"IN04": 0.5}, "the slider did nothing")
    page.get_by_role("slider", name="Weight of block OUT03").focus()
    page.keyboard.press("Home")
    assert stack.rows()[1]["blocks"] == {"IN04": 0.5, "OUT03": 0}
    page.keyboard.press("Escape")

    stack.row(2).get_by_role("button", name="Menu of anna").click()
    page.get_by_role("menuitem", name="Blocks and schedule").click()
    field = page.get_by_role("textbox", name="Block weights")
    field.fill("1,0,0.5")
    field.press("Enter")
    page.get_by_text("3 block weights").wait_for()
    field.fill(",".join(["1"] * 16 + ["0.5"]))
    field.press("Enter")
    stack.until(lambda: stack.rows()[2].get("blocks") == {"OUT11": 0.5}, "numbers are not read")
    stack.button("Reset").click()
    schedule = page.get_by_role("textbox", name="Schedule")
    schedule.fill("0:0, x")
    schedule.press("Enter")
    page.get_by_text("x is no point").wait_for()
    assert "schedule" not in stack.rows()[2]
    page.get_by_role("button", name="Fade in").click()
    page.keyboard.press("Escape")
    assert "blocks" not in stack.rows()[2]
