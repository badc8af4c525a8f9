"""Tell the host how far a node is, and stop when the user interrupts."""

from __future__ import annotations

import math
import time

import comfy.model_management
import comfy.utils
from server import PromptServer

from ..events import Event, Started, Stepped

Interrupted = comfy.model_management.InterruptProcessingException
SECONDS_BETWEEN_TEXTS = 0.25


class NodeProgress:
    """The host's progress bar and status text of one node."""

    interrupted = Interrupted  # a BaseException on 0.33, an Exception on 0.3.75

    def __init__(self, node_id: str | None) -> None:
        self._node_id = node_id
        self._bar: comfy.utils.ProgressBar | None = None
        self._label = ""
        self._last_text_at = 0.0
        self._first: tuple[int, float] | None = None  # step and time of the first step seen

    def phase(self, label: str, done: int, total: int) -> None:
        """Progress of a preparing phase. Raises Interrupted."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._show(label, done, total, f"{label}: {done} of {total}")

    def publish(self, event: Event) -> None:
        """Progress of training. Raises Interrupted, checked at every step.

        0.33 calls the host's own check in its progress hook every 100 ms at most.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        if isinstance(event, Started):
            self._show("training", event.step, event.total_steps, "training starts")
        elif isinstance(event, Stepped):
            text = f"step {event.step} of {event.total_steps}, loss {event.loss:.4f}"
            self._show("training", event.step, event.total_steps, text + self._remaining(event))
            if event.skipped:
                self.text(f"step {event.step} was skipped: its loss or gradient was not a number")

    def _remaining(self, event: Stepped) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (event.step, now)
            return ""
        steps, seconds = event.step - self._first[0], now - self._first[1]
        if steps < 1:
            return ""
        left = (event.total_steps - event.step) * seconds / steps
        return f", {seconds / steps:.2f} s a step, {duration(left)} left"

    def _show(self, label: str, done: int, total: int, text: str) -> None:
        if self._bar is None or label != self._label:
            self._bar = comfy.utils.ProgressBar(total, node_id=self._node_id)
            self._label = label
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        if done < total and now - self._last_text_at < SECONDS_BETWEEN_TEXTS:
            return
        self._last_text_at = now
        self.text(text)

    def text(self, text: str) -> None:
        """Show a text on the node."""
        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node_id is not None:
            server.send_progress_text(text, self._node_id)


def duration(seconds: float) -> str:
    """ "42 s", or whole minutes from a minute on: "3 min"."""
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 60 else f"{seconds / 60:.0f} min"
