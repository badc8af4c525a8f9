"""The main job, over HTTP and websocket: a folder becomes a LoRA, and the LoRA loads and samples.

All tests look at one session of prompts a model family, an eps model (SD1.5) and a flow model
(SD3): sample, train, sample again, load and sample.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from . import graphs
from .graphs import node, sampling
from .lab import Lab, Outcome, body_of, metadata_of, tensors_of

STEPS = 6  # not the number of images or captions, whose progress is shown too
RANK, ALPHA = 4, 2.0
TARGETS = "all linear + conv"
SETTINGS = {"steps": STEPS, "rank": RANK, "alpha": ALPHA, "learning_rate": 5e-3, "batch_size": 2}
OPTIONS = {"targets": TARGETS, "min_snr_gamma": 4.0}
NAMES = {"SD1.5": "eps", "SD3": "styles/flow"}  # with a sub-folder, as users sort theirs


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came out of one family's session."""

    family: str
    lab: Lab
    before: np.ndarray
    after: np.ndarray
    training: Outcome
    loading: Outcome
    loading_log: str
    file: Path

    @property
    def lora_name(self) -> str:
        return f"{NAMES[self.family]}.safetensors"

    def image(self, name: str) -> np.ndarray:
        """A picture of the loading session, or of the training session."""
        outcome = self.loading if name in self.loading.outputs else self.training
        return self.lab.pixels(outcome, name)

    def metadata(self) -> dict[str, str]:
        return metadata_of(self.file)

    def tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.file)


@pytest.fixture(scope="module", params=["SD1.5", "SD3"])
def trained(request: pytest.FixtureRequest, lab: Lab) -> Trained:
    family: str = request.param
    base: list[Any] = ["base", 0]

    def sample_base(name: str) -> np.ndarray:
        graph = graphs.checkpoint(family) | sampling(name, base, family=family)
        outcome = lab.succeed(graph)
        assert f"{name} sampler" in outcome.ran()
        return lab.pixels(outcome, name)

    before = sample_base("before")
    training = lab.succeed(training_graph(lab, family))
    after = sample_base("after")
    already = len(lab.server.log_text())
    loading = lab.succeed(loading_graph(family))
    file = Path(training.outputs["path"]["text"][0])
    return Trained(
        family=family,
        lab=lab,
        before=before,
        after=after,
        training=training,
        loading=loading,
        loading_log=lab.server.log_text()[already:],
        file=file,
    )


def train_only(family: str, **settings: Any) -> graphs.Graph:
    inputs = {**SETTINGS, "output_name": NAMES[family], **settings}
    return graphs.training(family, options=OPTIONS, **inputs)


def training_graph(lab: Lab, family: str) -> graphs.Graph:
    """Training, and everything of the host's and ours that its outputs feed."""
    settings = {**lab.defaults("LoraModelLoader"), "strength_model": 1.0}
    core_load = node("LoraModelLoader", model=["base", 0], lora=["train", 0], **settings)
    return {
        **train_only(family),
        "losses": node("LossGraphNode", loss=["train", 1], filename_prefix="losses"),
        "path": node("PreviewAny", source=["train", 4]),
        "steps": node("PreviewAny", source=["train", 5]),
        **sampling("trained model", ["train", 2], ["train", 3], family=family),
        "core load": core_load,
        **sampling("core lora model", ["core load", 0], family=family),
        "save": node(
            "LoRAWeaveSave",
            lora=["train", 0],
            output_name=f"{NAMES[family]} saved",
            format="kohya",
            dtype="float16",
            trigger_words="",
            comment="a test",
        ),
    }


def loading_graph(family: str) -> graphs.Graph:
    name = f"{NAMES[family]}.safetensors"
    of_core = {"model": ["base", 0], "lora_name": name, "strength_model": 1.0}
    of_ours = {**of_core, "clip": ["base", 1], "strength_clip": 1.0}
    return {
        **graphs.checkpoint(family),
        "ours": node("LoRAWeaveLoad", **of_ours),
        **sampling("ours loaded", ["ours", 0], ["ours", 1], family=family),
        "words": node("PreviewAny", source=["ours", 3]),
        "core": node("LoraLoader", **of_ours),
        **sampling("core loaded", ["core", 0], ["core", 1], family=family),
        "core model only": node("LoraLoaderModelOnly", **of_core),
        **sampling("core model only loaded", ["core model only", 0], family=family),
        "off": node("LoRAWeaveLoad", **{**of_ours, "strength_model": 0.0, "strength_clip": 0.0}),
        **sampling("loaded at zero", ["off", 0], ["off", 1], family=family),
    }


# --- sampling


def test_the_lora_changes_the_image(trained):
    difference = np.abs(trained.image("ours loaded") - trained.before)
    assert difference.max() > 8, "out of 255"


