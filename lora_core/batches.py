"""The order of training: which samples make up each batch, by seed and number."""

import hashlib
import random
from collections.abc import Sequence

from .buckets import Size


class BatchPlan:
    """Every batch of a run by its number, without state: resuming is asking for a later number."""

    def __init__(
        self, bucket_of: Sequence[Size], repeats: Sequence[int], batch_size: int, seed: int
    ) -> None:
        self._arguments = (tuple(bucket_of), tuple(repeats), batch_size, seed)
        self._cached: tuple[int, list[list[int]]] = (0, _epoch(*self._arguments, 0))
        self.batches_per_epoch = len(self._cached[1])  # equal in every epoch
        if not self.batches_per_epoch:
            raise ValueError("There is nothing to train on: no item is repeated at least once.")

    def batch(self, micro_step: int) -> list[int]:
        """Item indices of batch number `micro_step`, counted from 0 over all epochs."""
        if micro_step < 0:
            raise ValueError(f"batch number {micro_step}: numbers start at 0")
        epoch, number = divmod(micro_step, self.batches_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, _epoch(*self._arguments, epoch))
        return self._cached[1][number]


def _epoch(
    bucket_of: Sequence[Size], repeats: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, as lists of item indices.

    Every item appears `repeats` times; a batch holds one bucket only, and a bucket's last batch may
    be smaller. The order depends on the arguments alone.
    """
    if len(bucket_of) != len(repeats):
        raise ValueError(f"{len(bucket_of)} buckets for {len(repeats)} repeats: one each an item")
    if batch_size < 1:
        raise ValueError(f"The batch size is {batch_size}; it must be at least 1.")
    # sorted by random(), the only method whose numbers Python keeps from version to version
    draw = random.Random(_hash(seed, epoch)).random
    members: dict[Size, list[int]] = {size: [] for size in sorted(set(bucket_of))}
    for index, (size, times) in enumerate(zip(bucket_of, repeats, strict=True)):
        members[size] += [index] * times
    cut: list[list[int]] = []
    for samples in members.values():
        samples = sorted(samples, key=lambda _: draw())
        cut += [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return sorted(cut, key=lambda _: draw())


def _hash(*numbers: int) -> int:
    """A 256-bit number that depends on every one of the numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest(), "big")
