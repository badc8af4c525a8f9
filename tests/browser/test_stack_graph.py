"""LoRA Stack in what a graph's user does with any node, and what else its header offers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator

from lora_weave.devtools.page_tools import PAGES

from .conftest import CLASSIC, NODES_2
from .loras import DETAIL, GRAIN, LONG, PEOPLE, STYLES
from .stack_page import StackPage

FULL = PAGES[1]
TWO = [{"on": True, "name": PEOPLE, "model": 0.8}, {"on": True, "name": STYLES, "model": 0.4}]

UNREADABLE = '{"rows": ['


@pytest.fixture
def stack(open_page: Callable[..., StackPage]) -> StackPage:
    return open_page(FULL, CLASSIC)


@pytest.mark.parametrize(("version", "mode"), [(PAGES[0], CLASSIC), (PAGES[2], NODES_2)])
def test_clones_and_subgraphs_have_rows_of_their_own(
    open_page: Callable[..., StackPage], version: str, mode: str
):
    stack = open_page(version, mode)
    page = stack.page
    stack.set_rows(*TWO)
    page.evaluate(
        """() => {
            const [node] = app.graph.nodes;
            app.canvas.selectNode(node);
            app.canvas.copyToClipboard();
            app.canvas.pasteFromClipboard();
        }"""
    )
    values = "app.graph.nodes.map((node) => JSON.parse(node.widgets.at(-1).value).rows.length)"
    assert page.evaluate(values) == [2, 2]
    stack.row(0).press("Delete")
    stack.until(lambda: sorted(page.evaluate(values)) == [1, 2], "both nodes have changed")
    inside = page.evaluate(
        """async () => {
            const [node] = app.graph.nodes;
            app.canvas.selectNode(node);
            const { subgraph, node: outside } = app.graph.convertToSubgraph(new Set([node]));
            const [inner] = subgraph.nodes;
            const prompt = (await app.graphToPrompt()).output;
            const names = outside.inputs.map((input) => input.name);
            return [inner.widgets.at(-1).value, names, prompt];
        }"""
    )
    value, names, prompt = inside
    sent = [node["inputs"]["rows"] for key, node in prompt.items() if ":" in key]
    assert sent == [value]
    assert "rows" not in names


def test_the_rows_survive_another_workflow_in_between(stack: StackPage):
    stack.set_rows(*TWO)
    saved, value = stack.saved(), stack.text()
    stack.load_workflow({**saved, "nodes": [], "links": []})
    assert stack.page.locator(".lw-row").count() == 0
    stack.load_workflow(saved)
    stack.page.locator(".lw-row").nth(1).wait_for()
    assert stack.text() == value


def test_rows_follow_tabs_and_modes(open_page: Callable[..., StackPage]):
    """The newest page leaves elements of earlier nodes in the place of others with their id."""
    stack = open_page(PAGES[2], NODES_2)
    page = stack.page
    execute = "async (name) => { await app.extensionManager.command.execute(name); }"
    stack.set_rows(*TWO)
    stack.row(1).wait_for()
    page.evaluate(execute, "Comfy.NewBlankWorkflow")
    stack.until(lambda: page.locator(".lw-stack").count() == 0, "there is no other tab")
    stack.add()
    stack.set_rows(TWO[1])
    stack.until(lambda: stack.shown_names() == ["watercolour soft"], "the tab shows other rows")
    page.evaluate(execute, "Workspace.PreviousOpenedWorkflow")
    stack.until(lambda: stack.shown_names() == ["anna", "watercolour soft"], "not its own rows")
    setting = (
        "async (on) => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on); }"
    )
    for strength, vue in ((0.3, False), (0.2, True)):
        page.evaluate(setting, vue)
        inside = page.locator(".dom-widget .lw-stack")
        stack.until(lambda vue=vue, inside=inside: (inside.count() == 0) == vue, "mode not changed")
        stack.model(0).focus()
        page.keyboard.type(str(strength))
        page.keyboard.press("Enter")
        assert [row["model"] for row in stack.rows()] == [strength, 0.4]


def test_a_schedule_that_patches_cannot_follow_is_told(stack: StackPage):
    stack.set_rows({**TWO[0], "schedule": "0:0, 1:1"})
    button = stack.row(0).get_by_role("button", name="Blocks and schedule")
    assert button.get_attribute("title") == "Schedule 0:0, 1:1"
    stack.page.evaluate(
        """() => {
            const loader = LiteGraph.createNode('CheckpointLoaderSimple');
            app.graph.add(loader);
            loader.connect(0, app.graph.nodes[0], 0);
        }"""
    )
    told = "A schedule needs mode live; Schedule 0:0, 1:1"
    stack.until(lambda: button.get_attribute("title") == told, "the mode is not looked at")
    stack.set_widget("mode", "live")
    stack.until(lambda: "needs" not in (button.get_attribute("title") or ""), "still told")


def test_a_missing_file_is_red_with_the_nearest_name_to_click(stack: StackPage):
    stack.set_rows({"on": True, "name": "people/ana.safetensors", "model": 0.8})
    fix = stack.button("Use anna")
    fix.wait_for()
    assert "lw-missing" in (stack.row(0).get_attribute("class") or "")
    assert is_red(stack)
    fix.click()
    stack.until(lambda: stack.names() == [PEOPLE], "the name was not replaced")
    assert "lw-missing" not in (stack.row(0).get_attribute("class") or "")
    assert not is_red(stack)


def test_rows_of_other_packs_are_drawn_as_they_are_queued(stack: StackPage):
    """A name without folder or ending is a file's; "None" is a row that is off."""
    stack.set_rows({"name": "anna", "strength": 0.5}, {"on": True, "lora": "None", "strength": 1})
    stack.page.get_by_text("SD1.5").first.wait_for()
    assert "lw-missing" not in (stack.row(0).get_attribute("class") or "") and not is_red(stack)
    assert stack.shares() == ["100%", "–"]
    assert "lw-missing" not in (stack.row(1).get_attribute("class") or "")


