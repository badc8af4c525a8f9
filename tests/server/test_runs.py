"""What becomes of a run: interrupted, killed, resumed, found again, continued, started over.

Wherever two ways lead to the same training, the tensors are compared bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from . import graphs
from .graphs import node, sampling
from .lab import Lab, Outcome, body_of, metadata_of, tensors_of, trained_steps

STEPS = 12
OPTIONS = {"save_state_every": 2, "accumulation_steps": 1, "caption_dropout": 0.3}
# A learning rate that does not depend on the number of steps, so that more of them are the same run
STEADY = {"schedule": "constant", "warmup": 0.0}


def graph_of(output: str, *, steps: int = STEPS, family: str = "SD1.5", **settings: Any):
    """A training that writes `output`; each test has names and seeds of its own."""
    options = OPTIONS | settings.pop("options", {})
    inputs = {"steps": steps, "output_name": output, "batch_size": 2, **settings}
    return graphs.training(family, options=options, **inputs)


def encoded(outcome: Outcome) -> list[str]:
    return [text for text in outcome.texts("train") if text.startswith("encoding ")]


def file_of(lab: Lab, name: str) -> Path:
    return lab.loras / f"{name}.safetensors"


# --- interrupted


@pytest.fixture(scope="module")
def interrupted(lab: Lab) -> dict[str, Any]:
    """A run that was interrupted in its middle, what it left, and how it went on."""
    options = {"save_state_every": 100}  # only the interrupt saves
    graph = graph_of("interrupted", training_seed=100, options=options)
    graph |= sampling("downstream", ["train", 2])
    graph["path"] = node("PreviewAny", source=["train", 4])
    file = file_of(lab, "interrupted")
    first = lab.run(graph, interrupt_at=3)
    folder, record = lab.run_of(file)
    left = {"tensors": tensors_of(file), "metadata": metadata_of(file), "record": record}
    left["files"] = {path.name for path in folder.iterdir()}
    load = node("LoRAWeaveLoad", model=["base", 0], lora_name=file.name, strength_model=1.0)
    load["inputs"]["strength_clip"] = 1.0
    loaded = lab.run(graphs.checkpoint() | {"load": load} | sampling("so far", ["load", 0]))
    second = lab.run(graph)
    return {"first": first, "left": left, "loaded": loaded, "second": second, "file": file}


def test_interrupt_ends_the_prompt_as_interrupted(interrupted):
    outcome = interrupted["first"]
    assert outcome.ended == "execution_interrupted"
    assert outcome.history["status"]["completed"] is False
    assert outcome.messages[-1][1]["node_id"] == "train"


def test_nothing_downstream_runs_after_an_interrupt(interrupted):
    outcome = interrupted["first"]
    downstream = {"downstream sampler", "downstream decoded", "downstream", "path"}
    assert not outcome.ran() & downstream
    assert not {data["node"] for data in outcome.of("executed")} & {*downstream, "train"}
    assert not set(outcome.outputs) & {*downstream, "train"}
    assert downstream <= interrupted["second"].ran()


def test_interrupt_writes_the_run_and_its_state(interrupted):
    record = interrupted["left"]["record"]
    assert record["status"] == "stopped"
    assert 3 <= record["step"] < STEPS
    assert interrupted["left"]["files"] == {
        *("run.json", "events.jsonl", "state.safetensors", "result.safetensors")
    }


def test_interrupt_writes_the_lora_so_far(interrupted):
    left = interrupted["left"]
    assert left["metadata"]["ss_steps"] == str(left["record"]["step"])
    assert left["metadata"]["ss_max_train_steps"] == str(STEPS)
    assert any(tensor.any() for key, tensor in left["tensors"].items() if "lora_up" in key)
    assert interrupted["loaded"].ended == "execution_success"


def test_the_same_graph_goes_on_where_it_was(interrupted):
    outcome, step = interrupted["second"], interrupted["left"]["record"]["step"]
    assert outcome.ended == "execution_success"
    assert trained_steps(outcome, STEPS) == (step, STEPS)
    assert f"The run went on from step {step}." in outcome.texts("train")
    assert f"The run went on from step {step}." in outcome.outputs["train"]["text"][0]
    assert outcome.outputs["path"]["text"] == [str(interrupted["file"])]


def test_a_resumed_run_ends_as_an_uninterrupted_one(interrupted, other_lab):
    other_lab.succeed(graph_of("straight", training_seed=100))
    assert body_of(interrupted["file"]) == body_of(file_of(other_lab, "straight"))


def test_losses_of_an_interrupted_run_are_all_there(interrupted, lab):
    folder, _ = lab.run_of(interrupted["file"])
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = {event["step"] for event in events if event["event"] == "stepped"}
    assert steps == set(range(1, STEPS + 1))


def test_resumes_after_a_restart_and_after_a_crash(make_lab, lab):
    """Interrupted, server restarted, server killed without warning, started again."""
    own = make_lab("crash").start()
    graph = graph_of("crash", family="SD3", steps=60, training_seed=101)
    assert own.run(graph, interrupt_at=5).ended == "execution_interrupted"
    _, record = own.run_of(file_of(own, "crash"))
    assert 5 <= record["step"] < 40

    own.restart()
    prompt_id = own.client.queue(graph)
    for kind, data in own.client.follow(prompt_id):
        if kind == "progress" and data["max"] == 60 and data["value"] >= record["step"] + 10:
            os.kill(own.server.process.pid, signal.SIGKILL)
            break
    own.server.process.wait(60)
    _, killed = own.run_of(file_of(own, "crash"))
    assert killed["status"] == "training"
    assert record["step"] + 8 <= killed["step"] < 60

    own.restart()
    outcome = own.succeed(graph)
    assert trained_steps(outcome, 60) == (killed["step"], 60)
    own.stop()
    lab.succeed(graph)
    assert body_of(file_of(own, "crash")) == body_of(file_of(lab, "crash"))


# --- found again


def test_a_finished_run_gives_its_result_at_once(lab):
    graph = graph_of("finished", family="SD3", training_seed=102)
    lab.succeed(graph)
    file = file_of(lab, "finished")
    folder, record = lab.run_of(file)
    before = {path: path.read_bytes() for path in [file, *folder.iterdir()]}
    lab.forget()
    graph["steps"] = node("PreviewAny", source=["train", 5])
    outcome = lab.succeed(graph | sampling("finished image", ["train", 2], family="SD3"))
    assert "train" in outcome.ran()
    assert trained_steps(outcome, STEPS) == ()
    assert encoded(outcome) == []
    assert outcome.outputs["train"]["text"][0].startswith(f"finished.safetensors: {STEPS} steps.")
    assert outcome.outputs["steps"]["text"] == [str(STEPS)]
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_without_its_state_gives_its_result(lab):
    graph = graph_of("stateless", family="SD3", training_seed=116)
    graph["losses"] = node("PreviewAny", source=["train", 1])
    expected = lab.succeed(graph).outputs["losses"]
    folder, _ = lab.run_of(file_of(lab, "stateless"))
    for damage in (lambda state: state.write_bytes(b"damaged"), Path.unlink):
        damage(folder / "state.safetensors")
        lab.forget()
        outcome = lab.succeed(graph)
        assert trained_steps(outcome) == ()
        assert outcome.outputs["losses"] == expected


def test_a_deleted_output_is_written_again(lab):
    graph = graph_of("deleted", family="SD3", training_seed=103)
    lab.succeed(graph)
    file = file_of(lab, "deleted")
    before = body_of(file)
    file.unlink()
    lab.forget()
    graph["path"] = node("PreviewAny", source=["train", 4])
    outcome = lab.succeed(graph)
    assert trained_steps(outcome, STEPS) == ()
    assert outcome.outputs["path"]["text"] == [str(file)]
    assert body_of(file) == before
    assert metadata_of(file)["ss_steps"] == str(STEPS)


def test_a_new_name_for_a_finished_run_is_a_copy(lab):
    """The same training under another name: written at once, and the first file stays."""
    settings = {"family": "SD3", "steps": 3, "training_seed": 114}
    lab.succeed(graph_of("named", **settings))
    before = file_of(lab, "named").read_bytes()
    outcome = lab.succeed(graph_of("renamed", **settings))
    assert trained_steps(outcome, 3) == ()
    assert outcome.outputs["train"]["text"][0].startswith("renamed.safetensors: 3 steps.")
    assert body_of(file_of(lab, "renamed")) == body_of(file_of(lab, "named"))
    assert metadata_of(file_of(lab, "renamed"))["ss_output_name"] == "renamed"
    assert file_of(lab, "named").read_bytes() == before


def test_a_name_that_looks_like_a_numbered_one_is_a_name(lab):
    lab.succeed(graph_of("named-2", family="SD3", training_seed=108))
    lab.succeed(graph_of("named", family="SD3", training_seed=108))
    assert file_of(lab, "named").read_bytes() and file_of(lab, "named-2").exists()


def test_more_steps_continue_a_finished_run(lab, other_lab):
    def graph(steps: int, name: str = "more"):
        options = {**STEADY, "accumulation_steps": 2}
        return graph_of(name, steps=steps, family="SD3", training_seed=104, options=options)

    lab.succeed(graph(STEPS))
    outcome = lab.succeed(graph(STEPS + 8))
    assert trained_steps(outcome, STEPS + 8) == (STEPS, STEPS + 8)
    assert outcome.texts("train")[0] == f"The run went on from step {STEPS}."
    file = file_of(lab, "more")
    assert metadata_of(file)["ss_steps"] == str(STEPS + 8)
    other_lab.succeed(graph(STEPS + 8, "straight more"))
    assert body_of(file) == body_of(file_of(other_lab, "straight more"))


def test_a_falling_schedule_is_computed_anew_and_that_is_said(lab):
    lab.succeed(graph_of("anew", steps=3, training_seed=105))
    outcome = lab.succeed(graph_of("anew", steps=6, training_seed=105))
    said = (
        "The run went on from step 3. It was planned for 3 steps: "
        "its cosine learning rate was computed anew for 6, warm-up included."
    )
    assert said in outcome.texts("train")
    assert outcome.outputs["train"]["text"] == [f"anew.safetensors: 6 steps. {said}"]


def test_fewer_steps_are_a_run_of_their_own(lab):
    """A run can't go back; the longer one and its file stay as they are."""
    graph = graph_of("fewer", family="SD3", training_seed=106)
    lab.succeed(graph)
    file = file_of(lab, "fewer")
    before = file.read_bytes()
    outcome = lab.succeed(graph_of("fewer", steps=7, family="SD3", training_seed=106))
    assert trained_steps(outcome, 7) == (0, 7)
    assert file.read_bytes() == before
    assert metadata_of(file_of(lab, "fewer-2"))["ss_steps"] == "7"


