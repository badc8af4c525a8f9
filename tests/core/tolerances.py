"""How far two tensors may be apart: one table by dtype for all tests."""

import torch
from torch import Tensor

# Largest error allowed, as a share of the expected tensor's largest value. Half a unit in the last
# place is 3.9e-3 for bfloat16, 4.9e-4 for float16 and 6e-8 for float32; a low-rank chain rounds
# two or three times. Observed over all adapters and layer kinds: 5e-16, 2.5e-7, 9e-3, 1.7e-3.
TOL = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal within TOL of found's dtype, or of `dtype`."""
    found, expected = found.detach(), expected.detach()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        rtol=0.0,
        atol=TOL[dtype or found.dtype] * max(largest, 1e-30),
    )
