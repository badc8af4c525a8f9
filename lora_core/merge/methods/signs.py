"""The sign that most of the changes' weight has at each element: TIES' election."""

from __future__ import annotations

from torch import Tensor


def agreeing(weighted: Tensor) -> Tensor:
    """1 where a change (N, ...) has the sign of their sum, 0 elsewhere and where it is 0.

    TIES-Merging, https://arxiv.org/abs/2306.01708 (section 4.2): the sign of the larger total.
    Elected on the changes at their strengths, so that a negative one counts as what it does.
    """
    elected = weighted.sum(0).sign()
    elected[elected == 0] = 1.0  # of a tie, as mergekit
    return (weighted.sign() == elected).to(weighted.dtype)
