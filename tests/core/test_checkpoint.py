"""A run that was saved and loaded goes on bit for bit; a file that does not fit changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.events import Stepped
from lora_weave.lora_core.safetensors_file import read_tensors, serialize
from lora_weave.lora_core.training.checkpoint import load_state, save_state, saved_losses
from lora_weave.lora_core.training.loop import Training

from .tiny import (
    KINDS,
    TinyDenoiser,
    TinyRun,
    make_adapters,
    make_config,
    make_model,
    make_run,
    same_bits,
)

STEPS = 9


class Overflowing(TinyDenoiser):
    """Its scaled gradients overflow in float16 during the first steps."""

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        return super().predict(x_t, sigma, conditioning).half() + 20_000.0


def fresh(
    kind: str = "eps", denoiser: type[TinyDenoiser] = TinyDenoiser, **options: Any
) -> TinyRun:
    options = {"caption_dropout": 0.3, "accumulation_steps": 2, **options}
    return make_run(make_config(kind, steps=STEPS, options=options), kind, denoiser)


def run_until(run: TinyRun, step: int) -> TinyRun:
    """The run stopped when `step` steps are done; 1 can't be, its event comes after step 2."""
    events = run.events()
    while run.training.step < step:
        next(events)
    events.close()
    run.training.read()
    return run


def same_losses(found: list[float], expected: list[float]) -> bool:
    """Equal, a skipped step's NaN included."""
    return len(found) == len(expected) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True)
    )


def assert_same_run(found: TinyRun, expected: TinyRun) -> None:
    assert found.training.step == expected.training.step
    assert same_bits(found.parameters(), expected.parameters())
    assert same_bits(found.optimizer_state(), expected.optimizer_state())
    assert torch.equal(found.training.loss_scale.scale, expected.training.loss_scale.scale)
    assert torch.equal(
        found.training.loss_scale.good_steps, expected.training.loss_scale.good_steps
    )
    assert same_losses(found.training.losses, expected.training.losses)


# going on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 2, 5, STEPS])
def test_continued_equals_straight(kind: str, stop: int, tmp_path: Path) -> None:
    straight = fresh(kind)
    straight.finish()
    save_state(run_until(fresh(kind), stop).training, tmp_path / "state.safetensors")

    again = fresh(kind)
    with torch.no_grad():  # what it starts with must not matter
        for parameter in again.training.parameters:
            parameter.add_(1.0)
    load_state(again.training, tmp_path / "state.safetensors")
    assert again.training.step == stop and len(again.training.losses) == stop
    steps = again.finish()
    assert [event.step for event in steps] == list(range(stop + 1, STEPS + 1))
    assert_same_run(again, straight)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_every_adapter_type_continues(name: str, tmp_path: Path) -> None:
    def run() -> TinyRun:
        plain = fresh()
        adapters = make_adapters(plain.model, name)
        training = Training(plain.training.config, adapters, torch.device("cpu"))
        return dataclasses.replace(plain, training=training)

    straight = run()
    straight.finish()
    save_state(run_until(run(), 4).training, tmp_path / "s")
    again = run()
    load_state(again.training, tmp_path / "s")
    again.finish()
    assert_same_run(again, straight)


def test_interrupted_within_a_step_continues(tmp_path: Path) -> None:
    """At the second of two accumulated batches: the first one's gradients must not remain."""

    class Interrupted(TinyDenoiser):
        calls = 0

        def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
            self.calls += 1
            if self.calls == 2 * 4 + 2:
                raise KeyboardInterrupt
            return super().predict(x_t, sigma, conditioning)

    straight, stopped, again = fresh(), fresh(denoiser=Interrupted), fresh()
    straight.finish()
    with pytest.raises(KeyboardInterrupt):
        stopped.finish()
    save_state(stopped.training, tmp_path / "s")
    load_state(again.training, tmp_path / "s")
    assert again.training.step == 4
    again.finish()
    assert_same_run(again, straight)


