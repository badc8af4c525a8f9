"""Dropout of ranks and of whole adapters, the same for the same seed and batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..adapters import Adapter
from ..key_map import BIAS
from .config import ResolvedConfig
from .examples import seed_of


@contextmanager
def dropout(config: ResolvedConfig, adapters: Mapping[str, Adapter], index: int) -> Iterator[None]:
    """While it lasts, some ranks and adapters are left out: drawn by (seed, "dropout", index).

    A layer's weight and bias are left out together.

    What is kept of the ranks counts 1 / (1 - p), so that the change is the same on average
    (https://jmlr.org/papers/v15/srivastava14a.html). At least one layer stays.
    """
    ranks, modules = config.options.rank_dropout, config.options.module_dropout
    if ranks == 0.0 and modules == 0.0:
        yield
        return
    members = list(adapters.values())
    owners = [path.removesuffix(BIAS) for path in adapters]
    layers = list(dict.fromkeys(owners))
    generator = torch.Generator().manual_seed(seed_of(config.train.training_seed, "dropout", index))
    dropped = torch.rand(len(layers), generator=generator) < modules
    if dropped.all():
        dropped[index % len(layers)] = False
    left_out = dict(zip(layers, dropped.tolist(), strict=True))
    # All masks in one tensor, so that they reach the device by one copy.
    sizes = [adapter.rank for adapter in members]
    kept = (torch.rand(sum(sizes), generator=generator) >= ranks).float() / (1.0 - ranks)
    masks = kept.to(next(members[0].parameters()).device, non_blocking=True).split(sizes)
    for adapter, mask, owner in zip(members, masks, owners, strict=True):
        adapter.rank_mask = mask if ranks else None
        adapter.is_dropped = left_out[owner]
    try:
        yield
    finally:
        for adapter in members:
            adapter.rank_mask, adapter.is_dropped = None, False