def test_base_sampling_is_bit_identical_after_training(trained):
    """The live model was trained on, and not one bit of it is different now."""
    assert np.array_equal(trained.before, trained.after)


def test_strength_zero_is_the_base(trained):
    assert np.array_equal(trained.image("loaded at zero"), trained.before)


@pytest.mark.parametrize(
    "name", ["core loaded", "core model only loaded", "core lora model", "trained model"]
)
def test_every_way_to_apply_the_lora_gives_the_same_image(trained, name):
    """Core's three loaders and the trained model itself against our Load.

    One level of 255 apart at most: core adds `scale * (up @ down)` to the weight and we let one
    addmm do it, so weights differ in their last bit, which the PNG's rounding may show.
    """
    difference = np.abs(trained.image("ours loaded") - trained.image(name))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_core_finds_a_place_for_every_tensor(trained):
    assert "lora key not loaded" not in trained.loading_log


# --- what the nodes give


def test_path_and_steps(trained):
    assert trained.file == trained.lab.loras / trained.lora_name
    assert trained.file.is_file()
    assert trained.training.outputs["steps"]["text"] == [str(STEPS)]


def test_losses_feed_the_loss_graph(trained):
    assert len(trained.training.outputs["losses"]["images"]) == 1


def test_progress_arrives_step_by_step(trained):
    shown = [data for data in trained.training.of("progress", "train") if data["max"] == STEPS]
    values = [data["value"] for data in shown]
    assert values[0] == 0 and values[-1] == STEPS
    assert values == sorted(values)
    assert len(values) > 2, "0.33 shows one in 100 ms at most"
    kinds = [kind for kind, _ in trained.training.messages]
    assert kinds.index("progress") < kinds.index("executed")
    assert trained.training.texts("train")[-1].startswith(f"step {STEPS} of {STEPS}, loss ")


def test_thumbnails_of_the_dataset(trained):
    shown = trained.training.outputs["photos"]["images"]
    assert [entry["subfolder"] for entry in shown] == ["photos"] * 4
    assert trained.lab.client.image(shown[0]) == (trained.lab.photos / "astronaut.png").read_bytes()


def test_trigger_words_come_back_from_the_file(trained):
    assert trained.loading.outputs["words"]["text"] == ["zxq"]


# --- the file

SAMPLE_KEYS = {  # (kohya's name, shape of the layer's weight) of a linear layer and a convolution
    "SD1.5": [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 768)),
        ("lora_unet_down_blocks_0_resnets_0_conv1", (320, 320, 3, 3)),
    ],
    "SD3": [
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", (384, 128)),
        ("lora_unet_x_embedder_proj", (128, 16, 2, 2)),
    ],
}


def test_keys_are_kohyas_with_an_alpha_each(trained):
    tensors = trained.tensors()
    layers = {key.split(".")[0] for key in tensors}
    endings = ("lora_up.weight", "lora_down.weight", "alpha")
    assert set(tensors) == {f"{layer}.{ending}" for layer in layers for ending in endings}
    assert all(layer.startswith("lora_unet_") for layer in layers)
    assert all(tensors[f"{layer}.alpha"].item() == ALPHA for layer in layers)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_shapes_are_whole(trained):
    tensors = trained.tensors()
    for layer, (out, into, *kernel) in SAMPLE_KEYS[trained.family]:
        assert tensors[f"{layer}.lora_up.weight"].shape == (out, RANK, *[1] * len(kernel))
        assert tensors[f"{layer}.lora_down.weight"].shape == (RANK, into, *kernel)


def test_every_layer_has_learned(trained):
    """`up` starts at zero; layers that nothing reaches would still be there."""
    ups = {key: t for key, t in trained.tensors().items() if key.endswith("lora_up.weight")}
    still = [key for key, tensor in ups.items() if not tensor.any()]
    assert not still


def test_hashes_are_those_of_the_content(trained):
    metadata = trained.metadata()
    digest = hashlib.sha256(body_of(trained.file)).hexdigest()
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert len(metadata["sshs_legacy_hash"]) == 8


