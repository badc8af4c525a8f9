"""A run's folder: its identity, lock, record of events, state, and final adapters."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..events import Event
from ..files import next_free, write_atomically
from .checkpoint import load_state, save_state, saved_losses
from .config import ResolvedConfig
from .loop import Training


@dataclass
class Record:
    """What `run.json` holds."""

    status: str = "new"  # new, training, stopped, failed or finished
    step: int = 0
    output: str = ""  # path of the LoRA file that this run owns
    wanted: str = ""  # the path that was asked for; `output` may be its `name-2`
    output_stamp: list[int] = field(default_factory=list)  # its mtime in ns and size as written
    started_at: float = 0.0
    finished_at: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    remark: str = ""  # what the user should know of how the run began or went on
    error: str = ""  # what a failed run ended with


class Run:
    """One training run on disk. Open it by `open_run`, which holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_path = folder / "state.safetensors"
        self.result_path = folder / "result.safetensors"
        self._has_lost_its_state = False
        self._record_path = folder / "run.json"
        self._events_path = folder / "events.jsonl"
        self.record = Record()
        if self._record_path.exists():
            try:
                self.record = Record(**json.loads(self._record_path.read_text("utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self._record_path} is damaged or of another version: {error}. "
                    f"Delete the folder {folder} to train this run anew."
                ) from error

    def is_finished(self, steps: int) -> bool:
        """Whether the run has its result for exactly `steps` steps."""
        done = self.record.status == "finished" and self.record.step == steps
        return done and self.result_path.exists()

    def begin(self, config: ResolvedConfig) -> None:
        """Write down that the run is under way; an earlier start time is kept.

        The record's remark says from where it goes on, and when its schedule changes by that.
        """
        train, options = config.train, config.options
        planned = self.record.config.get("train", {}).get("steps", train.steps)
        self.record.remark = f"Rank {train.rank}, learning rate {train.learning_rate:g}."
        if self.record.step:
            self.record.remark = f"The run went on from step {self.record.step}."
        elif self._has_lost_its_state:
            self.record.remark += " Its state is gone, so the run began anew."
        if planned != train.steps and (options.schedule != "constant" or options.warmup > 0):
            self.record.remark += (
                f" It was planned for {planned} steps: its {options.schedule} learning rate was "
                f"computed anew for {train.steps}, warm-up included."
            )
        self.record.config = config.to_json()
        self.record.started_at = self.record.started_at or time.time()
        self.record.finished_at = 0.0
        self._write("training")

    def restore(self, training: Training) -> None:
        """Put the saved state, if there is one, into `training`.

        Raises ValueError where it is damaged, saying how to do without it.
        """
        if not self.state_path.exists():
            self._has_lost_its_state = self.record.step > 0
            self.record.step = 0
            return
        try:
            load_state(training, self.state_path)
        except ValueError as error:
            raise ValueError(
                f'the run can\'t go on: {error}\nSet resume to "start over" to train it anew.'
            ) from error

    def losses(self) -> list[float]:
        """The loss of every step, NaN where one was skipped.

        From the saved state or, where that is gone or damaged, from the events that are left.
        """
        try:
            return saved_losses(self.state_path)
        except (FileNotFoundError, ValueError):
            return self._told_losses()

    def _told_losses(self) -> list[float]:
        """The losses in `events.jsonl`. A step that was taken twice counts as the second time."""
        losses = {
            event["step"]: math.nan if event["skipped"] else event["loss"]
            for event in self._events()
            if event["event"] == "stepped" and event["step"] <= self.record.step
        }
        return [losses[step] for step in sorted(losses)]

    def _events(self) -> Iterator[dict[str, Any]]:
        """What `add` has written, without lines that a crash cut off."""
        if not self._events_path.exists():
            return
        for line in self._events_path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def add(self, event: Event) -> None:
        """Append an event to `events.jsonl`."""
        with open(self._events_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **event.to_json()}) + "\n")

    def save(self, training: Training) -> None:
        """Write the state, then the record that refers to it. The run is still under way."""
        save_state(training, self.state_path)
        self.record.step = training.step
        self.record.error = ""
        self._write("training")

    def end(self, status: str, error: str = "") -> None:
        """Write down how the run ended, after all that it leaves is written."""
        self.record.error = error
        if status == "finished":
            self.record.finished_at = time.time()
        self._write(status)

    def owns(self, path: Path) -> bool:
        """Whether `path` is this run's output, as the run left it, or is free."""
        if not path.exists():
            return True
        return str(path) == self.record.output and _stamp(path) == self.record.output_stamp

    def keep_output(self, path: Path, wanted: Path) -> None:
        """Remember that this run has written the LoRA file at `path`, when asked for `wanted`."""
        self.record.output, self.record.output_stamp = str(path), _stamp(path)
        self.record.wanted = str(wanted)
        self._write(self.record.status)

    def forget(self) -> None:
        """Start over: drop state, result and events. Its LoRA file stays the run's own."""
        for path in (self.state_path, self.result_path, self._events_path):
            path.unlink(missing_ok=True)
        kept = self.record
        self.record = Record(output=kept.output, wanted=kept.wanted, output_stamp=kept.output_stamp)
        self._write("new")

    def _write(self, status: str) -> None:
        self.record.status = status
        text = json.dumps(asdict(self.record), indent=1)
        write_atomically(self._record_path, text.encode())


def run_id(config: ResolvedConfig, dataset: str, model: str, start_from: str) -> str:
    """The run's name, 24 hex digits: a hash of what makes its result what it is.

    The settings without steps, saving and names, and the identities of the dataset, of the model
    with its patches, and of the LoRA that it starts from ("" for none).
    """
    parts = [json.dumps(config.identity(), sort_keys=True), dataset, model, start_from]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@contextmanager
def open_run(runs: Path, name: str, *, steps: int, start_over: bool) -> Iterator[Run]:
    """The run `name` under the folder `runs`, locked against every other process.

    A run that has already gone further than `steps` can't go back: the shorter one gets a folder
    of its own. Raises RuntimeError when another process trains the run.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / f"{name}.lock", "a+b") as lock_file:
        _lock(lock_file, name)
        folder = runs / name
        if Run(folder).record.step > steps and not start_over:
            folder = runs / f"{name}-{steps}"
        folder.mkdir(exist_ok=True)
        yield Run(folder)


def free_output_path(run: Run, wanted: Path) -> Path:
    """`wanted`, or the next of `name-2`, `name-3`... that no other file has taken."""
    return next_free(wanted, run.owns)


def start_hash(tensors: Mapping[str, Any] | None) -> str:
    """Identity of the LoRA that a run starts from."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tuple(tensors[name].shape)};".encode())
        digest.update(tensors[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_mtime_ns, status.st_size]


def _lock(file: IO[bytes], name: str) -> None:
    """An operating-system lock, gone with the process. Raises RuntimeError when it is taken."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(f"another process is training this very run ({name})") from error