def test_start_over_trains_anew_into_the_same_file(lab):
    settings = {"family": "SD3", "training_seed": 107}
    lab.succeed(graph_of("over", steps=5 * 2, **settings))
    file = file_of(lab, "over")
    before = body_of(file)
    outcome = lab.succeed(graph_of("over", steps=5 * 2, resume="start over", **settings))
    assert trained_steps(outcome, 10) == (0, 10)
    assert body_of(file) == before
    assert not file_of(lab, "over-2").exists()
    folder, _ = lab.run_of(file)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("started") == 1


# --- names


def test_a_name_of_another_run_gets_the_next_number(lab):
    lab.succeed(graph_of("shared", family="SD3", steps=3, training_seed=108))
    before = file_of(lab, "shared").read_bytes()
    graph = graph_of("shared", family="SD3", steps=3, training_seed=109)
    graph["path"] = node("PreviewAny", source=["train", 4])
    outcome = lab.succeed(graph)
    assert outcome.outputs["path"]["text"] == [str(file_of(lab, "shared-2"))]
    assert outcome.outputs["train"]["text"][0].startswith("shared-2.safetensors: 3 steps.")
    assert metadata_of(file_of(lab, "shared-2"))["ss_output_name"] == "shared-2"
    assert file_of(lab, "shared").read_bytes() == before


