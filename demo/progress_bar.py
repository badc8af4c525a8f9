"""A progress bar in the terminal, from the messages of a ComfyUI server."""

from __future__ import annotations

import sys
import time
from typing import Any


class Bar:
    """A progress bar for the node that works; a line now and then where there is no terminal."""

    WIDTH = 28
    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, titles: dict[str, str]) -> None:
        self.titles = titles
        self.node, self.value, self.total, self.text = "", 0.0, 1.0, ""
        self.terminal = sys.stdout.isatty()
        self.last_line_at = time.monotonic()
        self.length = 0

    def see(self, kind: str, data: Any) -> None:
        if kind == "executing" and data.get("node"):
            self.close()
            self.node, self.value, self.total, self.text = data["node"], 0.0, 1.0, ""
        elif kind == "progress" and data.get("node"):
            self.node, self.value, self.total = data["node"], data["value"], data["max"]
        elif kind == "text":
            self.node, self.text = data["node"], data["text"].splitlines()[0]
        else:
            return
        self.show()

    def show(self) -> None:
        share = min(1.0, self.value / self.total) if self.total else 0.0
        title = self.titles.get(self.node, self.node)
        if self.terminal:
            done = round(share * self.WIDTH)
            bar = "#" * done + "." * (self.WIDTH - done)
            line = f"{title[:24]:24} [{bar}] {share:4.0%} {self.text}"[:110]
            print("\r" + line.ljust(self.length), end="", flush=True)
            self.length = len(line)
        elif time.monotonic() - self.last_line_at > self.SECONDS_BETWEEN_LINES:
            self.last_line_at = time.monotonic()
            print(f"{title}: {share:.0%} {self.text}", flush=True)

    def close(self) -> None:
        """End the line of the node that was shown, full."""
        if self.terminal and self.node and self.length:
            self.value = self.total
            self.show()
            print(flush=True)
        self.length = 0
