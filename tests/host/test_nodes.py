"""What workflows store of our nodes never changes, and what the host asks nodes is answered."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from PIL import Image

from lora_weave.lora_core.settings import setting
from lora_weave.lora_core.training.config import TrainConfig, TrainOptions
from lora_weave.nodes import NODES, comfy_entrypoint, schema
from lora_weave.nodes.dataset import ImageFolder
from lora_weave.nodes.load import Load
from lora_weave.nodes.schema import check_choice, config_input
from lora_weave.nodes.train_options import Options

# Workflows store node ids, values by the order of the inputs, and links by the order of the
# outputs: nothing here is ever renamed, moved or taken out. New inputs are appended.
FROZEN: dict[str, tuple[str, str]] = {
    "LoRAWeaveImageFolder": (
        "folder trigger_word repeats missing_caption resolution buckets bucket_step",
        "dataset",
    ),
    "LoRAWeaveImages": (
        "images captions trigger_word repeats resolution buckets bucket_step",
        "dataset",
    ),
    "LoRAWeaveTrain": (
        "model clip vae dataset algorithm rank alpha steps learning_rate batch_size training_seed "
        "output_name resume start_from options",
        "lora loss_map trained_model trained_clip path trained_steps",
    ),
    "LoRAWeaveTrainOptions": (
        "optimizer weight_decay schedule warmup final_learning_rate accumulation_steps "
        "max_grad_norm loss_weighting min_snr_gamma timestep_sampling timestep_shift "
        "caption_dropout guidance targets include exclude text_encoder text_encoder_learning_rate "
        "precision gradient_checkpointing save_state_every dora rslora initialisation tucker "
        "lokr_factor decompose_both lora_plus_ratio rank_dropout module_dropout max_norm norms",
        "options",
    ),
    "LoRAWeaveLoad": (
        "model clip lora_name strength_model strength_clip strict",
        "loaded_model loaded_clip lora trigger_words",
    ),
    "LoRAWeaveStack": (
        "model clip lora_stack stack lora_1 lora_2 lora_3 lora_4 normalise master mode rows",
        "stacked_model stacked_clip stacked_loras stacked trigger_words report",
    ),
    "LoRAWeaveHooks": ("stack schedule prev_hooks", "hooks"),
    "LoRAWeaveSweep": ("stack row values part label", "stacks labels"),
    "LoRAWeaveSave": ("lora output_name format dtype trigger_words comment", "path"),
}
TYPES = {
    "LoRAWeaveImageFolder": ["LORA_WEAVE_DATASET"],
    "LoRAWeaveImages": ["LORA_WEAVE_DATASET"],
    "LoRAWeaveTrain": ["LORA_MODEL", "LOSS_MAP", "MODEL", "CLIP", "STRING", "INT"],
    "LoRAWeaveTrainOptions": ["LORA_WEAVE_OPTIONS"],
    "LoRAWeaveLoad": ["MODEL", "CLIP", "LORA_MODEL", "STRING"],
    "LoRAWeaveStack": [
        *("MODEL", "CLIP", "LORA_STACK", "LORA_WEAVE_STACK", "STRING", "STRING"),
    ],
    "LoRAWeaveHooks": ["HOOKS"],
    "LoRAWeaveSweep": ["LORA_WEAVE_STACK", "STRING"],
    "LoRAWeaveSave": ["STRING"],
}
BY_ID = {node.GET_SCHEMA().node_id: node for node in NODES}
every_node = pytest.mark.parametrize("name", FROZEN)


def values(input_: io.Input) -> dict[str, Any]:
    return input_.as_dict()


# --- schemas


def test_the_nodes_are_those():
    assert list(BY_ID) == list(FROZEN)


def test_the_host_gets_the_nodes():
    async def nodes() -> list[type]:
        return await (await comfy_entrypoint()).get_node_list()

    assert asyncio.run(nodes()) == NODES


@every_node
def test_inputs_and_outputs_are_frozen(name):
    found = BY_ID[name].GET_SCHEMA()
    inputs, outputs = FROZEN[name]
    assert [input_.id for input_ in found.inputs] == inputs.split()
    assert [output.id for output in found.outputs] == outputs.split()
    assert [output.io_type for output in found.outputs] == TYPES[name]


@every_node
def test_input_and_output_ids_differ(name):
    """0.3.75 mixes them up."""
    inputs, outputs = FROZEN[name]
    assert not set(inputs.split()) & set(outputs.split())


@every_node
def test_no_seed_that_pages_randomise(name):
    """They do so after every queueing for inputs of these names, and each would be a new run."""
    for input_ in BY_ID[name].GET_SCHEMA().inputs:
        assert input_.id not in ("seed", "noise_seed")
        assert not values(input_).get("control_after_generate")


@every_node
def test_the_page_gets_a_description(name):
    """As `/object_info` asks for it; with everything that the older form of nodes has."""
    info = BY_ID[name].GET_NODE_INFO_V1()
    assert info["category"].startswith("LoRA Weave/")
    assert info["display_name"] and info["description"]
    inputs = [*info["input"]["required"], *info["input"].get("optional", {})]
    assert sorted(inputs) == sorted(FROZEN[name][0].split())
    assert info["output_node"] == (name in ("LoRAWeaveTrain", "LoRAWeaveSave"))


@every_node
def test_defaults_are_offered(name):
    for input_ in BY_ID[name].GET_SCHEMA().inputs:
        facts = values(input_)
        default = facts.get("default")
        if default is None:
            continue
        if "options" in facts:
            assert default in facts["options"], input_.id
        if "min" in facts:
            assert facts["min"] <= default <= facts["max"], input_.id


def test_settings_reach_the_nodes():
    """Every field of the two config classes is an input, with its default, limits and help."""
    for name, config in (("LoRAWeaveTrain", TrainConfig), ("LoRAWeaveTrainOptions", TrainOptions)):
        inputs = {input_.id: values(input_) for input_ in BY_ID[name].GET_SCHEMA().inputs}
        for field in dataclasses.fields(config):
            found, facts = inputs[field.name], field.metadata
            assert found["default"] == field.default
            assert found["tooltip"] == facts["help"]
            assert found.get("options", []) == list(facts["choices"])
            assert (found.get("min"), found.get("max")) == (facts["minimum"], facts["maximum"])


@pytest.mark.parametrize(
    ("default", "facts", "kind", "expected"),
    [
        (2, {"minimum": 1, "maximum": 9}, "INT", {"min": 1, "max": 9, "step": 1}),
        (0.5, {"minimum": 0.0, "step": 0.05}, "FLOAT", {"min": 0.0, "step": 0.05}),
        (True, {}, "BOOLEAN", {}),
        ("text", {}, "STRING", {}),
        ("b", {"choices": ("a", "b")}, "COMBO", {"options": ["a", "b"]}),
    ],
)
def test_a_setting_becomes_the_hosts_input(default, facts, kind, expected):
    config = dataclasses.make_dataclass("C", [("x", type(default), setting(default, "H", **facts))])
    made = config_input(dataclasses.fields(config)[0])
    assert (made.id, made.io_type) == ("x", kind)
    found = values(made)
    assert found["default"] == default and found["tooltip"] == "H"
    assert {name: found[name] for name in expected} == expected


def test_fields_that_a_host_does_not_know_are_left_out():
    made = schema.schema(node_id="X", display_name="X", invented_later=1)
    assert made.node_id == "X"
    assert not hasattr(made, "invented_later")


def test_check_choice():
    check_choice("dtype", "a", ["a", "b"])
    with pytest.raises(ValueError, match="dtype is 'c', known are a, b"):
        check_choice("dtype", "c", ["a", "b"])


# --- options


def test_options_are_what_was_set():
    settings = dataclasses.asdict(TrainOptions()) | {"warmup": 0.25, "targets": "attention"}
    (options,) = Options.execute(**settings).args
    assert options == TrainOptions(warmup=0.25, targets="attention")


def test_options_out_of_range_are_all_told():
    settings = dataclasses.asdict(TrainOptions()) | {"warmup": 2.0, "targets": "x"}
    with pytest.raises(ValueError) as caught:
        Options.execute(**settings)
    assert "warmup is 2.0, expected 0.0 to 1.0" in str(caught.value)
    assert "targets is 'x', known are attention, " in str(caught.value)


# --- the dataset folder, as the host asks before it runs


@pytest.fixture
def folder() -> Path:
    """`cats` under the input folder: two images, one caption."""
    path = Path(folder_paths.get_input_directory()) / "cats"
    path.mkdir(parents=True, exist_ok=True)
    for old in path.rglob("*"):
        if old.is_file():
            old.unlink()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(path / f"{name}.png")
    (path / "a.txt").write_text("a cat", encoding="utf-8")
    return path


def test_folders_are_offered(folder):
    (offered,) = (i for i in ImageFolder.define_schema().inputs if i.id == "folder")
    assert "cats" in values(offered)["options"]


def test_a_folder_is_validated(folder, tmp_path):
    assert ImageFolder.validate_inputs(folder="cats") is True
    assert ImageFolder.validate_inputs(folder="not there yet") is True  # execute says it
    assert ImageFolder.validate_inputs(folder=None) is True  # a link: the name is not known yet
    for name in (str(tmp_path), "../..", ""):
        assert isinstance(ImageFolder.validate_inputs(folder=name), str)


def changes(folder: Path) -> dict[str, Any]:
    later = folder.stat().st_mtime + 10
    return {
        "a caption is written": lambda: (folder / "b.txt").write_text("b", encoding="utf-8"),
        "a caption is changed": lambda: (folder / "a.txt").write_text("longer", encoding="utf-8"),
        "a caption of equal length": lambda: (
            (folder / "a.txt").write_text("a dog", encoding="utf-8"),
            os.utime(folder / "a.txt", (later, later)),
        ),
        "an image is added": lambda: Image.new("RGB", (9, 9)).save(folder / "c.png"),
        "an image is deleted": lambda: (folder / "b.png").unlink(),
        "an image is renamed": lambda: (folder / "b.png").rename(folder / "d.png"),
    }


@pytest.mark.parametrize("change", changes(Path(__file__).parent))
def test_a_changed_folder_is_read_again(folder, change):
    """With all inputs, as the host calls it."""
    inputs = {"trigger_word": "x", "repeats": 1}
    before = ImageFolder.fingerprint_inputs(folder="cats", **inputs)
    assert ImageFolder.fingerprint_inputs(folder="cats", **inputs) == before
    changes(folder)[change]()
    assert ImageFolder.fingerprint_inputs(folder="cats", **inputs) != before


def test_fingerprints_that_can_not_be_taken():
    """The host asks while it plans; an exception there would be told in no useful place."""
    assert ImageFolder.fingerprint_inputs(folder=None) == ""
    assert ImageFolder.fingerprint_inputs(folder="gone") == (
        ImageFolder.fingerprint_inputs(folder="gone")
    )
    assert Load.fingerprint_inputs(lora_name=None) == ""


# --- the LoRA file, likewise


@pytest.fixture
def lora() -> Path:
    root = Path(folder_paths.get_folder_paths("loras")[0])
    path = root / "people" / "anna.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(10))
    return path


def test_a_lora_is_validated(lora):
    assert Load.validate_inputs(lora_name=os.path.join("people", "anna.safetensors")) is True
    assert Load.validate_inputs(lora_name=None) is True
    message = Load.validate_inputs(lora_name="people/ana.safetensors")
    assert "is not in any loras folder" in message
    assert "anna.safetensors" in message
    assert isinstance(Load.validate_inputs(lora_name="../anna.safetensors"), str)


def test_a_rewritten_lora_is_read_again(lora):
    name, inputs = os.path.join("people", "anna.safetensors"), {"strength_model": 1.0}
    before = Load.fingerprint_inputs(lora_name=name, **inputs)
    assert Load.fingerprint_inputs(lora_name=name, **inputs) == before
    lora.write_bytes(bytes(11))
    longer = Load.fingerprint_inputs(lora_name=name, **inputs)
    assert longer != before
    later = lora.stat().st_mtime + 10
    os.utime(lora, (later, later))
    assert Load.fingerprint_inputs(lora_name=name, **inputs) != longer


def test_load_without_anything_to_load_onto(lora):
    with torch.inference_mode(), pytest.raises(ValueError):
        Load.execute(
            lora_name=os.path.join("people", "anna.safetensors"),
            strength_model=1.0,
            strength_clip=1.0,
        )
