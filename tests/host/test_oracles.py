"""What the host makes of an adapter file is what ours makes of it, where the host is right."""

from __future__ import annotations

from collections.abc import Callable

import comfy.lora
import pytest
import torch
from torch import Tensor

from ..core.layer_kinds import cases
from ..core.samples import Sample, samples
from ..core.tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
STRENGTHS = [0.5, 1.0, 2.0, -1.0]


def is_right(sample: Sample) -> bool:
    """Where the host has no bug that is known.

    Its DoRA along the out axis takes the norm of the original weight, its Tucker forms know Conv2d
    alone, its Tucker LoKr none, and it multiplies a whole w2 that has one kernel axis or three by
    w1 on the wrong axes. `tests/core/test_known_bugs.py` has the sizes.
    """
    if sample.case.name not in ("lora", "loha", "lokr") or sample.magnitude not in (None, "in"):
        return False
    names, is_2d = sample.tensors.keys(), len(sample.shape) in (2, 4)
    if "lokr_t2" in names:
        return False
    return is_2d or not {"lora_mid.weight", "hada_t1", "lokr_w2"} & names


def hosts_weight(tensors: dict[str, Tensor], weight: Tensor, strength: float) -> Tensor:
    """The patched weight in `weight`'s dtype, which the host's patcher makes float32."""
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    patches = comfy.lora.load_lora(named, {"layer": "w.weight"}, log_missing=False)
    patch = (strength, patches["w.weight"], 1.0, None, None)
    return comfy.lora.calculate_weight(
        [patch], weight.clone(), "w.weight", intermediate_dtype=weight.dtype
    )


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("sample", [s for s in samples() if is_right(s)], ids=str)
def test_changed_weight_is_the_hosts(
    sample: Sample, dtype: torch.dtype, strength: float, count_case: Callable[..., None]
) -> None:
    """Files and base weights in `dtype`; computed in float32, or in float64 for float64."""
    sample = sample.in_dtype(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    weight = sample.weight.to(wide)
    expected = hosts_weight(sample.tensors, weight, strength)
    found = weight + strength * sample.adapter().to(wide).delta(weight).detach()
    assert not torch.equal(expected, weight)  # the host logs an error and goes on
    assert_close(found, expected)
    count_case(
        "host oracle",
        forms=sample.form,
        layers=sample.kind,
        dtypes=dtype,
        strengths=strength,
    )


def test_lokr_with_two_ranks_is_scaled_by_that_of_w2() -> None:
    """No trainer writes such a file, and only the host loads one."""
    case = cases()["lokr-both"]
    sample = Sample("lokr-both", case, "linear", dtype=torch.float64)
    tensors = sample.tensors
    for name, axis in (("lokr_w1_a", 1), ("lokr_w1_b", 0)):
        tensors[name] = torch.cat([tensors[name], 0.5 * tensors[name]], axis)
    assert [len(tensors[name]) for name in ("lokr_w1_b", "lokr_w2_b")] == [2, 1]
    found = case.type.from_tensors(tensors, sample.shape).delta(sample.weight)
    assert_close(sample.weight + found, hosts_weight(tensors, sample.weight, 1.0))