def test_metadata_says_what_was_done(trained):
    expected = {
        "ss_output_name": Path(NAMES[trained.family]).name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(ALPHA),
        "ss_learning_rate": "0.005",
        "ss_unet_lr": "0.005",
        "ss_optimizer": "AdamW",
        "ss_steps": str(STEPS),
        "ss_max_train_steps": str(STEPS),
        "ss_seed": "1",
        "ss_batch_size_per_device": "2",
        "ss_gradient_accumulation_steps": "1",
        "ss_num_train_images": "4",
        "ss_enable_bucket": "True",
        "ss_caption_dropout_rate": "0.05",
        "ss_max_grad_norm": "1.0",
        "ss_mixed_precision": "no",
        "ss_gradient_checkpointing": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": Path(NAMES[trained.family]).name,
        "modelspec.resolution": "64x64",
        "modelspec.trigger_phrase": "zxq",
    }
    expected |= {
        "SD1.5": {
            "ss_base_model_version": "sd_v1",
            "ss_lr_scheduler": "cosine",
            "ss_timestep_sampling": "uniform",
            "ss_min_snr_gamma": "4.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.prediction_type": "epsilon",
        },
        "SD3": {
            "ss_base_model_version": "sd3",
            "ss_lr_scheduler": "constant",
            "ss_timestep_sampling": "logit-normal",
            "modelspec.architecture": "stable-diffusion-3/lora",
        },
    }[trained.family]
    metadata = trained.metadata()
    assert {key: metadata.get(key) for key in expected} == expected
    if trained.family == "SD3":  # these are for eps models only
        assert not {"ss_min_snr_gamma", "modelspec.prediction_type"} & set(metadata)
    started, finished = (
        float(metadata[f"ss_training_{when}_at"]) for when in ("started", "finished")
    )
    assert started < finished
    assert "T" in metadata["modelspec.date"]


def test_metadata_says_what_was_trained_on(trained):
    metadata = trained.metadata()
    assert json.loads(metadata["ss_network_args"]) == {"targets": TARGETS}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"photos": {"n_repeats": 1, "img_count": 4}}
    tags = json.loads(metadata["ss_tag_frequency"])["photos"]
    assert tags["zxq"] == 4
    assert tags["a photo of the face of a ginger cat"] == 1
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert sum(bucket["count"] for bucket in buckets) == 4
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["subsets"][0]["class_tokens"] == "zxq"


def test_automatic_resolution_of_sd3_is_two_sizes(lab):
    """Every image is a sample at both, here at its own size: nothing is enlarged."""
    graph = graphs.training("SD3", folder={"resolution": 0}, output_name="two sizes", steps=8)
    lab.succeed(graph)
    metadata = metadata_of(lab.loras / "two sizes.safetensors")
    assert metadata["modelspec.resolution"] == "768x768"
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert sum(bucket["count"] for bucket in buckets) == 8
    assert (metadata["ss_num_train_images"], metadata["ss_epoch"]) == ("4", "1")


# --- the same again


def test_same_seed_on_another_server_gives_the_same_tensors(trained, other_lab):
    """Another process and base directory, so other paths, dates and an empty cache."""
    outcome = other_lab.succeed(train_only(trained.family))
    assert "train" in outcome.ran()
    file = other_lab.loras / trained.lora_name
    there = metadata_of(file)
    assert there["sshs_model_hash"] == trained.metadata()["sshs_model_hash"]
    assert body_of(file) == body_of(trained.file)


def test_another_seed_gives_other_tensors(trained):
    graph = train_only(trained.family, training_seed=2, output_name="another seed")
    trained.lab.succeed(graph)
    file = trained.lab.loras / "another seed.safetensors"
    if trained.family == "SD3":
        file = trained.lab.loras / "another seed-2.safetensors"  # the first is SD1.5's
    assert body_of(file) != body_of(trained.file)


# --- Save LoRA (Weave)


def test_save_writes_half_the_bytes_and_the_same_metadata(trained):
    path = trained.lab.loras / f"{NAMES[trained.family]} saved.safetensors"
    assert trained.training.outputs["save"]["text"] == [str(path)]
    saved, ours = tensors_of(path), trained.tensors()
    assert set(saved) == set(ours)
    for key, tensor in saved.items():
        dtype = torch.float32 if key.endswith(".alpha") else torch.float16
        torch.testing.assert_close(tensor, ours[key].to(dtype), rtol=0, atol=0)
    metadata, original = metadata_of(path), trained.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(body_of(path)).hexdigest()
    assert metadata["ss_training_comment"] == "a test"
    assert metadata["modelspec.title"] == f"{Path(NAMES[trained.family]).name} saved"
    for key in ("ss_network_dim", "ss_steps", "ss_tag_frequency", "modelspec.trigger_phrase"):
        assert metadata[key] == original[key]


def test_save_again_never_overwrites(trained):
    path = trained.lab.loras / f"{NAMES[trained.family]} saved.safetensors"
    before = path.read_bytes()
    graph = training_graph(trained.lab, trained.family)
    graph = {name: graph[name] for name in ("base", "photos", "options", "train", "save")}
    graph["save again"] = graph.pop("save")
    outcome = trained.lab.succeed(graph)
    assert outcome.outputs["save again"]["text"][0].endswith(" saved-2.safetensors")
    assert path.read_bytes() == before


# --- the text encoder


