"""Every workflow in example_workflows/ fits the nodes, and runs."""

import json

import pytest

from lora_weave.demo import workflow
from lora_weave.devtools.paths import ROOT

from . import graphs

FILES = sorted((ROOT / "example_workflows").glob("*.json"))


def graph_of(path, client):
    return workflow.to_api(json.loads(path.read_text("utf-8")), client.get("/object_info"))


def set_inputs(graph, class_type, **inputs):
    for node in graph.values():
        if node["class_type"] == class_type:
            node["inputs"].update(inputs)


def test_there_are_workflows():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_input_has_a_value_of_its_kind(path, client):
    """A widget that is added in the middle would shift all values after it."""
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    saved = json.loads(path.read_text("utf-8"))
    object_info = client.get("/object_info")
    for node_id, node in workflow.to_api(saved, object_info).items():
        for name, kind, options in workflow.declared_inputs(object_info[node["class_type"]]):
            value = node["inputs"].get(name)
            where = f"{node['class_type']} ({node_id}).{name}: {value!r}"
            linked = isinstance(value, list)
            if linked or not workflow.is_widget(kind, options):
                continue
            choices = kind if isinstance(kind, list) else options.get("options", [])
            if choices and name not in ("folder", "lora_name"):  # those depend on the server
                assert value in choices, where
            elif not isinstance(kind, list) and kind in kinds:
                assert isinstance(value, kinds[kind]), where
                assert kind == "BOOLEAN" or not isinstance(value, bool), where


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_links_are_told_by_both_ends(path):
    """The page drops a link that its two nodes do not list alike."""
    saved = json.loads(path.read_text("utf-8"))
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert saved["last_node_id"] == max(nodes)
    assert saved["last_link_id"] == max(link[0] for link in saved["links"])
    for link, source, output, target, slot, kind in saved["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert kind == nodes[source]["outputs"][output]["type"]


def test_train_and_compare_runs(lab):
    graph = graph_of(ROOT / "example_workflows" / "train_and_compare.json", lab.client)
    set_inputs(graph, "LoRAWeaveImageFolder", folder="photos", resolution=64)
    set_inputs(graph, "LoRAWeaveTrain", steps=4, output_name="example")
    set_inputs(graph, "KSampler", steps=2)
    set_inputs(graph, "EmptyLatentImage", width=64, height=64, batch_size=1)
    outcome = lab.succeed(graph)
    before, after = (
        lab.pixels(outcome, workflow.find(graph, "SaveImage", title))
        for title in ("Before", "After")
    )
    assert before.shape == (64, 64, 3)
    assert (before != after).any()
    (path,) = outcome.outputs[workflow.find(graph, "PreviewAny")]["text"]
    assert path == str(lab.output / "loras" / "example.safetensors")
    assert outcome.outputs[workflow.find(graph, "LossGraphNode")]["images"]


def test_stack_and_sweep_runs(lab):
    lab.succeed(graphs.training(steps=4, learning_rate=2e-2, output_name="lora_weave_demo"))
    graph = graph_of(ROOT / "example_workflows" / "stack_and_sweep.json", lab.client)
    set_inputs(graph, "LoRAWeaveSweep", values="0..1 | 3")
    set_inputs(graph, "KSampler", steps=2)
    set_inputs(graph, "EmptyLatentImage", width=64, height=64)
    set_inputs(graph, "ImageGrid", columns=3, cell_width=64, cell_height=64, padding=0)
    outcome = lab.succeed(graph)
    grid = lab.pixels(outcome, workflow.find(graph, "SaveImage"))
    assert grid.shape == (64, 192, 3)
    assert (grid[:, :64] != grid[:, 64:128]).any() and (grid[:, 64:128] != grid[:, 128:]).any()
    labels = outcome.outputs[workflow.find(graph, "PreviewAny")]["text"]
    assert labels == [f"lora_weave_demo {number}" for number in ("0", "0.5", "1")]
