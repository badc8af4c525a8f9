"""LoRAs beside the weights: a stack whose strengths change without patching a weight again.

Each layer takes the cheaper of two ways. Narrow changes are added to its output by a forward hook,
out += U V x. Wide ones, and types without factors, are added to the weight in each forward, as a
`weight_function` of the host's operations, W x becomes (W + ΔW) x; the weight itself stays. Where
the host would not show that function the weight itself, ΔW x is added to the output.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor, nn

from ..adapters import Adapter, Layer
from ..adapters.low_rank import add_low_rank
from ..key_map import BIAS, MODULATION
from ..lora_reading import some
from ..stack import Entry
from .apply import (
    add_parameters,
    change,
    changes_by_path,
    combine,
    factors_of,
    refuse_missing,
    stacked_patches,
)
from .models import CLIP_PREFIX, UNET_PREFIX, layer_facts, module_at
from .norms import norm_facts

KEY = "lora_weave_live"
# Factors are applied to the output where they take less than this part of the layer's own
# multiplications; else ΔW is kept. On narrow layers (SD1.5's 320 channels) a stack's factors cost
# as much as the layer; there ΔW is small, and adding it costs next to nothing.
FACTORS_BELOW = 0.4

Undo = Callable[[], None]


def apply_live(model: Any, clip: Any, stack: Sequence[Entry]) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP (each may be None) with the stack beside their weights.

    Equal to `apply` within rounding; schedules count, by the sigma of each step. Patches that the
    model has come before it, and so does a live stack on it, which becomes one with this one. Those
    that a live model gets later are in its weights before the live changes, too, though they come
    after: types that depend on the weight then see another one than in the order of the graph.
    Raises ValueError naming layers that the model does not have.
    """
    new_model = None if model is None else model.clone()
    new_clip = None if clip is None else clip.clone()
    if new_model is not None:
        add_parameters(new_model, stacked_patches(_modulations(stack), UNET_PREFIX))
        live = _inject(new_model, UNET_PREFIX, stack)
        new_model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
        if live.is_scheduled:
            new_model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, live.follow)
    if new_clip is not None:
        _inject(new_clip.patcher, CLIP_PREFIX, stack)
    return new_model, new_clip


def _modulations(stack: Sequence[Entry]) -> list[Entry]:
    """Their changes of Wan's modulations, which no module computes with alone.

    Raises ValueError where a schedule is to change them.
    """
    found = [
        replace(entry, adapters={p: a for p, a in entry.adapters.items() if p.endswith(MODULATION)})
        for entry in stack
    ]
    if any(entry.schedule and entry.adapters for entry in found):
        raise ValueError("a schedule can't change the modulations that a LoRA of Wan changes")
    return found


def _inject(patcher: Any, prefix: str, stack: Sequence[Entry]) -> LiveStack:
    """The patcher's live stack from now on: one with the live stack that it has."""
    earlier = [injection.inject.__self__.stack for injection in patcher.injections.get(KEY, ())]
    live = LiveStack([*itertools.chain(*earlier), *stack], prefix)
    live.check(patcher)
    patcher.set_injections(KEY, [PatcherInjection(inject=live.inject, eject=live.eject)])
    return live


