"""LoRA Stack, its hooks and sweeps over `/prompt`, as programs drive them; and its routes."""

from __future__ import annotations

import json
import urllib.error

import numpy as np
import pytest

from . import graphs
from .graphs import node, sampling

NAMES = ("stacked one", "stacked two")
STACK = {"normalise": "off", "master": 1.0, "mode": "patch"}


@pytest.fixture(scope="module")
def files(lab) -> list[str]:
    """Two trained LoRAs; the second one's text encoder is trained, too."""
    for seed, name in enumerate(NAMES):
        settings = {"steps": 4, "learning_rate": 2e-2, "training_seed": seed, "output_name": name}
        options = {"targets": "all linear + conv", "text_encoder": seed == 1}
        lab.succeed(graphs.training(options=options, **settings))
    return [f"{name}.safetensors" for name in NAMES]


def stacking(rows: object, **inputs: object) -> graphs.Graph:
    linked = {"model": ["base", 0], "clip": ["base", 1]}
    given = {**STACK, **linked, "rows": rows, **inputs}
    return graphs.checkpoint() | {"stack": node("LoRAWeaveStack", **given)}


def image(lab, name: str, graph: graphs.Graph) -> np.ndarray:
    outcome = lab.succeed(graph | sampling(name, ["stack", 0], ["stack", 1]))
    return lab.pixels(outcome, name)


def rows_of(files: list[str]) -> list[dict[str, object]]:
    return [
        {"on": True, "name": files[0], "model": 0.8, "clip": 0.8},
        {"on": True, "name": files[1], "model": 0.5, "clip": 1.0},
    ]


def test_rows_as_string_and_as_object_give_the_same_model(lab, files):
    rows = {"v": 1, "rows": rows_of(files)}
    first = image(lab, "stack by string", stacking(json.dumps(rows)))
    assert np.array_equal(image(lab, "stack by object", stacking(rows)), first)
    wrapped = {"__value__": rows["rows"]}
    assert np.array_equal(image(lab, "stack wrapped", stacking(wrapped)), first)
    foreign = {
        "lora_1": {"on": True, "lora": files[0], "strength": 0.8, "strengthTwo": 0.8},
        "lora_2": {"on": True, "lora": files[1], "strength": 0.5, "strengthTwo": 1.0},
    }
    assert np.array_equal(image(lab, "stack of rgthree", stacking(foreign)), first)
    assert np.abs(image(lab, "stack of none", stacking("")) - first).max() > 1


def test_the_same_as_core_s_chain(lab, files):
    chain = graphs.checkpoint()
    source = "base"
    for number, row in enumerate(rows_of(files)):
        strengths = {"strength_model": row["model"], "strength_clip": row["clip"]}
        inputs = {"model": [source, 0], "clip": [source, 1], "lora_name": row["name"]}
        source = f"core {number}"
        chain[source] = node("LoraLoader", **inputs, **strengths)
    outcome = lab.succeed(chain | sampling("by core", [source, 0], [source, 1]))
    ours = image(lab, "by the stack", stacking({"rows": rows_of(files)}))
    assert np.abs(ours - lab.pixels(outcome, "by core")).max() <= 1
    live = image(lab, "by the live stack", stacking({"rows": rows_of(files)}, mode="live"))
    assert np.abs(ours - live).max() <= 1


def test_the_node_shows_shares(lab, files):
    graph = stacking({"rows": rows_of(files)}, normalise="sum to 1", master=2.0)
    outcome = lab.succeed(graph | sampling("shares", ["stack", 0], ["stack", 1]))
    (shown,) = outcome.outputs["stack"]["lora_weave_stack"]
    assert [row["row"] for row in shown["rows"]] == [0, 1]
    assert [row["share"] for row in shown["rows"]] == pytest.approx([8 / 13, 5 / 13])
    assert [row["model"] for row in shown["rows"]] == pytest.approx([16 / 13, 10 / 13])
    assert len(shown["rows"][0]["cosines"]) == 1


def test_a_missing_file_stops_the_prompt_before_it_runs(lab, files):
    graph = stacking({"rows": [{"name": "stacked on.safetensors"}]})
    text = lab.refuse(graph | sampling("never", ["stack", 0]))
    assert 'row 1 (stacked on.safetensors): the LoRA file "stacked on.safetensors"' in text
    assert f'Did you mean "{files[0]}"?' in text


