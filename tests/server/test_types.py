"""Every type of adapter is offered, trained, saved, loaded and sampled with, on the tiny SD1.5."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_weave.lora_core.adapters import ADAPTERS, type_of_tensors

from . import graphs
from .graphs import node, sampling
from .lab import metadata_of, tensors_of

DORA = ("lora", "loha", "lokr")
CASES = [*ADAPTERS, *(f"{name}+dora" for name in DORA), "lora+pissa", "lora+tucker"]
CASES += [f"{name}+norms" for name in ("full", "lora", "oft")]


def options_of(case: str) -> dict[str, Any]:
    option = case.partition("+")[2]
    known = {"dora": {"dora": True}, "tucker": {"tucker": True}}
    known |= {"pissa": {"initialisation": "pissa"}, "norms": {"norms": True}}
    return {"targets": "all linear + conv", **known.get(option, {})}


@pytest.fixture(scope="module")
def base_image(lab) -> np.ndarray:
    outcome = lab.succeed(graphs.checkpoint() | sampling("untouched", ["base", 0]))
    return lab.pixels(outcome, "untouched")


def test_every_type_is_offered(lab):
    train = lab.client.get("/object_info/LoRAWeaveTrain")["LoRAWeaveTrain"]
    kind, *facts = train["input"]["required"]["algorithm"]
    assert (kind if isinstance(kind, list) else facts[0]["options"]) == list(ADAPTERS)


@pytest.mark.parametrize("case", CASES)
def test_train_save_load_sample(lab, base_image, case):
    algorithm, name = case.partition("+")[0], f"type {case}"
    settings = {"algorithm": algorithm, "steps": 3, "learning_rate": 1e-2, "output_name": name}
    trained = graphs.training(options=options_of(case), **settings)
    first = lab.succeed(trained | sampling(f"{name} trained", ["train", 2]))
    file = lab.loras / f"{name}.safetensors"

    load = {"model": ["base", 0], "lora_name": file.name}
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    loading = graphs.checkpoint() | {"load": node("LoRAWeaveLoad", **load, **strengths)}
    loading |= {"save": node("LoRAWeaveSave", lora=["load", 2], **saving(f"{name} again"))}
    second = lab.succeed(loading | sampling(f"{name} loaded", ["load", 0]))

    from_training = lab.pixels(first, f"{name} trained")
    from_file = lab.pixels(second, f"{name} loaded")
    assert np.abs(from_file - from_training).max() <= 1
    assert np.abs(from_file - base_image).max() > 1
    saved = lab.loras / f"{name} again.safetensors"
    assert tensors_of(saved).keys() == tensors_of(file).keys()
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    norms: set[str] = set()
    for key, tensor in tensors_of(file).items():
        layer, _, ending = key.partition(".")
        if ending in ("w_norm", "b_norm"):
            assert tensor.any()
            norms.add(layer)
        else:
            layers.setdefault(layer, {})[ending] = tuple(tensor.shape)
    assert bool(norms) == case.endswith("+norms")
    assert any("diff_b" in shapes for shapes in layers.values()) == (algorithm == "full")
    assert {type_of_tensors(shapes).name for shapes in layers.values()} == {algorithm}
    module = metadata_of(file)["ss_network_module"]
    assert module == ("networks.lora" if algorithm == "lora" else "lycoris.kohya")
    if case == "lora+norms":  # norms have no rank that would make it differ between layers
        assert metadata_of(file)["ss_network_dim"] == "4"
        assert '"train_norm": "True"' in metadata_of(file)["ss_network_args"]


def test_the_host_loads_weights_norms_and_biases_as_they_were_trained(lab):
    settings = {"algorithm": "full", "steps": 3, "learning_rate": 1e-3, "output_name": "whole full"}
    trained = graphs.training(options=options_of("full+norms"), **settings)
    ours = lab.succeed(trained | sampling("by training", ["train", 2]))
    load = {"model": ["base", 0], "strength_model": 1.0, "lora_name": "whole full.safetensors"}
    graph = graphs.checkpoint() | {"load": node("LoraLoaderModelOnly", **load)}
    theirs = lab.succeed(graph | sampling("by the host", ["load", 0]))
    by_training, by_host = lab.pixels(ours, "by training"), lab.pixels(theirs, "by the host")
    assert np.abs(by_training - by_host).max() <= 1


def test_norms_and_biases_are_trained_further_and_resumed(lab, other_lab):
    """From a LoRA that has them; interrupted, the run ends as an uninterrupted one."""
    first = graphs.training(
        options=options_of("full+norms"), algorithm="full", steps=2, output_name="first full"
    )
    graph = first | {"more": {**first["train"], "inputs": dict(first["train"]["inputs"])}}
    del graph["options"]
    graph["options"] = node("LoRAWeaveTrainOptions", **{**graphs.OPTIONS, **options_of("+norms")})
    graph["more"]["inputs"] |= {
        **{"start_from": ["train", 0], "options": ["options", 0], "algorithm": "lora"},
        **{"steps": 6, "output_name": "further"},
    }
    assert lab.run(graph, interrupt_at=3).ended == "execution_interrupted"
    for each in (lab, other_lab):
        each.succeed(graph)
    found, straight = (tensors_of(each.loras / "further.safetensors") for each in (lab, other_lab))
    assert found.keys() == straight.keys()
    assert all(torch.equal(tensor, straight[name]) for name, tensor in found.items())
    before = tensors_of(lab.loras / "first full.safetensors")
    assert found.keys() == before.keys()
    assert {name.rpartition(".")[2] for name in found} == {"diff", "diff_b", "w_norm", "b_norm"}
    assert not any(torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_without_strict_what_fits_is_loaded_and_the_rest_told(lab):
    """A LoRA for SD1.5 with a tensor too many."""
    lab.succeed(graphs.training(steps=1, training_seed=77, output_name="whole"))
    tensors = tensors_of(lab.loras / "whole.safetensors")
    tensors["lora_unet_nowhere.lora_up.weight"] = torch.ones(3, 1)
    tensors["lora_unet_nowhere.lora_down.weight"] = torch.ones(1, 3)
    save_file(tensors, lab.loras / "odd.safetensors")
    load = {"model": ["base", 0], "lora_name": "odd.safetensors"}
    load |= {"strength_model": 1.0, "strength_clip": 1.0}
    graph = graphs.checkpoint() | {"load": node("LoRAWeaveLoad", **load, strict=True)}
    said = "1 layer is not in the model (SD1.5): lora_unet_nowhere"
    assert said in lab.fail(graph | sampling("odd", ["load", 0]))
    graph["load"]["inputs"]["strict"] = False
    outcome = lab.succeed(graph | sampling("odd", ["load", 0]))
    assert outcome.outputs["load"]["text"] == outcome.texts("load") == [said]


def saving(name: str) -> dict[str, Any]:
    return {
        "output_name": name,
        "format": "kohya",
        "dtype": "float32",
        "trigger_words": "",
        "comment": "",
    }