class LiveStack:
    """The changes of one model, by layer path; injected into its modules and ejected by the host.

    Both may be called repeatedly, and are then without effect. The host's clones share it, and
    each ejects when it is freed, whether it has injected or not (comfy/model_patcher.py
    `__del__`): only the patcher that injected takes the changes off.
    """

    def __init__(self, stack: Sequence[Entry], prefix: str) -> None:
        self.stack, self.prefix = stack, prefix
        self.layers = {
            path: LiveLayer(path, changed)
            for path, changed in changes_by_path(stack, prefix).items()
            if not path.endswith(MODULATION)
        }
        self.is_scheduled = any(entry.schedule for entry in stack)
        self.content = {  # flat, so that the model's identity looks into it
            f"{number}.{name}": value
            for number, entry in enumerate(stack)
            for name, value in entry.content().items()
        }
        self._undo: list[Undo] = []  # in force while injected
        self._owner: weakref.ref[Any] | None = None  # the patcher that injected

    def check(self, patcher: Any) -> None:
        """Raises ValueError for layers that the model does not have, and for embeddings.

        The host reads some embeddings past their module (comfy/clip_model.py `CLIPEmbeddings`),
        where nothing beside their weight counts.
        """
        root = self._root(patcher)
        missing, embeddings = [], []
        for path in self.layers:
            try:
                module = module_at(root, self.prefix, path)
            except AttributeError:
                missing.append(path)
            else:
                embeddings += [path] if isinstance(module, nn.Embedding) else []
        refuse_missing(missing, len(self.layers))
        if embeddings:
            shown = some(embeddings)
            raise ValueError(f"mode live can't change embeddings, mode patch can: {shown}")

    def inject(self, patcher: Any) -> None:
        self._take_off()
        self._owner = weakref.ref(patcher)
        root = self._root(patcher)
        for path, layer in self.layers.items():
            self._undo.append(layer.attach(module_at(root, self.prefix, path)))

    def eject(self, patcher: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None or owner is patcher:  # the owner's reference is dead once it is freed
            self._take_off()

    def _take_off(self) -> None:
        while self._undo:
            self._undo.pop()()

    def follow(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **options: Any) -> Any:
        """The host's wrapper of each call of the model: strengths for the step's sigma."""
        position = position_of(float(t.flatten()[0]), executor.class_obj.model_sampling)
        for layer in self.layers.values():
            layer.move_to(position)
        return executor(x, t, *args, **options)

    def _root(self, patcher: Any) -> nn.Module:
        return patcher.model.diffusion_model if self.prefix == UNET_PREFIX else patcher.model


class LiveLayer:
    """The changes of one layer's weight, or of its bias."""

    def __init__(self, path: str, changes: Sequence[tuple[Entry, Adapter]]) -> None:
        self.path = path
        self.changes = changes
        self._position = 0.0
        self._made: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}  # for the strengths of now

    def move_to(self, position: float) -> None:
        """Take the strengths of a position in the sampling range from now on."""
        self._position = position

    def strengths(self) -> tuple[float, ...]:
        """At the position in the sampling range; only a diffusion model has one."""
        follows = self.path.startswith(UNET_PREFIX)
        return tuple(
            entry.strength(self.path)
            * (entry.schedule.at(self._position) if follows and entry.schedule else 1.0)
            for entry, _ in self.changes
        )

    def attach(self, module: nn.Module) -> Undo:
        """Change what the module computes; the return value takes the change off again."""
        which = "bias_function" if self.path.endswith(BIAS) else "weight_function"
        layer = layer_facts(module) or norm_facts(module)
        if which == "weight_function" and layer is not None:
            if self.is_narrow(layer) or not _has_functions(module) or _scales_later(module):
                return self._hook(module, layer)
        if not _has_functions(module):
            raise ValueError(f"{self.path}: mode live can't change this kind of layer; use patch")
        return self._function(module, which)

    def is_narrow(self, layer: Layer) -> bool:
        """Whether all changes are factors that are cheap beside the layer."""
        rank = 0
        if len(layer.shape) == 1:
            return False
        for _, adapter in self.changes:
            if adapter.factored_rank is None or adapter.factored_rank > adapter.rank:
                return False
            rank += adapter.factored_rank
        rows, columns = layer.shape[0], layer.fan_in
        return rank * (rows + columns) < FACTORS_BELOW * rows * columns

    def _hook(self, module: nn.Module, layer: Layer) -> Undo:
        narrow = self.is_narrow(layer)

        def add(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            x = args[0]
            if narrow:
                up, down = self._for_now(x, lambda steps: factors_of(steps[0], x.device))
                return add_low_rank(x, out, down, up, 1.0, layer)
            delta = self._for_now(x, lambda steps: (change(steps, layer.weight()),))[0]
            return out + _applied(x, delta, layer, out).to(out.dtype)

        handle = module.register_forward_hook(add)

        def take_off() -> None:
            handle.remove()
            self._made.clear()

        return take_off

    def _function(self, module: Any, which: str) -> Undo:
        def changed(weight: Tensor) -> Tensor:
            return weight + self._for_now(weight, lambda steps: (change(steps, weight),))[0]

        had = which in vars(module)
        setattr(module, which, [*getattr(module, which), changed])

        def take_off() -> None:
            left = [function for function in getattr(module, which) if function is not changed]
            if left or had:
                setattr(module, which, left)
            else:
                delattr(module, which)
            self._made.clear()

        return take_off

    @torch.no_grad()
    def _for_now(
        self, like: Tensor, make: Callable[[list[tuple[Any, ...]]], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make` gives for the steps of now, on the device and in the dtype of `like`."""
        strengths = self.strengths()
        state = (strengths, like.device, like.dtype)
        if state not in self._made:
            self._made.clear()
            steps = combine(
                [(s, adapter) for s, (_, adapter) in zip(strengths, self.changes, strict=True)]
            )
            self._made[state] = tuple(part.to(like.device, like.dtype) for part in make(steps))
        return self._made[state]


def _applied(x: Tensor, delta: Tensor, layer: Layer, out: Tensor) -> Tensor:
    """ΔW applied to the input of a layer or norm, whose output is `out`."""
    if layer.normalized is not None:
        return layer.normalized(x) * layer.along_channels(delta, out)
    if layer.is_linear:
        return nn.functional.linear(x, delta)
    convolution = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
    function = convolution[len(layer.shape) - 3]
    return function(x, delta, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _has_functions(module: nn.Module) -> bool:
    """Whether the host's operations change the weight on its way; GGUF's have their own way."""
    return hasattr(module, "weight_function") and not hasattr(module, "cast_bias_weight")


def _scales_later(module: nn.Module) -> bool:
    """Whether a `weight_function` sees the weight in fp8 or without its scale.

    So it is in the host's operations for fp8 products and for files with a `scaled_fp8` key
    (comfy/ops.py fp8_ops, scaled_fp8_ops).
    """
    return hasattr(module, "scale_weight")


def position_of(sigma: float, sampling: Any) -> float:
    """The part of the sampling range done at a sigma: the inverse of `percent_to_sigma`."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sampling.percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
