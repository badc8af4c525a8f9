"""What the benchmarks share: cases run in turn, each in a process of its own or not; the report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a report. `ratio` is to the seconds of the row called `base`, `limit` the most
    that it may be; `peak_limit_mb` the most that `peak_mb` may be. None where there is no such."""

    case: str
    base: str
    seconds: float
    ratio: float
    limit: float | None
    peak_mb: float | None = None
    peak_limit_mb: float | None = None

    def misses(self) -> list[str]:
        """What is over its limit, in words."""
        found = []
        if self.limit is not None and self.ratio > self.limit:
            found.append(f"{self.case}: {self.ratio:.3f} x {self.base}, limit {self.limit:g}")
        if self.peak_mb and self.peak_limit_mb and self.peak_mb > self.peak_limit_mb:
            found.append(f"{self.case}: {self.peak_mb:.0f} MB, limit {self.peak_limit_mb:.0f} MB")
        return found


class Clock:
    """Times a case's steps inside its process: `while clock.tick(): step()`.

    `tick` ends the step before it, waits until the parent wants another one, and gives False when
    it wants no more; the peak memory is that of this moment.
    """

    def __init__(self, pipe: Connection, device: str) -> None:
        self._pipe = pipe
        self._device = device
        self._started: float | None = None
        self.peak_mb = 0.0

    def tick(self) -> bool:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self._pipe.send(None if self._started is None else now - self._started)
        more = bool(self._pipe.recv())
        if not more:
            self.peak_mb = peak_bytes(self._device) / MB
        self._started = time.perf_counter()
        return more

    def begin(self) -> None:
        """Start the step's time anew: what came before was to make it ready."""
        self._started = time.perf_counter()


Case = Callable[..., dict[str, Any]]  # (clock, **settings) -> facts that the report wants to know


@dataclass(frozen=True)
class Outcome:
    """What a case's process says in the end."""

    peak_mb: float
    facts: dict[str, Any]


class Worker:
    """A child process that runs one case, and a step of it whenever it is told to."""

    def __init__(self, name: str, case: Case, device: str, **settings: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, case, device, settings)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # its first tick: set up and waiting

    def step(self) -> float:
        """Seconds of one more step."""
        self._pipe.send(True)
        return float(self._receive())

    def finish(self) -> Outcome:
        self._pipe.send(False)
        outcome: Outcome = self._receive()
        self._process.join()
        return outcome

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process of the case {self.name!r} ended with exit code "
                f"{self._process.exitcode} (its own message is above; -9 means out of memory)"
            ) from None


