"""Workflow files as the ComfyUI page saves them, turned into the graph that `/prompt` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "LORA_WEAVE_ROWS"}
NOTES = {"Note", "MarkdownNote"}


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The graph `{node id: {"class_type", "inputs"}}` of a saved workflow.

    A workflow file stores widget values by position; `object_info` (the server's answer of that
    path) has their names. Raises ValueError for node types that the server lacks, and for nodes
    that were switched off on the page, which this does not resolve.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    problems = [f"unknown node {node['type']}" for node in nodes if node["type"] not in object_info]
    problems += [f"node {node['id']} is switched off" for node in nodes if node.get("mode", 0)]
    if problems:
        raise ValueError("the workflow can't be queued: " + ", ".join(problems))
    graph = {}
    for node in nodes:
        linked = {slot["name"]: slot["link"] for slot in node.get("inputs", []) if slot.get("link")}
        values = iter(node.get("widgets_values") or [])
        inputs: dict[str, Any] = {}
        for name, kind, options in declared_inputs(object_info[node["type"]]):
            if is_widget(kind, options):
                inputs[name] = next(values, options.get("default"))
                if options.get("control_after_generate"):
                    next(values, None)  # the page's own widget beside a seed
            if name in linked:
                inputs[name] = sources[linked[name]]
        graph[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title") or object_info[node["type"]]["display_name"]},
        }
    return graph


def declared_inputs(info: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Name, type and options of a node type's inputs, in the order of its widgets."""
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            yield name, spec[0], spec[1] if len(spec) > 1 else {}


def is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    """Whether the page shows a widget; a list of choices is the older form of COMBO."""
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def find(graph: Mapping[str, Any], class_type: str, title: str = "") -> str:
    """The id of the one node of this type (and title). Raises ValueError unless there is one."""
    found = [
        node_id
        for node_id, node in graph.items()
        if node["class_type"] == class_type and (not title or node["_meta"]["title"] == title)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} nodes of type {class_type} {title!r}, expected one")
    return found[0]
