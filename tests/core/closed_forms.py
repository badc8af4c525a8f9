"""What every adapter type computes and how it starts, written down once more: the tests' own view.

Letters: O out, I in, K kernel (flattened), R rank; W the frozen weight, s the strength.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import MAGNITUDES, Sample

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """How a factor starts: a deviation, and the shape and middle of its distribution."""

    deviation: float
    mean: float = 0.0
    kurtosis: float = 3.0  # of a normal distribution; 9/5 of a uniform one
    bound: float = math.inf


@dataclass(frozen=True)
class Formula:
    """A type by its definition.

    `change` gives ΔV (before a `dora_scale`, at strength 1) from a file's tensors and the weight,
    all in float64. `start` says how the tensor of a name and shape starts.
    """

    change: Callable[[Tensors, Tensor], Tensor]
    start: Callable[[str, Shape], Start]


def changed(sample: Sample, strength: float = 1.0) -> Tensor:
    """W + s · ΔW in float64; with a magnitude m, the way from W to m · (W + ΔV) / ‖W + ΔV‖."""
    tensors = {name: tensor.double() for name, tensor in sample.tensors.items()}
    weight = sample.weight.double()
    full = weight + FORMULAS[sample.case.name].change(tensors, weight)
    if sample.magnitude is not None:
        axis = MAGNITUDES[sample.magnitude]
        magnitudes = tensors["dora_scale"].flatten()
        rows = [
            m * row / row.square().sum().sqrt()
            for m, row in zip(magnitudes, full.unbind(axis), strict=True)
        ]
        full = torch.stack(rows, axis)
    return (1.0 - strength) * weight + strength * full


def delta(sample: Sample) -> Tensor:
    return changed(sample) - sample.weight.double()


def lora(tensors: Tensors, weight: Tensor) -> Tensor:
    """ΔV[o, i, k] = alpha / R · Σ_r up[o, r] · down[r, i, k], or through mid in the Tucker form."""
    shape, up = weight.shape, tensors["lora_up.weight"].flatten(1)
    down = tensors["lora_down.weight"]
    scale = tensors["alpha"] / down.shape[0]
    if "lora_mid.weight" in tensors:
        middle = tensors["lora_mid.weight"].flatten(2)
        product = torch.einsum("om,mnk,ni->oik", up, middle, down.flatten(1))
    else:
        product = torch.einsum("or,rik->oik", up, down.reshape(down.shape[0], shape[1], -1))
    return scale * product.reshape(shape)


def loha(tensors: Tensors, weight: Tensor) -> Tensor:
    """The product of two matrices at each place, each Σ_r a[o, r] · b[r, ik], or Tucker."""
    parts, shape = [], weight.shape
    for number in "12":
        a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
        core = tensors.get(f"hada_t{number}")
        if core is None:
            parts.append(torch.einsum("or,rc->oc", a, b).reshape(shape))
        else:
            parts.append(torch.einsum("pqk,po,qi->oik", core.flatten(2), a, b).reshape(shape))
    return tensors["alpha"] / tensors["hada_w1_b"].shape[0] * parts[0] * parts[1]


def lokr(tensors: Tensors, weight: Tensor) -> Tensor:
    """Blocks w1[l, m] · w2, the block (l, m) at rows l · J on and columns m · N on."""
    first, second, scale = tensors.get("lokr_w1"), tensors.get("lokr_w2"), torch.ones(())
    if first is None:
        scale = tensors["alpha"] / tensors["lokr_w1_b"].shape[0]
        first = torch.einsum("lr,rm->lm", tensors["lokr_w1_a"], tensors["lokr_w1_b"])
    if second is None:
        a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        scale = tensors["alpha"] / b.shape[0]
        if "lokr_t2" in tensors:
            second = torch.einsum("pqk,pj,qn->jnk", tensors["lokr_t2"].flatten(2), a, b)
        else:
            second = torch.einsum("jr,rc->jc", a, b)
    shape, kernel = weight.shape, math.prod(weight.shape[2:])
    second = second.reshape(shape[0] // first.shape[0], shape[1] // first.shape[1], kernel)
    result = torch.zeros(shape[0], shape[1], kernel, dtype=torch.float64)
    for row, values in enumerate(first):
        for column, value in enumerate(values):
            top, left = row * second.shape[0], column * second.shape[1]
            block = result[top : top + second.shape[0], left : left + second.shape[1]]
            block += value * second
    return scale * result.reshape(shape)


def full(tensors: Tensors, weight: Tensor) -> Tensor:
    return tensors["diff"]


def ia3(tensors: Tensors, weight: Tensor) -> Tensor:
    """diag(w) W, or W diag(w) on the inputs."""
    scales, axis = tensors["weight"].flatten(), int(tensors["on_input"].item())
    rows = [w * row for w, row in zip(scales, weight.unbind(axis), strict=True)]
    return torch.stack(rows, axis)


def glora(tensors: Tensors, weight: Tensor) -> Tensor:
    """alpha / R · (Σ_i W[o, i] (a1 a2)[i, n] + Σ_r b1[o, r] b2[r, n])"""
    a1, a2, b1 = (tensors[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1"))
    change = torch.einsum("oi...,in->on...", weight, a1 @ a2)
    change = change + torch.einsum("or,rn...->on...", b1, tensors["b2.weight"])
    return tensors["alpha"] / len(a2) * change


def skew(tensors: Tensors, out: int) -> Tensor:
    """Q = A - Aᵀ of all blocks, ‖Q‖ of all together at most alpha · O where alpha is above 0."""
    blocks = tensors["oft_blocks"]
    q = blocks - blocks.transpose(-1, -2)
    # The 1e-8 is LyCORIS', against a division by zero.
    limit, norm = tensors["alpha"].item() * out, q.square().sum().sqrt().item() + 1e-8
    return q * (limit / norm) if 0 < limit < norm else q


def rotation(q: Tensor) -> Tensor:
    """(1 + Q)(1 - Q)⁻¹"""
    eye = torch.eye(len(q), dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def rescaled(turned: Tensor, tensors: Tensors, weight: Tensor) -> Tensor:
    gain = tensors.get("rescale", torch.ones(1, dtype=weight.dtype)).reshape(-1, 1)
    return (gain * turned).reshape(weight.shape) - weight


def oft(tensors: Tensors, weight: Tensor) -> Tensor:
    """g ∘ diag(R_nᵀ) W - W; on the inputs, W diag(R_n) - W with R of the triangles"""
    if "oft_R.weight" in tensors:
        return oft_on_input(tensors, weight)
    matrix = torch.block_diag(*(rotation(q).t() for q in skew(tensors, len(weight))))
    return rescaled(matrix @ weight.flatten(1), tensors, weight)


def oft_on_input(tensors: Tensors, weight: Tensor) -> Tensor:
    """Q[i, j] = u = -Q[j, i] for the numbers u of i < j in order; only the exact rotation."""
    assert tensors["oft_R.terms"] == 0
    turns = []
    for values in tensors["oft_R.weight"]:
        size = next(n for n in range(99) if n * (n - 1) == 2 * len(values))
        q, places = (
            torch.zeros(size, size, dtype=weight.dtype),
            itertools.combinations(range(size), 2),
        )
        for (row, column), u in zip(places, values, strict=True):
            q[row, column], q[column, row] = u, -u
        turns.append(rotation(q))
    return (weight.flatten(1) @ torch.block_diag(*turns)).reshape(weight.shape) - weight


def boft(tensors: Tensors, weight: Tensor) -> Tensor:
    """g ∘ S_m ... S_1 W - W; the rows of a block in stage i lie 2^i · B / 2 apart."""
    out, turned = len(weight), weight.flatten(1)
    for number, stage in enumerate(skew(tensors, out)):
        size = stage.shape[-1]
        order = list(range(out))
        if size % 2 == 0:
            apart = 2**number * size // 2
            order = [
                start + row + apart * which
                for start in range(0, out, 2 * apart)
                for row in range(apart)
                for which in (0, 1)
            ]
        swap = torch.eye(out, dtype=weight.dtype)[order]
        turned = swap.t() @ torch.block_diag(*map(rotation, stage)) @ swap @ turned
    return rescaled(turned, tensors, weight)


def zero() -> Start:
    return Start(0.0)


def uniform(shape: Shape) -> Start:
    """U(±1/√fan_in): kaiming_uniform(a=√5) of Linear, ConvNd and microsoft/LoRA."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return Start(bound / math.sqrt(3.0), kurtosis=9.0 / 5.0, bound=bound)


def lora_start(name: str, shape: Shape) -> Start:
    return zero() if name == "lora_up.weight" else uniform(shape)


def loha_start(name: str, shape: Shape) -> Start:
    deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
    return Start(deviations.get(name, 0.1))


def lokr_start(name: str, shape: Shape) -> Start:
    return zero() if name in ("lokr_w2", "lokr_w2_b") else uniform(shape)


def rotation_start(name: str, shape: Shape) -> Start:
    return Start(0.0, mean=1.0 if name == "rescale" else 0.0)


def glora_start(name: str, shape: Shape) -> Start:
    return uniform(shape) if name in ("a1.weight", "b1.weight") else zero()


# One entry a type. A test fails for a registered type that has none.
FORMULAS = {
    "lora": Formula(lora, lora_start),
    "loha": Formula(loha, loha_start),
    "lokr": Formula(lokr, lokr_start),
    "full": Formula(full, lambda name, shape: zero()),
    "oft": Formula(oft, rotation_start),
    "boft": Formula(boft, rotation_start),
    "ia3": Formula(ia3, lambda name, shape: zero()),
    "glora": Formula(glora, glora_start),
}