class InProcess:
    """A case in this process, `run` being a step of it. `clock` gives seconds."""

    def __init__(
        self,
        name: str,
        run: Callable[[], None],
        device: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self._run = run
        self._device = device
        self._clock = clock

    def step(self) -> float:
        """Seconds of one more step."""
        started = self._clock()
        self._run()
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return self._clock() - started


def _work(pipe: Connection, case: Case, device: str, settings: dict[str, Any]) -> None:
    """In a thread, as the host's main.py runs prompts: glibc serves it from another heap, which
    keeps large freed blocks, where the main thread gives them back and faults them in anew."""
    clock = Clock(pipe, device)
    with ThreadPoolExecutor(max_workers=1) as thread:
        facts = thread.submit(case, clock, device=device, **settings).result()
    pipe.send(Outcome(clock.peak_mb, facts))


def interleaved(
    workers: Sequence[Worker | InProcess], warmups: int, rounds: int
) -> dict[str, float]:
    """Median seconds of a step of each worker; in each round each one runs a step, in turn.

    The first of a round changes from round to round.
    """
    for worker in workers:
        for _ in range(warmups):
            worker.step()
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(rounds):
        first = turn % len(workers)
        for worker in [*workers[first:], *workers[:first]]:
            seconds[worker.name].append(worker.step())
        note(f"round {turn + 1} of {rounds}: " + _in_words(seconds))
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def _in_words(seconds: dict[str, list[float]]) -> str:
    if len(seconds) > 8:
        return f"{len(seconds)} cases, {sum(measured[-1] for measured in seconds.values()):.1f} s"
    return ", ".join(f"{name} {measured[-1]:.3f} s" for name, measured in seconds.items())


def peak_bytes(device: str) -> int:
    """Peak of this process: allocated CUDA memory, or resident memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # ru_maxrss would include the parent's, from before exec
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def comfyui_path(given: str | None) -> Path:
    """The host to measure on: the one given, else $LORA_WEAVE_COMFYUI, else dev.py's."""
    chosen = given or os.environ.get("LORA_WEAVE_COMFYUI")
    return Path(chosen).resolve() if chosen else ROOT / ".host" / "ComfyUI"


def enter(comfyui: Path, device: str) -> None:
    """Make the host importable, and the pack as the package `lora_weave`."""
    pack = types.ModuleType("lora_weave")
    pack.__path__ = [str(ROOT)]
    sys.modules["lora_weave"] = pack
    from lora_weave.devtools import inprocess

    inprocess.enter(comfyui, *(["--cpu"] if device == "cpu" else []))


def enter_for(options: argparse.Namespace) -> str:
    """Make the host importable as a script's options say; where it measures, in words."""
    comfyui = comfyui_path(options.comfyui)
    enter(comfyui, options.device)
    import torch

    if options.one_thread:
        torch.set_num_threads(1)
    return f"{machine(comfyui)}, threads: {torch.get_num_threads()}"


def as_prompts_run(work: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> Any:
    """What `work` gives, in a thread, as the host runs prompts: see `_work`."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work, options).result()


@contextmanager
def in_training() -> Iterator[None]:
    """0.33 runs some kernels without a backward unless it is told."""
    import comfy.model_management

    if hasattr(comfy.model_management, "in_training"):
        comfy.model_management.in_training = True
    yield


def machine(comfyui: Path) -> str:
    """Processor, memory, system and versions, in one line."""
    version = re.findall(r'"(.+)"', (comfyui / "comfyui_version.py").read_text())
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, "
        f"ComfyUI {version[0] if version else 'of unknown version'}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return found[0] if found else platform.processor() or platform.machine()


class OtherLoad:
    """What other processes take of the processors from now on. Linux only."""

    def __init__(self) -> None:
        self._start = self._times()

    def note(self) -> list[str]:
        """One line on it; only workers that have finished count as ours."""
        if self._start is None:
            return []
        total, busy, own = (
            now - before for now, before in zip(self._times() or (), self._start, strict=True)
        )
        share = max(0.0, busy - own) / total
        return [f"Other processes took {share:.0%} of the processors' time meanwhile."]

    @staticmethod
    def _times() -> tuple[float, float, float] | None:
        """Seconds of all processors: in all, not idle, and for this process and its children."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(field) for field in stat.read_text().split("\n")[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, sum(os.times()[:4])


def note(text: str) -> None:
    """Say how it goes, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def report(
    benchmark: str, where: str, rows: Sequence[Row], notes: Sequence[str], as_json: bool
) -> int:
    """Write the results to stdout; the exit code: 1 where a limit is missed."""
    if not as_json:
        print(f"{benchmark} on {where}", _table(rows), "\n".join(notes), sep="\n\n")
    misses = [miss for row in rows for miss in row.misses()]
    for miss in misses:
        note(f"limit missed: {miss}")
    if as_json:
        found = [
            {name: _rounded(value) for name, value in dataclasses.asdict(row).items()}
            for row in rows
        ]
        result = {"benchmark": benchmark, "machine": where, "rows": found, "notes": list(notes)}
        print(json.dumps(result))
    return 1 if misses else 0


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _table(rows: Sequence[Row]) -> str:
    columns = {
        "case": [row.case for row in rows],
        "s/step": [f"{row.seconds:.4f}" for row in rows],
        "ratio": [f"{row.ratio:.3f}" for row in rows],
        "limit": ["" if row.limit is None else f"{row.limit:g}" for row in rows],
        "to": [row.base for row in rows],
        "peak MB": ["" if row.peak_mb is None else f"{row.peak_mb:.0f}" for row in rows],
        "limit MB": [
            "" if row.peak_limit_mb is None else f"{row.peak_limit_mb:.0f}" for row in rows
        ],
    }
    padded = []
    for name, cells in columns.items():
        if any(cells):
            width = max(map(len, (name, *cells)))
            pad = str.ljust if name in ("case", "to") else str.rjust
            padded.append([pad(cell, width) for cell in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
