"""A MODEL and CLIP made ready for training: loaded, outside inference mode, differentiable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import nn

from .inplace import InPlace, in_place
from .small_conv import small_convolutions

_CAST_MARKS = ("comfy_cast_weights", "prev_comfy_cast_weights", "comfy_force_cast_weights")
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_patcher(patcher: Any, precision: str) -> Any:
    """The patcher to train on: the one given, where it can be, without any copy.

    `precision` is "auto" (the dtype that the model computes in already) or a key of
    COMPUTE_DTYPES; another dtype than the model's own makes the host cast each layer's weight
    while it runs, by a clone that shares the module. A dynamic-VRAM patcher (0.33) may drop a
    weight between forward and backward, so its own non-dynamic clone is taken, which the host
    loads from disk once more.
    """
    if getattr(patcher, "is_dynamic", lambda: False)():
        patcher = patcher.clone(disable_dynamic=True)
    if precision == "auto" or COMPUTE_DTYPES[precision] == compute_dtype(patcher):
        return patcher
    clone = patcher.clone()
    clone.set_model_compute_dtype(COMPUTE_DTYPES[precision])
    return clone


def training_clip(clip: Any) -> Any:
    """The CLIP to train, not dynamic for the same reason: see `training_patcher`."""
    if not getattr(clip.patcher, "is_dynamic", lambda: False)():
        return clip
    clone = clip.clone(disable_dynamic=True)
    clone.cond_stage_model = clone.patcher.model
    return clone


def compute_dtype(patcher: Any) -> torch.dtype:
    """The dtype that the model's layers compute in."""
    return patcher.model.manual_cast_dtype or patcher.model.get_dtype()


def precision_of(patcher: Any) -> str:
    """The name in COMPUTE_DTYPES of what the model computes in."""
    dtype = compute_dtype(patcher)
    return next((name for name, known in COMPUTE_DTYPES.items() if known == dtype), "fp32")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine (where torch has no class of its own), has run out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    said = str(error).lower()
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


class Trainee:
    """A MODEL, and perhaps a CLIP, under training: what `trainee` yields."""

    def __init__(self, patcher: Any, patchers: Sequence[Any], live: InPlace) -> None:
        self._patcher, self._patchers, self._live = patcher, patchers, live
        self._loaded = _what_is_loaded(patchers)
        patcher.pre_run()

    def refresh(self) -> None:
        """Make all ready again after host calls that can load, unload or run models.

        Where memory is short, the host unloads one of ours to run another, or the CLIP to encode a
        caption. Cheap where nothing has changed.
        """
        unloaded = _what_is_loaded(self._patchers) != self._loaded
        if unloaded:
            _load(self._patchers)
            self._loaded = _what_is_loaded(self._patchers)
        if unloaded or self._patcher.model.current_patcher is not self._patcher:
            self._patcher.pre_run()
        self._live.refresh()


@contextmanager
def trainee(patcher: Any, clip: Any | None = None) -> Iterator[Trainee]:
    """While it lasts the modules of `patcher` (and `clip`) are on their device and trainable.

    Nothing is copied; on leaving, every tensor object is put back. Yields the Trainee, to be
    refreshed after host calls that can load models (a caption, sampling in the middle of a run).
    """
    patchers = [patcher] if clip is None else [patcher, clip.patcher]
    modules: list[nn.Module] = [one.model for one in patchers]
    with _casts_taken_back(patcher):
        _load(patchers)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _training_flag(),
            _plain_products(modules),
            small_convolutions(modules),
            in_place(*modules) as live,
        ):
            try:
                yield Trainee(patcher, patchers, live)
            finally:
                patcher.cleanup()


def _load(patchers: Sequence[Any]) -> None:
    """Load them together, so that the host does not unload one for the other."""
    with torch.inference_mode():  # as the host does: patching writes into inference tensors
        # All other models leave the device: their memory is wanted for activations.
        comfy.model_management.load_models_gpu(patchers, memory_required=1e20, force_full_load=True)


def _what_is_loaded(patchers: Sequence[Any]) -> list[tuple[bool, int]]:
    """For each whether the host has it loaded, and how many bytes of it are on the device."""
    loaded = comfy.model_management.loaded_models()
    return [(one in loaded, one.loaded_size()) for one in patchers]


@contextmanager
def _casts_taken_back(patcher: Any) -> Iterator[None]:
    """Unload a clone with a compute dtype of its own, and the marks it left on shared modules.

    The host does it only halfway when another clone is loaded: attributes stay behind (0.3.75
    model_patcher.py:98 `wipe_lowvram_weight`).
    """
    if not patcher.force_cast_weights:
        yield
        return
    modules = list(patcher.model.modules())
    before = [{name: vars(module).get(name) for name in _CAST_MARKS} for module in modules]
    try:
        yield
    finally:
        loaded_models = comfy.model_management.current_loaded_models
        with torch.inference_mode():
            for loaded in [one for one in loaded_models if one.model is patcher]:
                loaded.model_unload()
                loaded_models.remove(loaded)
        for module, marks in zip(modules, before, strict=True):
            for name, value in marks.items():
                vars(module).pop(name, None)
                if value is not None:
                    setattr(module, name, value)


@contextmanager
def _plain_products(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Quantised layers multiply dequantised weights while it lasts.

    0.3.75's products of quantised inputs (ops.py `MixedPrecisionOps`, `fp8_ops`) have no backward;
    both look at an attribute of the layer first.
    """
    changed: list[tuple[nn.Module, str, bool]] = []
    for module in (part for root in modules for part in root.modules()):
        for name, wanted in (("_full_precision_mm", True), ("training", True)):
            if name == "training" and not hasattr(module, "scale_weight"):
                continue
            if vars(module).get(name) == (not wanted):
                changed.append((module, name, not wanted))
                vars(module)[name] = wanted
    try:
        yield
    finally:
        for module, name, before in changed:
            vars(module)[name] = before


@contextmanager
def _training_flag() -> Iterator[None]:
    """0.33 runs kernels without a backward unless its `in_training` flag is up."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before = management.in_training
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before