def test_a_row_without_a_name_is_red_while_it_is_on(stack: StackPage):
    stack.set_rows({"on": True, "name": "", "model": 1})
    stack.page.get_by_text("Choose a LoRA").wait_for()
    assert is_red(stack)
    stack.row(0).get_by_role("switch").click()
    stack.until(lambda: not is_red(stack), "a row that is off fails nothing")


def is_red(stack: StackPage) -> bool:
    """Whether the first row's name is written in red."""
    colour = stack.page.locator(".lw-name-text").first.evaluate(
        "(name) => getComputedStyle(name).color"
    )
    red, green, blue = [
        int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")
    ]
    return red > 200 and green < 120 and blue < 120


def test_files_that_come_and_go_meanwhile_are_seen(stack: StackPage, base: Path):
    """By the list when it opens, after an execution, and when the page asks for all nodes anew."""
    page = stack.page
    loras = base / "models" / "loras"
    new = loras / "just trained.safetensors"
    stack.set_rows(TWO[0], {"on": False, "name": new.name, "model": 1})
    page.locator(".lw-missing").wait_for()
    try:
        shutil.copy(loras / PEOPLE, new)
        stack.button("Add").click()
        page.get_by_role("option", name="just trained").wait_for()
        page.keyboard.press("Escape")
        stack.until(lambda: page.locator(".lw-missing").count() == 0, "the row is still red")
        new.unlink()
        page.evaluate(
            """() => {
                const shown = LiteGraph.createNode('PreviewAny');
                app.graph.add(shown);
                app.graph.nodes[0].connect(4, shown, 0);
            }"""
        )
        stack.queue()
        page.locator(".lw-missing").wait_for()
        shutil.copy(loras / PEOPLE, new)
        page.evaluate("async () => { await app.refreshComboInNodes(); }")
        stack.until(lambda: page.locator(".lw-missing").count() == 0, "R was not followed")
    finally:
        new.unlink(missing_ok=True)


