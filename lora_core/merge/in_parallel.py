"""Layers worked on side by side, each by one thread: small decompositions gain nothing of more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Made = TypeVar("Made")


def each_layer(
    make: Callable[[str], Made],
    paths: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Made]:
    """{path: make(path)} in the order of `paths`.

    As many at once as torch has threads, so that memory is bounded by so many of the largest
    layers. `progress(done, of)` is called in this thread after each; what it raises, or `make`
    does, ends the work after the layers at hand.
    """
    threads = torch.get_num_threads()
    made: dict[str, Made] = {}
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = {pool.submit(make, path): path for path in paths}
        for done, future in enumerate(as_completed(waiting), start=1):
            made[waiting[future]] = future.result()
            if progress is not None:
                progress(done, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads started from now on would take over the 1
    return {path: made[path] for path in paths}
