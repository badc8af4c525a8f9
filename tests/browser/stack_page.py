"""A page of ComfyUI with a LoRA Stack, as a user sees and uses it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page

from lora_weave.devtools.server import Server

NODE = "LoRAWeaveStack"
SIZE = {"width": 1400, "height": 1000}
DEPRECATED = ("deprecated", "[comfyui notice]")  # in what the page logs, in lower case
# Of every page: the server keeps what an earlier one has set.
SETTINGS = {
    **{"Comfy.TutorialCompleted": True, "Comfy.Graph.CanvasInfo": False},
    **{"Comfy.ColorPalette": "dark", "Comfy.Locale": "en"},
    **{"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasMenu": True},
}
READY = f"!!window.app?.graph && !!window.LiteGraph?.registered_node_types?.['{NODE}']"
# 1.58 takes changes within 50 ms for the end of the last one, in its undo history.
SQUASHED_MS = 120
TIMEOUT_MS = 15_000
# In a page of its own: the graph is empty, at 100 % zoom, and has one node at a fixed place.
CLEAR = "app.graph.clear(); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]"
ADD = f"""(at) => {{
    const node = LiteGraph.createNode('{NODE}');
    node.pos = at;
    app.graph.add(node);
    return String(node.id);
}}"""


class StackPage:
    """A browser's page with its own settings. What it logs is kept in `logged`."""

    def __init__(self, context: BrowserContext, server: Server) -> None:
        self.server = server
        self.page: Page = context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.add_init_script("localStorage.clear()")  # the last workflow of another test
        self.logged: list[str] = []
        self.errors: list[str] = []
        self.page.on("console", self._log)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack}"))

    def _log(self, message: ConsoleMessage) -> None:
        if message.type in ("warning", "error"):
            self.logged.append(message.text)

    @classmethod
    def open(cls, context: BrowserContext, server: Server, settings: dict[str, Any]) -> StackPage:
        body = json.dumps({**SETTINGS, **settings}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.address}/settings", body, headers)
        urllib.request.urlopen(request, timeout=30).close()
        opened = cls(context, server)
        opened.load()
        opened.page.evaluate(CLEAR)
        opened.add()
        opened.page.locator(".lw-stack").wait_for()
        return opened

    def load(self) -> None:
        self.page.goto(self.server.address)
        self.page.wait_for_function(READY)
        # the page opens its first workflow a moment after it has the nodes
        self.page.wait_for_function("app.graph.nodes.length > 0 || !!app.extensionManager")
        self.page.wait_for_timeout(700)

    def close(self) -> None:
        self.page.close()

    def add(self, x: int = 420, y: int = 160) -> str:
        return self.page.evaluate(ADD, [x, y])

    # --- what the graph holds

    def text(self) -> str:
        """The value of the first stack's widget."""
        return self.page.evaluate(
            f"""app.graph.nodes.find((node) => node.type === '{NODE}')
                .widgets.find((widget) => widget.name === 'rows').value"""
        )

    def rows(self) -> list[dict[str, Any]]:
        text = self.text()
        return json.loads(text)["rows"] if text else []

    def names(self) -> list[str]:
        return [row["name"] for row in self.rows()]

    def set_rows(self, *rows: dict[str, Any]) -> None:
        """The rows as a loaded workflow sets them."""
        self.set_widget("rows", json.dumps({"v": 1, "rows": rows}))

    def set_widget(self, name: str, value: Any) -> None:
        self.page.evaluate(
            f"""([name, value]) => {{
                const node = app.graph.nodes.find((node) => node.type === '{NODE}');
                node.widgets.find((widget) => widget.name === name).value = value;
                app.graph.setDirtyCanvas(true, true);
            }}""",
            [name, value],
        )

    def saved(self) -> dict[str, Any]:
        """The workflow as it is saved."""
        return json.loads(self.page.evaluate("JSON.stringify(app.graph.serialize())"))

    def load_workflow(self, workflow: dict[str, Any]) -> None:
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow); }", workflow)
        self.page.wait_for_timeout(300)

    def until(self, holds: Callable[[], bool], what: str = "") -> None:
        """Wait until something holds; the page draws and the server answers in their own time."""
        for _ in range(100):
            if holds():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(what or "it never held")

    # --- what a user sees

    def row(self, index: int) -> Locator:
        return self.page.locator(".lw-row").nth(index)

    def shown_names(self) -> list[str]:
        return self.page.locator(".lw-name-text").all_inner_texts()

    def shares(self) -> list[str]:
        return self.page.locator(".lw-row .lw-share").all_inner_texts()

    def model(self, index: int) -> Locator:
        return self.row(index).get_by_role("spinbutton").first

    def clip(self, index: int) -> Locator:
        return self.row(index).get_by_role("spinbutton").last

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def add_lora(self, query: str) -> None:
        """Add the file that a search finds first."""
        rows = self.page.locator(".lw-row")
        count = rows.count()
        self.button("Add LoRA").click()
        self.page.get_by_role("combobox", name="Search LoRAs").fill(query)
        self.page.get_by_role("option").first.wait_for()
        self.page.keyboard.press("Enter")
        self.until(lambda: rows.count() == count + 1, f"{query} was not added")

    def drag(self, start: Locator, dx: float, dy: float) -> None:
        """Press on the middle of an element, move in steps, and let go."""
        self.page.wait_for_timeout(SQUASHED_MS)
        box = start.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + dx / 2, y + dy / 2, steps=4)
        mouse.move(x + dx, y + dy, steps=4)
        self.page.wait_for_timeout(50)
        mouse.up()

    # --- what it sends and says

    def queue(self) -> dict[str, Any]:
        """Queue the graph by its button; returns the graph in API form, as it was sent."""
        with self.page.expect_request("**/prompt") as sent:
            self.page.evaluate("app.queuePrompt(0, 1)")
        return sent.value.post_data_json["prompt"]

    def problems(self, usual: frozenset[str]) -> list[str]:
        """Warnings that the page has only with our scripts, and errors of ours."""
        found = [text for text in deprecations(self.logged) if text not in usual]
        found += [text for text in self.logged if "lora_stack" in text and "404" not in text]
        found += [error for error in self.errors if "lora_stack" in error]
        log = self.server.log_text()
        found += [line for line in log.splitlines() if "[DEPRECATION WARNING]" in line]
        return found


def deprecations(logged: list[str]) -> list[str]:
    return [text for text in logged if any(word in text.lower() for word in DEPRECATED)]


def new_context(browser: Browser) -> BrowserContext:
    return browser.new_context(viewport=SIZE)


def warnings_without_us(context: BrowserContext, address: str) -> frozenset[str]:
    """What the page warns of by itself, when nodes are made and linked and a graph is sent."""
    page = context.new_page()
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.route("**/extensions/lora-weave/**", lambda route: route.abort())
    page.goto(address)
    page.wait_for_function(READY)
    page.wait_for_timeout(700)
    page.evaluate(CLEAR)
    page.evaluate(
        """async () => {
            const [one, two] = ['CLIPTextEncode', 'ConditioningZeroOut'].map((type) => {
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                return node;
            });
            one.connect(0, two, 0);
            await app.graphToPrompt();
            await app.loadGraphData(app.graph.serialize());
        }"""
    )
    page.wait_for_timeout(300)
    page.close()
    return frozenset(deprecations(logged))
