"""What a node shows of its progress."""

from __future__ import annotations

import pytest

from lora_weave.lora_core.events import Stepped
from lora_weave.lora_core.host import progress
from lora_weave.lora_core.host.progress import NodeProgress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.2, "1 s"), (41.5, "42 s"), (59.0, "59 s"), (59.5, "1 min"), (200, "3 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_time_that_is_left(monkeypatch):
    """Of steps of half a second: minutes first, then seconds, and none at the first step."""
    now, texts = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    node = NodeProgress(None)
    monkeypatch.setattr(node, "text", texts.append)
    for step in (1, 81, 220, 320):
        now[0] = 100.0 + 0.5 * step
        node.publish(step_of(step))
    lefts = [text.rpartition(", ")[2] for text in texts]
    assert lefts == ["loss 0.5000", "2 min left", "50 s left", "0 s left"]


def step_of(step: int) -> Stepped:
    return Stepped(
        step=step, total_steps=320, loss=0.5, grad_norm=1.0, learning_rate=1e-3, skipped=False
    )
