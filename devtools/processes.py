"""Child processes that end when we are told to end, however we are told."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

STOP_S = 60.0  # a training that is interrupted writes its state first


class Terminated(KeyboardInterrupt):
    """Another process told us to end. (After ctrl-C a plain KeyboardInterrupt is raised.)"""


def heed_termination() -> None:
    """Turn the signal that ends processes into an exception, so that clean-up runs."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def run_child(
    line: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> int:
    """Run a command that shares our terminal; returns its exit status.

    A child never outlives us: after ctrl-C, which it got as well, it has time to end by itself, and
    a termination is passed on.
    """
    process = subprocess.Popen(list(line), env=dict(environment), cwd=folder)
    try:
        return process.wait()
    except Terminated:
        process.terminate()
        raise
    finally:
        try:
            process.wait(STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def own_session() -> dict[str, bool]:
    """Options of Popen for a child that ctrl-C in the terminal must not reach."""
    return {"start_new_session": True} if os.name == "posix" else {}
