"""The pack's nodes, one line each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..lora_core.host import routes
from .dataset import ImageFolder, Images
from .hooks import Hooks
from .load import Load
from .save import Save
from .stack import StackNode
from .sweep import Sweep
from .train import Train
from .train_options import Options

NODES: list[type[io.ComfyNode]] = [
    *(ImageFolder, Images, Train, Options),
    *(Load, StackNode, Hooks, Sweep, Save),
]


class LoRAWeave(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> LoRAWeave:
    """What the host calls to get the nodes; the server is there then, and gets our routes."""
    routes.register()
    return LoRAWeave()