def test_header_sorts_switches_and_keeps_presets(stack: StackPage):
    page = stack.page
    rows = [{**row, "on": on} for row, on in zip(reversed(TWO), (True, False), strict=True)]
    stack.set_rows(*rows)
    everything = page.get_by_role("checkbox", name="Switch all on or off")
    assert everything.get_attribute("aria-checked") == "mixed"
    everything.click()
    assert [row["on"] for row in stack.rows()] == [True, True]
    everything.click()
    assert [row["on"] for row in stack.rows()] == [False, False]
    everything.click()
    stack.button("Sort").click()
    page.get_by_role("menuitem", name="By name").click()
    assert stack.names() == [PEOPLE, STYLES]

    stack.button("Presets").click()
    page.get_by_role("textbox", name="Name of the preset").fill("Soft / two")
    page.keyboard.press("Enter")
    stack.button("Soft / two").wait_for()
    page.get_by_role("textbox", name="Name of the preset").fill("Soft / two")
    page.keyboard.press("Enter")
    page.get_by_text("There is a preset Soft / two already.").wait_for()
    stack.button("Overwrite").click()
    page.get_by_text("There is a preset").wait_for(state="detached")
    page.keyboard.press("Escape")
    stack.button("Copy and paste as text").click()
    page.get_by_role("menuitem", name="Remove all").click()
    assert stack.rows() == []
    stack.button("Presets").click()
    stack.button("Soft / two").click()
    stack.until(lambda: stack.rows() == TWO, "the preset was not loaded")
    stack.button("Presets").click()
    stack.button("Soft / two: Append to the rows").click()
    stack.until(lambda: stack.rows() == TWO + TWO, "the preset was not appended")
    stack.button("Presets").click()
    stack.button("Soft / two: Delete").click()
    assert stack.button("Soft / two").count() == 1, "it was deleted without a question"
    stack.button("Delete").click()
    page.get_by_text("No presets saved yet").wait_for()


def test_a_preset_that_cannot_be_read_is_told(stack: StackPage):
    page = stack.page
    stack.set_rows(*TWO)
    save = """async (method) => {
        const route = '/api/userdata/lora_weave%2Fstacks%2Fbroken.json?overwrite=true';
        await fetch(route, { method, body: method === 'POST' ? '{"name": "broken"}' : undefined });
    }"""
    page.evaluate(save, "POST")
    stack.button("Presets").click()
    stack.button("broken").click()
    page.get_by_text("rows are missing").wait_for()
    assert stack.rows() == TWO
    page.evaluate(save, "DELETE")


def test_text_that_may_not_be_copied_is_offered(stack: StackPage):
    page = stack.page
    stack.set_rows(TWO[0])
    page.evaluate(
        """() => {
            navigator.clipboard.writeText = async () => { throw new Error('refused'); };
            document.execCommand = () => false;
        }"""
    )
    stack.button("Copy and paste as text").click()
    page.get_by_role("menuitem", name="Copy as text").click()
    page.get_by_text("The browser refused to copy").wait_for()
    assert page.locator(".lw-popover textarea").input_value() == "<lora:people/anna:0.8>"


