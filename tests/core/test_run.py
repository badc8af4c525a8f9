"""A run's identity, its lock, its record, and whose LoRA file is whose."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_weave.lora_core.events import Saved, Stepped
from lora_weave.lora_core.safetensors_file import serialize
from lora_weave.lora_core.training.config import NOT_IDENTITY, TrainConfig, TrainOptions
from lora_weave.lora_core.training.run import (
    Run,
    free_output_path,
    open_run,
    run_id,
    start_hash,
)

from .tiny import TinyRun, make_config, make_run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5


def id_of(dataset: str = "data", model: str = "model", start: str = "", **changes: Any) -> str:
    options = {name: changes.pop(name) for name in list(changes) if hasattr(TrainOptions, name)}
    return run_id(make_config(options=options, **changes), dataset, model, start)


# --- identity


def test_an_id_is_a_name_for_a_folder() -> None:
    assert re.fullmatch("[0-9a-f]{24}", id_of())


def test_an_id_lasts() -> None:
    """Equal in another process: tests/server/test_runs.py resumes after a restart."""
    assert id_of() == id_of()


CHANGED: dict[str, Any] = {
    **{"rank": 8, "alpha": 2.0, "learning_rate": 0.5, "batch_size": 3, "training_seed": 7},
    **{"weight_decay": 0.5, "schedule": "linear", "warmup": 0.5, "final_learning_rate": 0.5},
    **{"accumulation_steps": 3, "max_grad_norm": 0.5, "loss_weighting": "none"},
    **{"min_snr_gamma": 2.0, "timestep_sampling": "logit-normal", "timestep_shift": 2.0},
    **{"caption_dropout": 0.5, "guidance": 3.0, "targets": "attention", "include": "attn"},
    **{"exclude": "attn", "text_encoder": True, "text_encoder_learning_rate": 0.5},
    **{"precision": "bf16", "gradient_checkpointing": True},
    **{"dora": True, "rslora": True, "initialisation": "pissa", "tucker": True, "lokr_factor": 2},
    **{"decompose_both": True, "lora_plus_ratio": 2.0, "rank_dropout": 0.1, "module_dropout": 0.1},
    **{"max_norm": 1.0, "norms": True, "algorithm": "loha"},
    **{"steps": 99, "output_name": "other", "resume": "start over", "save_state_every": 7},
}
ONE_CHOICE = {"optimizer"}  # so far


def test_every_setting_is_looked_at_here() -> None:
    fields = [*dataclasses.fields(TrainConfig), *dataclasses.fields(TrainOptions)]
    assert {field.name for field in fields} == CHANGED.keys() | ONE_CHOICE
    for field in fields:
        if field.name in ONE_CHOICE:
            assert len(field.metadata["choices"]) == 1


@pytest.mark.parametrize("name", CHANGED)
def test_what_makes_another_run(name: str) -> None:
    """Everything but how long it is, how it is saved, its name and the memory that it takes."""
    same = id_of(**{name: CHANGED[name]}) == id_of()
    free = {"steps", "output_name", "resume", "save_state_every", "gradient_checkpointing"}
    assert same == (name in free) == (name in NOT_IDENTITY)


@pytest.mark.parametrize("part", ["dataset", "model", "start"])
def test_other_inputs_are_another_run(part: str) -> None:
    assert id_of(**{part: "other"}) != id_of()


def test_parts_are_not_confused() -> None:
    assert id_of(dataset="a", model="bc") != id_of(dataset="ab", model="c")


def test_automatic_values_are_the_run_of_their_values() -> None:
    """0 and what it stands for give the same LoRA, so they are one run."""
    written_out = make_config(rank=16, alpha=16.0)
    assert make_config(rank=0, alpha=0.0).identity() == written_out.identity()


def test_start_hash_is_of_the_content() -> None:
    tensors = {"a.lora_up.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    expected = start_hash(tensors)
    assert start_hash({}) == start_hash(None) == ""
    assert start_hash(dict(reversed(tensors.items()))) == expected
    assert start_hash({name: tensor.clone() for name, tensor in tensors.items()}) == expected
    assert start_hash({**tensors, "b": torch.tensor([1.0, 2.0])}) != expected
    assert start_hash({**tensors, "b": torch.ones(1, 2)}) != expected
    assert start_hash({"c": tensors["b"], "a.lora_up.weight": tensors["a.lora_up.weight"]}) != (
        expected
    )
    strided = torch.arange(6.0).reshape(3, 2).T
    assert start_hash({"x": strided}) == start_hash({"x": strided.contiguous()})


# --- the lock


HOLDER = """
import sys, types
pack = types.ModuleType("lora_weave")
pack.__path__ = [sys.argv[1]]
sys.modules["lora_weave"] = pack
from pathlib import Path
from lora_weave.lora_core.training.run import open_run
with open_run(Path(sys.argv[2]), sys.argv[3], steps=5, start_over=False):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run "busy" open until it is told to end."""
    line = [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path), "busy"]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def opened(folder: Path, name: str = "busy", *, steps: int = 5, start_over: bool = False) -> str:
    with open_run(folder, name, steps=steps, start_over=start_over) as run:
        return run.folder.name


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path, holder) -> None:
    for change in ({}, {"start_over": True}, {"steps": 1}):
        with pytest.raises(RuntimeError, match=r"another process is training this very run \(busy"):
            opened(tmp_path, **change)
    assert opened(tmp_path, "another") == "another"


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_a_lock_goes_with_its_process(tmp_path: Path, holder, how: str) -> None:
    if how == "killed":
        holder.kill()
    else:
        holder.stdin.close()
    holder.wait(30)
    assert opened(tmp_path) == "busy"


def test_a_lock_ends_with_the_context(tmp_path: Path) -> None:
    assert opened(tmp_path) == opened(tmp_path) == "busy"
    with pytest.raises(ZeroDivisionError):
        with open_run(tmp_path, "busy", steps=1, start_over=False):
            raise ZeroDivisionError
    assert opened(tmp_path) == "busy"


# --- the record


@pytest.fixture
def trained() -> TinyRun:
    tiny = make_run(make_config(steps=STEPS))
    tiny.finish()
    return tiny


def finished_run(folder: Path, trained: TinyRun) -> Run:
    run = Run(folder)
    run.begin(trained.training.config)
    run.save(trained.training)
    run.result_path.write_bytes(b"result")
    run.end("finished")
    return run


def test_a_new_run(tmp_path: Path) -> None:
    with open_run(tmp_path, "new", steps=STEPS, start_over=False) as run:
        assert run.record.status == "new"
        assert run.record.step == 0
        assert not run.is_finished(STEPS)


def test_the_record_lasts(tmp_path: Path, trained: TinyRun) -> None:
    run = Run(tmp_path)
    before = time.time()
    run.begin(trained.training.config)
    assert Run(tmp_path).record.status == "training"
    run.save(trained.training)
    assert Run(tmp_path).record.status == "training"
    run.end("failed", "some reason")
    found = Run(tmp_path).record
    assert (found.status, found.step, found.error) == ("failed", STEPS, "some reason")
    assert before <= found.started_at <= time.time()
    assert found.finished_at == 0.0
    assert found.config == json.loads(json.dumps(trained.training.config.to_json()))
    assert Run(tmp_path).losses() == trained.training.losses


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "new", "invented_later": 1}'])
def test_a_damaged_record_says_what_to_delete(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json is damaged or of another version") as caught:
        Run(tmp_path)
    assert f"Delete the folder {tmp_path} " in str(caught.value)


def test_a_finished_run(tmp_path: Path, trained: TinyRun) -> None:
    run = finished_run(tmp_path, trained)
    assert Run(tmp_path).record.finished_at >= run.record.started_at
    assert Run(tmp_path).is_finished(STEPS)
    assert not Run(tmp_path).is_finished(STEPS + 1)
    run.result_path.unlink()
    assert not Run(tmp_path).is_finished(STEPS)


def test_a_run_that_goes_on_keeps_its_start(tmp_path: Path, trained: TinyRun) -> None:
    first = finished_run(tmp_path, trained).record
    run = Run(tmp_path)
    run.begin(make_config(steps=STEPS + 3, options={"schedule": "constant", "warmup": 0.0}))
    assert run.record.started_at == first.started_at
    assert run.record.finished_at == 0.0
    assert run.record.remark == f"The run went on from step {STEPS}."


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_more_steps_say_that_a_schedule_changes(
    tmp_path: Path, schedule: str, warmup: float
) -> None:
    options = {"schedule": schedule, "warmup": warmup}
    run = Run(tmp_path)
    run.begin(make_config(steps=10, options=options))
    assert run.record.remark == "Rank 4, learning rate 0.005."
    run.begin(make_config(steps=12, options=options))
    said = (
        f" It was planned for 10 steps: its {schedule} learning rate was computed anew for 12, "
        "warm-up included."
    )
    assert run.record.remark.endswith(said) == (schedule != "constant" or warmup > 0)


def stepped(step: int, loss: float, skipped: bool = False) -> Stepped:
    return Stepped(
        step=step, total_steps=9, loss=loss, grad_norm=2.0, learning_rate=1e-3, skipped=skipped
    )


@pytest.mark.parametrize("damage", ["gone", "cut off", "of another kind"])
def test_losses_without_a_state_are_those_of_the_events(
    tmp_path: Path, trained: TinyRun, damage: str
) -> None:
    run = finished_run(tmp_path, trained)
    for step, loss in enumerate(trained.training.losses, start=1):
        run.add(stepped(step, loss))
    if damage == "gone":
        run.state_path.unlink()
    elif damage == "cut off":
        run.state_path.write_bytes(run.state_path.read_bytes()[:-1])
    else:
        run.state_path.write_bytes(serialize({"other": torch.zeros(1)}, {}))
    assert Run(tmp_path).losses() == trained.training.losses


def test_losses_of_events_after_a_crash(tmp_path: Path, trained: TinyRun) -> None:
    """It leaves half a line, and steps that are then taken again; step 2 was skipped."""
    run = finished_run(tmp_path, trained)
    run.state_path.unlink()
    assert run.losses() == []  # a run whose events are gone, too
    for step in (1, 2, 3, 4):
        run.add(stepped(step, 10.0 * step))
    with open(tmp_path / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"time": 1, "event": "step')
    run.add(Saved(step=1, path="its line is lost to the half one"))
    run.add(Saved(step=1, path="x"))
    run.add(stepped(2, math.inf, skipped=True))
    run.add(stepped(3, 3.0))
    run.add(stepped(STEPS, 5.0))
    run.add(stepped(STEPS + 1, 6.0))  # past what the record knows
    assert str(run.losses()) == str([10.0, math.nan, 3.0, 40.0, 5.0])


def test_restore_goes_on_from_the_saved_step(tmp_path: Path, trained: TinyRun) -> None:
    finished_run(tmp_path, trained)
    again = make_run(make_config(steps=STEPS + 2))
    Run(tmp_path).restore(again.training)
    assert again.training.step == STEPS
    assert again.training.losses == trained.training.losses


def test_restore_of_a_new_run_changes_nothing(tmp_path: Path, trained: TinyRun) -> None:
    before = trained.parameters()
    Run(tmp_path).restore(trained.training)
    assert all(map(torch.equal, trained.parameters(), before))


def test_a_damaged_state_says_how_to_do_without_it(tmp_path: Path, trained: TinyRun) -> None:
    run = finished_run(tmp_path, trained)
    run.state_path.write_bytes(run.state_path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated") as caught:
        run.restore(trained.training)
    assert str(caught.value).startswith("the run can't go on: ")
    assert str(caught.value).endswith('Set resume to "start over" to train it anew.')


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.add(stepped(1, 0.5))
    Run(tmp_path).add(Saved(step=1, path="猫.safetensors"))
    lines = (tmp_path / "events.jsonl").read_text("utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert {name: first[name] for name in ("event", "step", "loss")} == {
        **{"event": "stepped", "step": 1, "loss": 0.5}
    }
    assert second["path"] == "猫.safetensors"
    assert first["time"] <= second["time"]


# --- shorter, and over again


def test_a_run_whose_state_is_gone_says_that_it_begins_anew(
    tmp_path: Path, trained: TinyRun
) -> None:
    run = finished_run(tmp_path / "run", trained)
    run.state_path.unlink()
    again = Run(tmp_path / "run")
    fresh = make_run(trained.training.config).training
    again.restore(fresh)
    again.begin(fresh.config)
    assert (fresh.step, again.record.step) == (0, 0)
    assert again.record.remark.endswith("Its state is gone, so the run began anew.")


def test_a_shorter_run_has_a_folder_of_its_own(tmp_path: Path, trained: TinyRun) -> None:
    finished_run(tmp_path / "run", trained)
    assert opened(tmp_path, "run", steps=STEPS) == "run"
    assert opened(tmp_path, "run", steps=STEPS + 1) == "run"
    assert opened(tmp_path, "run", steps=STEPS - 1) == f"run-{STEPS - 1}"
    assert opened(tmp_path, "run", steps=STEPS - 1, start_over=True) == "run"


def test_start_over_forgets_all_but_the_files_owner(tmp_path: Path, trained: TinyRun) -> None:
    run = finished_run(tmp_path / "run", trained)
    run.add(Saved(step=1, path="x"))
    output = tmp_path / "lora.safetensors"
    output.write_bytes(b"lora")
    run.keep_output(output, output)
    with open_run(tmp_path, "run", steps=STEPS, start_over=True) as again:
        assert again.is_finished(STEPS), "nothing is lost before the new training begins"
        again.forget()
        assert {path.name for path in again.folder.iterdir()} == {"run.json"}
        assert again.record.status == "new"
        assert (again.record.step, again.record.started_at, again.record.config) == (0, 0.0, {})
        assert again.owns(output)
        assert free_output_path(again, output) == output
    assert output.read_bytes() == b"lora"


# --- the LoRA file


def test_a_free_name_is_taken_as_it_is(tmp_path: Path) -> None:
    wanted = tmp_path / "a.b" / "my.lora.safetensors"
    assert free_output_path(Run(tmp_path / "run"), wanted) == wanted


def test_a_name_that_is_taken_gets_the_next_number(tmp_path: Path) -> None:
    wanted = tmp_path / "lora.safetensors"
    for name in ("lora", "lora-2", "lora-3", "lora-5"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert free_output_path(Run(tmp_path), wanted).name == "lora-4.safetensors"


def test_a_run_writes_its_own_file_again(tmp_path: Path) -> None:
    run, file = Run(tmp_path), tmp_path / "lora.safetensors"
    file.write_bytes(b"first")
    assert not run.owns(file)
    run.keep_output(file, file)
    assert Run(tmp_path).owns(file)
    assert free_output_path(Run(tmp_path), file) == file


@pytest.mark.parametrize("changed", [b"other", b"longer than before"])
def test_a_file_that_somebody_changed_is_not_the_runs_any_more(
    tmp_path: Path, changed: bytes
) -> None:
    """Also one of the same length: its time tells."""
    run, file = Run(tmp_path), tmp_path / "lora.safetensors"
    file.write_bytes(b"first")
    run.keep_output(file, file)
    time.sleep(0.02)  # coarser than the clock of some file systems
    file.write_bytes(changed)
    assert not run.owns(file)
    assert free_output_path(run, file).name == "lora-2.safetensors"
    file.unlink()
    assert free_output_path(run, file) == file


def test_a_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    ours, theirs = Run(tmp_path / "ours"), Run(tmp_path / "theirs")
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"theirs")
    theirs.folder.mkdir()
    theirs.keep_output(file, file)
    assert not ours.owns(file)
