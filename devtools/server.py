"""Run a ComfyUI server as a child process: start, wait until it answers, stop."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .environment import missing_modules
from .hosts import Host, has_gpu
from .paths import SetupError
from .processes import own_session

START_S = 240.0
STOP_S = 15.0
PAGE_MODULE = "comfyui_frontend_package"


def command(host: Host, base: Path, port: int, arguments: Sequence[str] = ()) -> list[str]:
    """The command line: everything that the server writes goes below `base`."""
    line = [str(host.python), str(host.path / "main.py")]
    line += ["--base-directory", str(base), "--listen", "127.0.0.1", "--port", str(port)]
    line += ["--disable-auto-launch", "--disable-api-nodes"]
    line += ["--database-url", "sqlite:///" + (base / "user" / "comfyui.db").as_posix()]
    if not has_gpu(host):
        line += ["--cpu", "--fp32-text-enc"]  # half precision is slower on a CPU
    if missing_modules(host.python, (PAGE_MODULE,)):
        page = base / "page"  # without the package that has the page, the server starts only so
        page.mkdir(exist_ok=True)
        line += ["--front-end-root", str(page)]
    return [*line, *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server; `with Server(...) as server` starts and stops it. What it prints goes to `log`."""

    def __init__(
        self,
        host: Host,
        base: Path,
        *,
        log: Path,
        port: int = 0,
        arguments: Sequence[str] = (),
    ) -> None:
        self.host, self.base, self.log = host, base, log
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.arguments = tuple(arguments)
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait for the first answer. Raises SetupError with the log's end without one."""
        line = command(self.host, self.base, self.port, self.arguments)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.host.path,
                env={**self.host.environment(), "PYTHONUNBUFFERED": "1"},
                **own_session(),  # ctrl-C reaches us only, and we stop it
            )
        deadline = time.monotonic() + START_S
        while not self.answers():
            if self.process.poll() is not None:
                raise SetupError(f"ComfyUI ended while starting:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise SetupError(f"ComfyUI did not answer in {START_S:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether this server (not another on the same port) answers over HTTP."""
        try:
            with urllib.request.urlopen(f"{self.address}/system_stats", timeout=5) as response:
                arguments = json.load(response)["system"].get("argv", [])
        except (OSError, ValueError, KeyError, urllib.error.URLError):
            return False
        return not arguments or str(self.base) in arguments

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])
