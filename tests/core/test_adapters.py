"""ΔW of every adapter type against its formula in float64, PEFT and LyCORIS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core import adapters
from lora_weave.lora_core.adapters import ADAPTERS

from . import closed_forms, peers, test_full, test_glora, test_ia3, test_oft
from .layer_kinds import make_input, run, with_weight
from .samples import Sample, samples

Close = Callable[..., None]


@dataclass(frozen=True)
class Oracle:
    """`delta` gives the ΔW of another implementation for the samples that it `applies` to."""

    applies: Callable[[Sample], bool]
    delta: Callable[[Sample], Tensor]


ORACLES = {
    "closed form": Oracle(
        lambda sample: sample.case.name in closed_forms.FORMULAS, closed_forms.delta
    ),
    "PEFT": Oracle(peers.peft_applies, peers.peft_delta),
    "LyCORIS function": Oracle(peers.lycoris_function_applies, peers.lycoris_function_delta),
    "LyCORIS module": Oracle(peers.lycoris_module_applies, peers.lycoris_module_delta),
}
# What compares the other types with LyCORIS or PEFT.
ELSEWHERE = {
    "full": test_full.test_full_equals_lycoris,
    "oft": test_oft.test_rotations_equal_lycoris,
    "boft": test_oft.test_rotations_equal_lycoris,
    "ia3": test_ia3.test_ia3_equals_lycoris,
    "glora": test_glora.test_equals_lycoris,
}
DTYPES = [torch.float32, torch.float64]
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
SAMPLES = samples()
CASES = [
    pytest.param(sample, oracle, id=f"{sample}-{oracle.replace(' ', '-')}")
    for sample in SAMPLES
    for oracle in ORACLES
    if ORACLES[oracle].applies(sample)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("sample", "oracle"), CASES)
def test_change_is_the_oracles(
    sample: Sample,
    oracle: str,
    dtype: torch.dtype,
    assert_close: Close,
    count_case: Callable[..., None],
) -> None:
    """ΔW itself, and the output of the layer that has the adapter on it."""
    sample = sample.in_dtype(dtype)
    expected, adapter = ORACLES[oracle].delta(sample), sample.adapter()
    found = adapter.delta(sample.weight)
    # Next to W a DoRA's ΔW may be as small as 2 %, and W + ΔW is what was computed and rounded.
    base = 0.0 if sample.magnitude is None else sample.weight
    assert_close(base + found, base + expected)
    x = make_input(sample.kind, dtype)
    assert_close(run(sample.layer, adapter, x), with_weight(sample.layer, expected, x))
    count_case(
        "adapter oracles", forms=sample.form, layers=sample.kind, dtypes=dtype, oracles=oracle
    )


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_strength_leads_from_the_weight_to_the_changed_one(
    sample: Sample, assert_close: Close
) -> None:
    sample = sample.in_dtype(torch.float64)
    change = sample.adapter().delta(sample.weight)
    for strength in (0.0, 0.5, 1.0, 2.0, -1.0):
        found = sample.weight + strength * change
        assert_close(found, closed_forms.changed(sample, strength))


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_type_has_a_formula(name: str) -> None:
    """Without one, nothing here would test the type: it belongs into `closed_forms.py`."""
    assert name in closed_forms.FORMULAS


@pytest.mark.parametrize("form", sorted({sample.form for sample in SAMPLES}))
def test_every_form_of_a_known_type_has_two_oracles(form: str) -> None:
    """The formula and another implementation, here or in a file of the type's own."""
    named = [sample for sample in SAMPLES if sample.form == form]
    found = {name for name in ORACLES for sample in named if ORACLES[name].applies(sample)}
    assert "closed form" in found
    case = named[0].case
    is_ours = case.type.__module__.startswith(adapters.__name__)  # and no other test's
    assert len(found) > 1 or case.name in ELSEWHERE or not is_ours
