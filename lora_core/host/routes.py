"""What the page asks the server about LoRA files: GET only, by names in the loras folders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from ..blocks import BlockWeights
from ..inspection import inspect_file
from ..metadata import trigger_words
from . import files

PREFIX = "/lora_weave"


def register() -> None:
    """Add the routes to the running server; nothing without one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        for path, answer in {"lora": lora, "blocks": blocks, "nearest": nearest}.items():
            server.routes.get(f"{PREFIX}/{path}")(_handler(answer))


def lora(query: dict[str, str]) -> dict[str, Any]:
    """What a file is, from its header: type, family, ranks, trigger words, blocks."""
    path = files.find_lora(files.lora_name(query.get("name", "")))
    found = inspect_file(path)
    return {
        "name": query["name"],
        "type": max(found.types, key=lambda kind: found.types[kind], default="?"),
        "dialect": found.dialect,
        "family": found.family or "",
        "ranks": sorted(found.ranks),
        "trigger_words": trigger_words(found.metadata),
        "title": found.metadata.get("modelspec.title", ""),
        "blocks": list(found.blocks),
        "family_blocks": list(found.family_blocks),
        "size_bytes": path.stat().st_size,
        "num_layers": sum(found.types.values()),
    }


def blocks(query: dict[str, str]) -> dict[str, Any]:
    """Block weights in any spelling, or a schema's numbers, by name."""
    family = inspect_file(files.find_lora(files.lora_name(query.get("name", "")))).family or ""
    weights = BlockWeights.parse(query.get("values", ""), family)
    return {"blocks": {} if weights is None else dict(weights.weights)}


def nearest(query: dict[str, str]) -> dict[str, Any]:
    """The listed file whose name is most like one that is missing."""
    return {"nearest": files.nearest_lora(query.get("name", ""))}


def _handler(answer: Callable[[dict[str, str]], dict[str, Any]]) -> Any:
    async def handle(request: web.Request) -> web.Response:
        query = dict(request.query)
        try:
            return web.json_response(await asyncio.to_thread(answer, query))
        except (ValueError, OSError) as error:
            name = query.get("name", "")
            is_missing = name not in files.lora_names()
            near = files.nearest_lora(name) if is_missing else None
            body = {"error": str(error), "nearest": near}
            return web.json_response(body, status=404 if is_missing else 422)

    return handle
