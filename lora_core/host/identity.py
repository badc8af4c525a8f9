"""A model's identity: equal after a restart, different for other weights or patches."""

from __future__ import annotations

import hashlib
import re
import types
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of each tensor that count, evenly spread, besides its name and shape
MAX_DEPTH = 8  # how far into patches and options an identity looks
# Left out of the weights: the host does not initialise text_projection where a file lacks it, as
# those of SD1.x and SDXL do, whose models don't read it (comfy/supported_models.py `pop_keys`), and
# model_sampling is hashed as it is with patches, whichever clone is loaded at the moment.
NOT_WEIGHTS = re.compile(r"\.text_projection\.weight$|^model_sampling\.")


def model_identity(patcher: Any) -> str:
    """sha256 over a ModelPatcher's unpatched weights and everything that patches them, as hex.

    Per parameter its name, shape, dtype and sampled bytes; per patch, option, wrapper and injection
    its content. Never a uuid, which the host draws anew at every start. The same whether this
    patcher, another clone of it, or none is loaded.
    """
    digest = _Digest()
    unpatched = {key: entry.weight for key, entry in patcher.backup.items()}
    for key, weight in sorted(patcher.model_state_dict().items()):
        if not NOT_WEIGHTS.search(key):
            digest.add_tensor(key, unpatched.get(key, weight))
    if hasattr(patcher.model, "model_sampling"):
        digest.add("model_sampling", patcher.get_model_object("model_sampling"))
    for name in (
        *("patches", "object_patches", "model_options", "weight_wrapper_patches"),
        *("injections", "wrappers", "hook_patches"),
    ):
        digest.add(name, getattr(patcher, name, None))
    return digest.hexdigest()


def vae_identity(vae: Any) -> str:
    """As `model_identity`, for a VAE, with the dtype that it computes in."""
    return _hash(model_identity(vae.patcher), vae.vae_dtype)


def clip_identity(clip: Any) -> str:
    """As `model_identity`, for a CLIP, with all that decides how it reads a text."""
    tokenizer = clip.tokenizer
    return _hash(
        model_identity(clip.patcher),
        clip.layer_idx,
        type(clip.cond_stage_model).__qualname__,
        type(tokenizer).__qualname__,
        sorted((getattr(clip, "tokenizer_options", None) or {}).items(), key=repr),
    )


def _hash(*parts: Any) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


class _Digest:
    """Hashes what lasts over a restart: names, numbers and tensors, also of objects and closures.

    An object that was hashed once is not looked into again, so that cycles end.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, Any] = {}  # the objects stay alive, so that ids are not reused

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def say(self, text: str) -> None:
        self._hash.update(f"{text};".encode())

    def add(self, name: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            self.add_tensor(name, value)
        elif isinstance(value, (str, bytes, int, float, bool, type(None), torch.dtype)):
            self.say(f"{name}={value!r}")
        elif (
            not isinstance(value, uuid.UUID) and depth <= MAX_DEPTH and id(value) not in self._seen
        ):
            self._seen[id(value)] = value
            for part_name, part in self._parts(name, value):
                self.add(part_name, part, depth + 1)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        self.say(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}")
        flat = getattr(tensor, "_qdata", tensor).detach().reshape(-1)
        if flat.numel():
            count = min(SAMPLES, flat.numel())
            positions = [index * (flat.numel() - 1) // max(count - 1, 1) for index in range(count)]
            picked = flat[torch.tensor(positions, device=flat.device)].cpu()
            self._hash.update(picked.view(torch.uint8).numpy().tobytes())

    def _parts(self, name: str, value: Any) -> list[tuple[str, Any]]:
        """What an object is made of, in an order that lasts; its type is said."""
        if isinstance(value, Mapping):
            named = [(_key_name(key), part) for key, part in value.items()]
            return [(f"{name}.{key}", part) for key, part in sorted(named, key=lambda it: it[0])]
        if isinstance(value, (list, tuple)):
            return [(f"{name}.{index}", part) for index, part in enumerate(value)]
        if isinstance(value, types.MethodType):
            return [(name, value.__func__), (f"{name}.self", value.__self__)]
        if isinstance(value, types.FunctionType):
            self.say(f"{name}:{value.__module__}.{value.__qualname__}")
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            return [(f"{name}.closure", cells)]
        self.say(f"{name}:{type(value).__qualname__}")
        if hasattr(value, "weights"):  # a weight adapter; its set of keys has no order
            return [(f"{name}.weights", value.weights)]
        if hasattr(value, "model_state_dict") or hasattr(value, "cond_stage_model"):
            return []  # a whole model that a wrapper holds
        state = value.state_dict() if isinstance(value, nn.Module) else {}
        return [(f"{name}.state", state), (f"{name}.attributes", _plain_attributes(value))]


def _key_name(key: Any) -> str:
    return str(key) if isinstance(key, (str, int, float, tuple)) else type(key).__qualname__


def _plain_attributes(value: Any) -> dict[str, Any]:
    kinds = (str, int, float, bool, Tensor, list, tuple, dict, types.FunctionType, types.MethodType)
    attributes = getattr(value, "__dict__", {})
    return {
        name: part
        for name, part in attributes.items()
        if isinstance(part, kinds) and not name.startswith("_") and "uuid" not in name
    }


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False