def test_hooks(lab, files):
    """A stack without a model, as hooks for core's Set CLIP Hooks."""
    unlinked = {**STACK, "rows": {"rows": rows_of(files)[:1]}}
    graph = graphs.checkpoint() | {
        "stack": node("LoRAWeaveStack", **unlinked),
        "hooks": node("LoRAWeaveHooks", stack=["stack", 3], schedule="0:0, 0.3:1, 1:0.5"),
        "hooked": node(
            "SetClipHooks",
            clip=["base", 1],
            hooks=["hooks", 0],
            apply_to_conds=True,
            schedule_clip=False,
        ),
    }
    outcome = lab.succeed(graph | sampling("with hooks", ["base", 0], ["hooked", 0]))
    plain = lab.succeed(graphs.checkpoint() | sampling("without hooks", ["base", 0]))
    found, base = lab.pixels(outcome, "with hooks"), lab.pixels(plain, "without hooks")
    assert np.abs(found - base).max() > 1


def test_a_sweep_runs_once_for_each_value(lab, files):
    unlinked = {**STACK, "rows": {"rows": rows_of(files)[:1]}}
    sweep = {"stack": ["rows", 3], "row": 1, "values": "0..1 | 3", "part": "model and clip"}
    graph = stacking("", stack=["sweep", 0]) | {
        "rows": node("LoRAWeaveStack", **unlinked),
        "sweep": node("LoRAWeaveSweep", **sweep),
    }
    outcome = lab.succeed(graph | sampling("swept", ["stack", 0], ["stack", 1]))
    assert len(outcome.outputs["swept"]["images"]) == 3


def test_two_sweeps_make_every_pair(lab, files):
    """Each pair is the image of a stack with just these strengths, the second sweep's running."""
    unlinked = {**STACK, "rows": {"rows": rows_of(files)}}
    of_model = {"part": "model"}
    first = {"stack": ["rows", 3], "row": 1, "values": "0, 0.8", **of_model}
    second = {"stack": ["first", 0], "label": ["first", 1], "row": 2, "values": "0.5, 1"}
    graph = stacking("", stack=["second", 0]) | {
        "rows": node("LoRAWeaveStack", **unlinked),
        "first": node("LoRAWeaveSweep", **first),
        "second": node("LoRAWeaveSweep", **second, **of_model),
        "labels": node("PreviewAny", source=["second", 1]),
    }
    outcome = lab.succeed(graph | sampling("every pair", ["stack", 0], ["stack", 1]))
    names = [NAMES[0], NAMES[1]]
    wanted = [
        f"{names[0]} {one} {names[1]} {other}" for one in ("0", "0.8") for other in ("0.5", "1")
    ]
    assert outcome.outputs["labels"]["text"] == wanted
    for index, (one, other) in enumerate([(0, 0.5), (0, 1), (0.8, 0.5), (0.8, 1)]):
        rows = [{**row, "model": s} for row, s in zip(rows_of(files), (one, other), strict=True)]
        alone = image(lab, f"pair {index}", stacking({"rows": rows}))
        assert np.array_equal(lab.pixels(outcome, "every pair", index, of=4), alone)


# --- routes


def ask(lab, path: str, **query: str) -> tuple[int, dict]:
    try:
        return 200, lab.client.get(f"/lora_weave/{path}", **query)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_what_a_file_is(lab, files):
    status, found = ask(lab, "lora", name=files[1])
    assert status == 200
    assert (found["name"], found["type"], found["family"]) == (files[1], "lora", "SD1.5")
    assert found["ranks"] == [4] and found["trigger_words"] == "zxq"
    assert found["size_bytes"] == (lab.loras / files[1]).stat().st_size
    assert found["blocks"][0] == "BASE" and "IN01" in found["blocks"]
    assert len(found["family_blocks"]) == 28 and set(found["blocks"]) < set(found["family_blocks"])


def test_block_weights_by_name(lab, files):
    numbers = ",".join(["0.5"] * 17)
    assert ask(lab, "blocks", name=files[0], values=numbers)[1]["blocks"]["OUT11"] == 0.5
    status, found = ask(lab, "blocks", name=files[0], values="1,2,3")
    assert status == 422 and "3 block weights" in found["error"]


def test_files_that_are_not_there(lab, files):
    status, found = ask(lab, "lora", name="stacked onee.safetensors")
    assert status == 404 and found["nearest"] == files[0]
    assert ask(lab, "nearest", name="stacked onee")[1] == {"nearest": files[0]}
    for name in ("../../etc/passwd", "/etc/passwd", ""):
        status, found = ask(lab, "lora", name=name)
        assert status == 404 and "is not in any loras folder" in found["error"]
    (lab.loras / "stacked broken.safetensors").write_bytes(b"{")
    status, found = ask(lab, "lora", name="stacked broken.safetensors")
    assert status == 422 and "stacked broken.safetensors" in found["error"]
