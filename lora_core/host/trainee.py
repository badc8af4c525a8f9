"""A MODEL and CLIP made ready for training: loaded, outside inference mode, differentiable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import nn

from .inplace import InPlace, in_place

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


def compute_dtype(patcher: Any) -> torch.dtype:
    """The dtype that the model's layers compute in."""
    return patcher.model.manual_cast_dtype or patcher.model.get_dtype()


def precision_name(patcher: Any, precision: str) -> str:
    """What metadata calls the compute dtype: "bf16", "fp16", or "no" for full precision."""
    dtype = compute_dtype(patcher) if precision == "auto" else COMPUTE_DTYPES[precision]
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine (where torch has no class of its own), has run out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def trainee(patcher: Any, clip: Any | None = None) -> Iterator[InPlace]:
    """While it lasts the modules of `patcher` (and `clip`) are on their device and trainable.

    Nothing is copied; on leaving, every tensor object is put back. Yields the InPlace, to be
    refreshed after host calls that can load models (sampling in the middle of a run).
    """
    patchers = [patcher] if clip is None else [patcher, clip.patcher]
    modules: list[nn.Module] = [one.model for one in patchers]
    with torch.inference_mode():  # as the host does: patching writes into inference tensors
        comfy.model_management.load_models_gpu(patchers, force_full_load=True)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _training_flag(),
        in_place(*modules) as it,
    ):
        patcher.pre_run()
        try:
            yield it
        finally:
            patcher.cleanup()


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