def test_text_is_pasted_and_copied(stack: StackPage):
    page = stack.page
    paste = """(text) => {
        const clipboardData = new DataTransfer();
        clipboardData.setData('text/plain', text);
        const options = { clipboardData, bubbles: true, cancelable: true };
        document.activeElement.dispatchEvent(new ClipboardEvent('paste', options));
    }"""
    stack.add_lora("grain")
    stack.row(0).focus()
    page.evaluate(paste, "a cat <lora:anna:0.5:0.25>")
    assert stack.rows()[1] == {"on": True, "name": PEOPLE, "model": 0.5, "clip": 0.25}
    page.evaluate("document.activeElement.blur(); app.canvas.selectNode(app.graph.nodes[0])")
    page.evaluate(paste, "<lora:detail_tweaker:0.3>")
    assert stack.names() == [GRAIN, PEOPLE, DETAIL]
    stack.button("Add LoRA").click()
    page.get_by_role("combobox").fill("<lora:watercolour soft:1> <lora:gone:1>")
    page.get_by_text("Add 2 LoRAs of this text").click()
    assert stack.names()[3:] == [STYLES, "gone"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    stack.button("Copy and paste as text").click()
    page.get_by_role("menuitem", name="Copy as text").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("<lora:film_grain:1> <lora:people/anna:0.5:0.25> <lora:detail")


def test_the_picker_is_used_by_keys_and_tells_about_files(stack: StackPage):
    page = stack.page
    stack.button("Add LoRA").focus()
    page.keyboard.press("Enter")
    field = page.get_by_role("combobox", name="Search LoRAs")
    page.get_by_role("option").first.wait_for()
    assert page.get_by_role("option").count() == 5
    page.keyboard.press("ArrowDown")
    chosen = page.locator("[role=option][aria-selected=true]")
    assert field.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    for letter in "anna":  # the first one stays the same
        page.keyboard.type(letter)
        assert chosen.count() == 1, "no option is marked"
        assert chosen.locator("xpath=self::*[contains(@class, 'lw-active')]").count() == 1
    card = page.locator(".lw-picker-side")
    card.get_by_text("SD1.5").wait_for()
    card.get_by_text("rank 4").wait_for()
    card.locator("img").wait_for()
    page.keyboard.press("Control+Enter")
    page.keyboard.type("grain")
    page.keyboard.press("Enter")
    assert stack.names() == [PEOPLE, GRAIN]
    assert page.locator(".lw-popover").count() == 0
    assert page.evaluate("document.activeElement.className") == "lw-add"


def test_figures_of_the_execution_replace_those_drawn(stack: StackPage):
    page = stack.page
    stack.set_rows(*TWO)
    stack.set_widget("normalise", "max to 1")
    stack.set_widget("master", 0.5)
    used = page.locator(".lw-used")
    stack.until(lambda: used.all_inner_texts() == ["0.50", "0.25"], "master is not followed")
    page.evaluate(
        """() => {
            const shown = LiteGraph.createNode('PreviewAny');
            app.graph.add(shown);
            app.graph.nodes[0].connect(4, shown, 0);
        }"""
    )
    wanted = {"row": 0, "model": 0.5, "clip": 0.5, "share": 2 / 3}
    with page.expect_event("console", lambda message: message.text.startswith("figures ")) as seen:
        page.evaluate(
            """() => {
                const [node] = app.graph.nodes;
                const known = node.onExecuted;
                node.onExecuted = function (output) {
                    known.call(this, output);
                    console.info(`figures ${JSON.stringify(output.lora_weave_stack[0])}`);
                };
            }"""
        )
        stack.queue()
    told = json.loads(seen.value.text.removeprefix("figures "))
    assert {key: told["rows"][0][key] for key in wanted} == pytest.approx(wanted)
    # an execution that knows more than the rows, as with LoRAs from sockets
    page.evaluate(
        """() => app.graph.nodes[0].onExecuted({ lora_weave_stack: [{ rows: [
            { row: 0, model: 0.2, clip: 0.2, share: 0.1, cosines: [
                { with: 'other', cosine: -0.25 }, { with: 'other', cosine: 0.75 },
            ] },
        ] }] })"""
    )
    assert stack.shares() == ["10%", "33%"]
    assert used.first.inner_text() == "0.20"
    page.locator(".lw-figures").first.hover()
    page.locator(".lw-hover").get_by_text("-0.25").wait_for()
    page.locator(".lw-hover").get_by_text("0.75").wait_for()
    # the execution of a prompt that was queued with other rows
    page.evaluate(
        """() => app.graph.nodes[0].onExecuted({ lora_weave_stack: [{ source: '[]', rows: [
            { row: 0, model: 3, clip: 3, share: 0.9 },
        ] }] })"""
    )
    assert stack.shares() == ["10%", "33%"]
    stack.row(1).get_by_role("switch").click()
    stack.until(lambda: stack.shares() == ["100%", "–"], "old figures were kept")


def test_rows_that_cannot_be_read_are_told_and_kept_until_they_are_discarded(stack: StackPage):
    page = stack.page
    stack.set_widget("rows", UNREADABLE)
    page.get_by_role("alert").get_by_text("These rows can't be read").wait_for()
    for name in ("Add", "Add LoRA", "Sort", "Presets", "Copy and paste as text"):
        assert stack.button(name).is_disabled(), name
    page.locator(".lw-stack").evaluate(
        """(rows) => {
            const clipboardData = new DataTransfer();
            clipboardData.setData('text/plain', '<lora:anna:0.5>');
            rows.dispatchEvent(new ClipboardEvent('paste', { clipboardData, bubbles: true }));
        }"""
    )
    assert stack.text() == UNREADABLE
    assert "These rows can't be read" in page.locator(".lw-live").inner_text()

    stack.button("Discard them").click()
    assert stack.rows() == []
    assert page.get_by_role("alert").is_hidden()
    stack.add_lora("anna")
    assert stack.names() == [PEOPLE]


@pytest.mark.parametrize("blocks", [[1, 0, 0.5], "IN04=0.5, OUT=much"])
def test_no_slider_overwrites_block_weights_that_cannot_be_read(stack: StackPage, blocks: object):
    row = {"on": True, "name": DETAIL, "model": 1, "blocks": blocks}
    page = stack.page
    stack.set_rows(row)
    stack.row(0).get_by_role("button", name="Menu of").click()
    page.get_by_role("menuitem", name="Blocks and schedule").click()
    four = page.get_by_role("slider", name="Weight of block IN04")
    four.wait_for()
    page.get_by_text("The sliders are off, and these weights stay as they are").wait_for()
    field = page.get_by_role("textbox", name="Block weights")
    assert field.input_value() == (blocks if isinstance(blocks, str) else "1,0,0.5")
    assert four.get_attribute("aria-disabled") == "true"
    move(stack, four)
    assert stack.rows() == [row]
    field.fill("IN04=much")
    field.press("Enter")
    page.get_by_text("Can't read IN04=much").wait_for()
    move(stack, four)
    assert stack.rows() == [row]

    stack.button("Reset").click()
    stack.until(lambda: "blocks" not in stack.rows()[0], "the weights were not reset")
    assert four.get_attribute("aria-disabled") is None
    four.press("0")
    assert stack.rows()[0]["blocks"] == {"IN04": 0}


def move(stack: StackPage, slider: Locator) -> None:
    """By mouse, keys and a double click."""
    stack.drag(slider.locator(".lw-slider-track"), 0, 30)
    slider.dblclick(force=True)
    for key in ("ArrowUp", "Home", "5", "Delete"):
        slider.press(key)


@pytest.mark.parametrize("mode", [CLASSIC, NODES_2])
def test_long_names_stay_in_narrow_nodes_and_many_rows_scroll(
    open_page: Callable[..., StackPage], mode: str
):
    stack = open_page(FULL, mode)
    page = stack.page
    stack.set_rows(*[{"on": True, "name": LONG, "model": 1} for _ in range(12)])
    page.evaluate("() => { const [node] = app.graph.nodes; node.setSize([300, node.size[1]]); }")
    page.wait_for_timeout(300)
    spills = page.evaluate(
        """() => {
            const stack = document.querySelector('.lw-stack').getBoundingClientRect();
            return [...document.querySelectorAll('.lw-stack *')].filter((part) => {
                const box = part.getBoundingClientRect();
                return box.width && (box.right > stack.right + 1 || box.left < stack.left - 1);
            }).map((part) => part.className);
        }"""
    )
    assert spills == []
    list_ = page.locator(".lw-list")
    assert list_.evaluate("(list) => list.scrollHeight > list.clientHeight + 100")
    stack.row(11).focus()
    assert stack.row(11).is_visible()


def test_the_node_speaks_japanese(open_page: Callable[..., StackPage]):
    stack = open_page(FULL, CLASSIC, **{"Comfy.Locale": "ja"})
    stack.button("LoRAを追加").wait_for()
    stack.set_rows(*TWO)
    stack.page.get_by_text("2個中2個がオン").wait_for()
    assert stack.page.get_by_role("switch", name="annaをオン／オフ").count() == 1
    open_page(FULL, CLASSIC, **{"Comfy.Locale": "en"}).button("Add LoRA").wait_for()