def test_a_file_of_the_users_own_is_never_overwritten(lab):
    """One that was there before, and one put in the place of the run's own."""
    file, second = file_of(lab, "theirs"), file_of(lab, "theirs-2")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"not ours")
    settings = {"family": "SD3", "training_seed": 110}
    lab.succeed(graph_of("theirs", steps=3, **settings))
    assert metadata_of(second)["ss_steps"] == "3"
    second.write_bytes(b"not ours either")
    lab.succeed(graph_of("theirs", steps=6, **settings))
    assert file.read_bytes() == b"not ours"
    assert second.read_bytes() == b"not ours either"
    assert metadata_of(file_of(lab, "theirs-3"))["ss_steps"] == "6"


# --- caches


def turned(lab: Lab, name: str, how: Image.Transpose) -> None:
    """A folder of pictures that no cache has yet."""
    for path in lab.folder(name, lab.photos).glob("*.png"):
        with Image.open(path) as image:
            turned = image.transpose(how)
        turned.save(path)


def test_a_second_run_starts_from_the_cache(lab):
    turned(lab, "cached", Image.Transpose.FLIP_TOP_BOTTOM)
    for path in (lab.input / "cached").glob("*.txt"):
        path.write_text(f"{path.read_text()} on a shelf", encoding="utf-8")
    folder = {"folder": "cached"}

    def graph(seed: int):
        return graph_of("cached", family="SD3", steps=3, training_seed=seed, folder=folder)

    first, second = lab.succeed(graph(111)), lab.succeed(graph(112))
    assert "encoding images: 4 of 4" in encoded(first)
    assert [text for text in encoded(first) if "captions" in text]
    assert encoded(second) == []
    assert trained_steps(second, 3) == (0, 3)