def test_text_encoder_is_trained_and_loads_alike(lab):
    """SD1.5's CLIP-L; core's LoraLoader and our Load change MODEL and CLIP to the same image."""
    options = {"text_encoder": True, "text_encoder_learning_rate": 1e-2}
    graph = graphs.training(options=options, steps=2, learning_rate=5e-3, output_name="with clip")
    lab.succeed(graph | sampling("with clip", ["train", 2], ["train", 3]))
    tensors = tensors_of(lab.loras / "with clip.safetensors")
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert tensors[f"{layer}.lora_up.weight"].any()
    load = {
        "model": ["base", 0],
        "clip": ["base", 1],
        "lora_name": "with clip.safetensors",
        "strength_model": 0.5,
        "strength_clip": 0.8,
    }
    outcome = lab.succeed(
        {
            **graphs.checkpoint(),
            **sampling("base image", ["base", 0]),
            "ours": node("LoRAWeaveLoad", **load),
            **sampling("ours clip", ["base", 0], ["ours", 1]),
            **sampling("ours both", ["ours", 0], ["ours", 1]),
            "core": node("LoraLoader", **load),
            **sampling("core clip", ["base", 0], ["core", 1]),
            **sampling("core both", ["core", 0], ["core", 1]),
        }
    )
    image = {name: lab.pixels(outcome, name) for name in outcome.outputs}
    assert np.abs(image["ours clip"] - image["base image"]).max() > 1
    assert np.abs(image["ours both"] - image["ours clip"]).max() > 1
    assert np.abs(image["ours clip"] - image["core clip"]).max() <= 1
    assert np.abs(image["ours both"] - image["core both"]).max() <= 1


# --- core's dataset nodes and core's trainer


def test_cores_dataset_nodes_feed_training_images(lab):
    """Images and captions as core loads them: the same pictures, so the same training."""
    settings = {"trigger_word": "zxq", "repeats": 1, "buckets": True, "bucket_step": 32}
    graph = graphs.training("SD3", output_name="from images")
    graph["core"] = node("LoadImageTextDataSetFromFolder", folder="photos")
    graph["photos"] = node(
        "LoRAWeaveImages",
        images=["core", 0],
        captions=["core", 1],
        resolution=64,
        **settings,
    )
    outcome = lab.succeed(graph)
    assert outcome.texts("photos") == ["4 images, 4 a pass"]
    metadata = metadata_of(lab.loras / "from images.safetensors")
    tags = json.loads(metadata["ss_tag_frequency"])["images"]
    assert tags["zxq"] == 4
    assert tags["a photo of the face of a ginger cat"] == 1


def test_cores_trainer_feeds_our_save_and_the_file_loads_in_core(make_lab, lab):
    """In a server of its own: TrainLoraNode leaves wrappers on the model that later prompts get."""
    own = make_lab("core-train").start()
    info = own.client.get("/object_info/TrainLoraNode")["TrainLoraNode"]
    defaults = own.defaults("TrainLoraNode")
    settings = {"steps": 2, "rank": 2, "learning_rate": 1e-2, "batch_size": 2}
    graph = {
        **graphs.checkpoint(),
        "batch": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        # 0.3.75 fails on one batch of latents (`multi_res` is unset); a list of two is all right
        "latents": node("RebatchLatents", latents=["batch", 0], batch_size=1),
        "prompt": node("CLIPTextEncode", text="a cat", clip=["base", 1]),
        "core": node(
            "TrainLoraNode",
            **{**defaults, **settings, "training_dtype": "fp32", "lora_dtype": "fp32"},
            model=["base", 0],
            latents=["latents", 0],
            positive=["prompt", 0],
        ),
        "save": node(
            "LoRAWeaveSave",
            lora=["core", info["output"].index("LORA_MODEL")],
            output_name="by core",
            format="automatic",
            dtype="float32",
            trigger_words="",
            comment="",
        ),
    }
    own.succeed(graph)
    file = own.loras / "by core.safetensors"
    metadata = metadata_of(file)
    assert metadata["sshs_model_hash"] == hashlib.sha256(body_of(file)).hexdigest()
    own.stop()
    (lab.loras / file.name).write_bytes(file.read_bytes())
    already = len(lab.server.log_text())
    core = node("LoraLoaderModelOnly", model=["base", 0], lora_name=file.name, strength_model=1.0)
    outcome = lab.succeed(
        {
            **graphs.checkpoint(),
            "core": core,
            **sampling("base image", ["base", 0]),
            **sampling("with cores lora", ["core", 0]),
        }
    )
    assert "lora key not loaded" not in lab.server.log_text()[already:]
    difference = lab.pixels(outcome, "base image") - lab.pixels(outcome, "with cores lora")
    assert np.abs(difference).max() > 1