@pytest.mark.parametrize("stop", [2, 7])
def test_loss_scale_and_skipped_steps_continue(stop: int, tmp_path: Path) -> None:
    options = {"precision": "fp16", "loss_weighting": "none"}
    straight = fresh(denoiser=Overflowing, **options)
    skipped = [event.skipped for event in straight.finish()]
    assert skipped[:stop].count(True) >= 2 and not skipped[-1]
    save_state(run_until(fresh(denoiser=Overflowing, **options), stop).training, tmp_path / "s")
    again = fresh(denoiser=Overflowing, **options)
    load_state(again.training, tmp_path / "s")
    again.finish()
    assert_same_run(again, straight)


def test_saving_on_the_way_changes_nothing_and_loses_no_event(tmp_path: Path) -> None:
    straight, saving = fresh(), fresh()
    expected = straight.finish()
    found = []
    for event in saving.events():
        found += [event] if isinstance(event, Stepped) else []
        if event.step % 2 == 0:
            save_state(saving.training, tmp_path / "s")
            assert len(saved_losses(tmp_path / "s")) == saving.training.step
    assert found == expected
    assert_same_run(saving, straight)


def test_same_state_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_state(run_until(fresh(), 3).training, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_losses(tmp_path: Path) -> None:
    run = run_until(fresh(), 3)
    save_state(run.training, tmp_path / "s")
    assert saved_losses(tmp_path / "s") == run.training.losses and len(run.training.losses) == 3


# files that do not fit


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["state"])
    change(tensors, header)
    path.write_bytes(serialize(tensors, {"state": json.dumps(header)}))


def assert_refused(run: TinyRun, path: Path, *words: str) -> None:
    before = run_until(fresh(), 2)  # where `run` is
    with pytest.raises(ValueError) as error:
        load_state(run.training, path)
    for word in (path.name, *words):
        assert word in str(error.value)
    assert_same_run(run, before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    save_state(run_until(fresh(), 3).training, path)
    return path


@pytest.fixture
def other() -> TinyRun:
    """A run under way, which a refused file must leave as it is."""
    return run_until(fresh(), 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"PK\x03\x04" + data,
        lambda data: data.replace(b'"format', b'"farmot'),
        lambda data: serialize({"losses": torch.zeros(3)}, {"state": "{no json"}),
        lambda data: serialize({"losses": torch.zeros(3)}, {"state": "[]"}),
        lambda data: serialize({"losses": torch.zeros(3)}),
    ],
    ids=["half", "a-byte-less", "empty", "zip", "key", "json", "list", "no-header"],
)
def test_damaged_files(damage: Callable[[bytes], bytes], saved: Path, other: TinyRun) -> None:
    saved.write_bytes(damage(saved.read_bytes()))
    assert_refused(other, saved)


@pytest.mark.parametrize(
    "name",
    [
        *("parameter.0", "parameter.9", "losses", "loss_scale.scale", "loss_scale.good_steps"),
        *("optimizer.3.exp_avg", "optimizer.9.exp_avg_sq", "optimizer.0.step"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "shape"])
def test_wrong_tensors(name: str, how: str, saved: Path, other: TinyRun) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        tensor = tensors.pop(name)
        if how == "shape":
            tensors[name] = torch.zeros(*tensor.shape, 2)

    rewritten(saved, change)
    assert_refused(other, saved, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.update(format=99),
        lambda tensors, header: header.update(layers=["elsewhere"]),
        lambda tensors, header: header.update(layers=header["layers"][::-1]),
        lambda tensors, header: header.update(step=2),
        lambda tensors, header: header.update(step="3"),
        lambda tensors, header: header.update(step=-1),
        lambda tensors, header: header.pop("step"),
        lambda tensors, header: header.pop("layers"),
        lambda tensors, header: header.pop("optimizer"),
        lambda tensors, header: tensors.update(stranger=torch.zeros(1)),
    ],
    ids="format layers order step text negative no-step no-layers no-optimizer more".split(),
)
def test_wrong_headers(change: Callable[..., Any], saved: Path, other: TinyRun) -> None:
    rewritten(saved, change)
    assert_refused(other, saved)


def test_state_of_another_rank_is_told_with_both_shapes(tmp_path: Path, other: TinyRun) -> None:
    adapters = make_adapters(make_model(), rank=2)
    training = Training(other.training.config, adapters, torch.device("cpu"))
    save_state(training, tmp_path / "rank2")
    assert_refused(other, tmp_path / "rank2", "(8, 4, 1, 1)", "(8, 2, 1, 1)")


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_state(fresh().training, tmp_path / "none")