def test_a_damaged_cache_entry_is_made_again(lab):
    """One cut off, one with a flipped byte in its header, one of zeros: as crashes leave them."""
    turned(lab, "damaged", Image.Transpose.FLIP_LEFT_RIGHT)
    folder = {"folder": "damaged"}

    def graph(seed: int):
        return graph_of("damaged", family="SD3", steps=3, training_seed=seed, folder=folder)

    cache = lab.weave / "cache"
    known = set(cache.glob("*/*.safetensors"))
    lab.succeed(graph(113))
    made = sorted(set(cache.glob("*/*.safetensors")) - known, key=lambda path: path.stat().st_size)
    assert len(made) >= 4
    whole = {path: path.read_bytes() for path in made}
    latents = [path for path in made if b'"latent"' in whole[path][:200]]
    cut, flipped, zeros, _ = latents
    cut.write_bytes(whole[cut][:-9])
    flipped.write_bytes(whole[flipped][:10] + b"\xff" + whole[flipped][11:])
    zeros.write_bytes(bytes(len(whole[zeros])))
    again = graph(113)
    again["train"]["inputs"]["resume"] = "start over"
    file = file_of(lab, "damaged")
    before = body_of(file)
    outcome = lab.succeed(again)
    assert encoded(outcome)[-1] == "encoding images: 3 of 3"
    assert {path: path.read_bytes() for path in made} == whole
    assert body_of(file) == before
    assert lab.server.log_text().count("is damaged and will be made again") >= 3
