"""What the core's tests share: one thread, one table of tolerances."""

from collections.abc import Callable, Iterator

import pytest
import torch

from . import tolerances


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are too small for threads, and sums don't depend on their number then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """assert_close(found, expected): equal within TOL of found's dtype, or of `dtype`."""
    return tolerances.assert_close
