"""How a new adapter is made, where its type leaves a choice. Types ignore what is not theirs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CreateOptions:
    """`tucker`: convolutions as a core and two 1x1 ones (LoRA, LoHa, LoKr).

    `factor`: the larger side of LoKr's first block, -1 for the nearest to a square.
    `decompose_both`: LoKr's first block as a product, too, where its size allows it.
    `constraint`: the largest ‖Q‖ of OFT and BOFT over the number of outputs, 0 for none.
    `rescale`: OFT and BOFT with a trained factor of each output.
    `on_input`: IA3's factors are the inputs', not the outputs', and OFT rotates those.
    """

    tucker: bool = False
    factor: int = -1
    decompose_both: bool = False
    constraint: float = 0.0
    rescale: bool = False
    on_input: bool = False


DEFAULT = CreateOptions()
