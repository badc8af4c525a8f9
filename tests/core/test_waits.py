"""No step waits for the device: nothing is read from it but a step's numbers, one step late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.events import Stepped
from lora_weave.lora_core.training import loop
from lora_weave.lora_core.training.loop import Training
from lora_weave.lora_core.training.optimizers import make_optimizer

from ..waits import Wait, watched_waits
from .tiny import (
    KINDS,
    TinyDenoiser,
    TinyRun,
    make_adapters,
    make_config,
    make_examples,
    make_model,
    make_run,
)

READS: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("_local_scalar_dense", lambda x: x[0].item()),
    ("_local_scalar_dense", lambda x: bool(x.isfinite().all())),
    ("_local_scalar_dense", lambda x: float(x.sum())),
    ("equal", lambda x: torch.equal(x, x)),
    ("nonzero", lambda x: x.nonzero()),
    ("nonzero", lambda x: torch.where(x > 0)),
    ("masked_select", lambda x: x.masked_select(x > 0)),
    ("index", lambda x: x[x > 0]),
    ("_unique2", lambda x: x.unique()),
    ("tolist", lambda x: x.tolist()),
    ("numpy", lambda x: x.numpy()),
    ("cpu", lambda x: x.cpu()),
]


@pytest.mark.parametrize(("name", "read"), READS)
def test_a_read_is_seen(name: str, read: Callable[[Tensor], Any]) -> None:
    with watched_waits() as waits:
        read(torch.rand(3))
    assert name in [what for what, _ in waits]


def test_arithmetic_is_no_read() -> None:
    x = torch.rand(3, requires_grad=True)
    with watched_waits() as waits:
        torch.where(x > 0.5, x, 0.0).clamp(min=0.1)[torch.tensor([0, 2])].sum().backward()
    assert waits == []


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_only_the_numbers_of_the_one_before(
    kind: str, precision: str, fused: bool
) -> None:
    """Seen beside them is whether the caption is dropped, which is drawn on the host."""
    run = make_run(make_config(kind, steps=6, batch_size=1, options={"precision": precision}), kind)
    training = run.training
    training.optimizer = make_optimizer(training.config, training._groups(), fused=fused)
    seen: dict[int, list[Wait]] = {}
    with watched_waits() as waits:
        for event in run.events():
            seen[training.step] = waits.copy()
            if isinstance(event, Stepped) and training.step < 6:
                assert event.step == training.step - 1
            waits.clear()
    dropped, numbers = ("tolist", (1,)), ("tolist", (3,))
    assert [seen[step] for step in (3, 4, 5)] == [[dropped, numbers]] * 3


class Unreadable(TinyDenoiser):
    """On a device whose tensors have no values: whoever reads one, or copies it back, fails."""

    device = torch.device("meta")

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Sequence[Tensor]) -> Tensor:
        return super().predict(x_t, sigma, [one.to(x_t.device) for one in conditioning])


def test_training_reads_nothing_else_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(steps=5)
    model = make_model().to("meta")
    training = Training(config, make_adapters(model), Unreadable.device)
    run = TinyRun(training, make_examples(config), Unreadable("eps", model), model)
    with pytest.raises(NotImplementedError, match="meta"):
        run.finish()
    run.training.step, run.training._unread = 0, None
    read_at: list[int] = []

    def values(_: Any) -> list[float]:
        read_at.append(training.step)
        return [0.5, 1.0, 0.0]

    monkeypatch.setattr(loop._StepNumbers, "values", values)
    assert [event.loss for event in run.finish()] == [0.5] * 5
    assert read_at == [2, 3, 4, 5, 5]
