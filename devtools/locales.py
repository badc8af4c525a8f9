"""Write what repeats the nodes' texts: `locales/en/nodeDefs.json` and the tables in `web/docs`.

    python3 -m devtools.locales

Each text stands in one place: the English ones in the nodes' schemas, the Japanese ones in
`locales/ja/nodeDefs.json`. Help pages are written by hand, apart from their tables of inputs and
outputs, which stand between marker comments.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import inprocess
from .generated import command
from .paths import ROOT

COMMAND = "python3 -m devtools.locales"
# Words of the tables, by locale. {} is filled in by `values_of`.
WORDS = {
    "en": {
        "inputs": ("Input", "Values", "What it does"),
        "outputs": ("Output", "Type", "What it is"),
        "on": "on",
        "off": "off",
        "range": "{} to {}",
        "from": "{} or more",
        "list": "chosen from a list",
        "text": "text",
        "default": "; default {}",
        "optional": ", optional",
    },
    "ja": {
        "inputs": ("入力", "値", "説明"),
        "outputs": ("出力", "型", "説明"),
        "on": "オン",
        "off": "オフ",
        "range": "{}〜{}",
        "from": "{}以上",
        "list": "一覧から選択",
        "text": "文字列",
        "default": "、初期値 {}",
        "optional": "、省略可",
    },
}
Node = Any  # the host's io.ComfyNode; this module is imported without the host too


def wanted(nodes: Sequence[Node], root: Path = ROOT) -> dict[Path, str]:
    """What each file that is written here should hold. The host must be in this process."""
    texts = {"en": english(nodes), "ja": read(root, "ja")}
    files = {names_file(root, "en"): json_text(texts["en"])}
    for locale, names in texts.items():
        for node in nodes:
            path = page_file(root, node_id(node), locale)
            files[path] = with_tables(path.read_text(encoding="utf-8"), node, names, locale)
    return files


def english(nodes: Sequence[Node]) -> dict[str, Any]:
    """The host's `nodeDefs.json` of the schemas' own texts."""
    return {node_id(node): _texts(node) for node in nodes}


def _texts(node: Node) -> dict[str, Any]:
    schema = node.define_schema()

    def entry(socket: Any) -> dict[str, str]:
        named = {"name": socket.display_name or socket.id}
        return named | ({"tooltip": socket.tooltip} if socket.tooltip else {})

    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {socket.id: entry(socket) for socket in schema.inputs},
        "outputs": {str(place): entry(socket) for place, socket in enumerate(schema.outputs)},
    }


def with_tables(page: str, node: Node, names: dict[str, Any], locale: str) -> str:
    """The page with its tables written anew. Raises ValueError where it lacks a marker."""
    known = names.get(node_id(node), {})
    for kind, lines in (
        ("inputs", _input_lines(node, known, locale)),
        ("outputs", _output_lines(node, known)),
    ):
        start, end = f"<!-- {kind}: written by {COMMAND} -->\n", f"<!-- end of {kind} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            raise ValueError(
                f"the {locale} page of {node_id(node)} needs {start.strip()} and {end}"
            )
        before, _, rest = page.partition(start)
        heads = WORDS[locale][kind]
        table = [_row(heads), _row(["---"] * len(heads)), *map(_row, lines)]
        page = before + start + "\n" + "\n".join(table) + "\n\n" + end + rest.partition(end)[2]
    return page


def _input_lines(node: Node, known: dict[str, Any], locale: str) -> Iterator[list[str]]:
    schema, own_check = node.define_schema(), inspect.signature(node.validate_inputs).parameters
    for socket in schema.inputs:
        text = known.get("inputs", {}).get(socket.id, {})
        # A node that checks an input itself has a list that differs from server to server.
        values = values_of(socket, locale, listed=socket.id not in own_check)
        yield [_label(text, socket.id), values, text.get("tooltip", "")]


def _output_lines(node: Node, known: dict[str, Any]) -> Iterator[list[str]]:
    for place, socket in enumerate(node.define_schema().outputs):
        text = known.get("outputs", {}).get(str(place), {})
        name = socket.display_name or socket.id
        yield [_label(text, name), f"`{socket.io_type}`", text.get("tooltip", "")]


def _label(text: dict[str, str], name: str) -> str:
    """The name on the node, with the one in the API where it differs."""
    shown = text.get("name", name)
    return f"`{name}`" if shown == name else f"{shown} `{name}`"


def values_of(socket: Any, locale: str, *, listed: bool) -> str:
    """What an input takes, in a few words; `listed`: whether its choices are always the same."""
    words, kind = WORDS[locale], socket.io_type
    default = getattr(socket, "default", None)
    if kind == "COMBO" and not listed:
        return words["list"]
    if kind == "COMBO":
        choices = ", ".join(f"`{choice}`" for choice in socket.options)
        return choices + words["default"].format(f"`{default or socket.options[0]}`")
    if kind == "BOOLEAN":
        states = f"{words['on']} / {words['off']}"
        return states + words["default"].format(words["on" if default else "off"])
    if kind in ("INT", "FLOAT"):
        limits = words["from" if socket.max is None else "range"]
        return limits.format(_number(socket.min), _number(socket.max)) + words["default"].format(
            _number(default)
        )
    if kind == "STRING" and not socket.force_input:
        return words["text"] + (words["default"].format(f"`{default}`") if default else "")
    return f"`{kind}`" + (words["optional"] if socket.optional else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def node_id(node: Node) -> str:
    return node.define_schema().node_id


def names_file(root: Path, locale: str) -> Path:
    return root / "locales" / locale / "nodeDefs.json"


def page_file(root: Path, name: str, locale: str) -> Path:
    return root / "web" / "docs" / name / f"{locale}.md"


def read(root: Path, locale: str) -> dict[str, Any]:
    return json.loads(names_file(root, locale).read_text(encoding="utf-8"))


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def pack_nodes() -> Sequence[Node]:
    """The pack's nodes; the host's modules must be importable (`inprocess.enter`)."""
    # As the host's main.py does: its nodes.py puts comfy/ first on the path, whose utils.py wins.
    importlib.import_module("utils.extra_config")
    return inprocess.pack_module("nodes").NODES


if __name__ == "__main__":
    sys.exit(command("locales", lambda: wanted(pack_nodes())))
