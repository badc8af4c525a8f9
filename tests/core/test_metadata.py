"""Metadata entries and the hashes by which other tools find a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lora_weave.lora_core.metadata import (
    TrainingFacts,
    base_model,
    minimum_metadata,
    training_metadata,
    trigger_words,
    with_hashes,
)
from lora_weave.lora_core.safetensors_file import Serialized

FACTS = dict(
    base=base_model("SD1.5"),
    output_name="cat",
    rank=16,
    alpha=8.0,
    learning_rate=1e-4,
    optimizer="AdamW",
    lr_scheduler="cosine",
    steps=300,
    seed=7,
    batch_size=2,
    resolution_px=(512, 640),
    num_images=24,
)


def test_training_metadata_of_the_least_facts() -> None:
    metadata = training_metadata(TrainingFacts(**FACTS))
    assert (
        metadata.items()
        >= {
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "16",
            "ss_network_alpha": "8.0",
            "ss_network_args": "{}",
            "ss_output_name": "cat",
            "ss_learning_rate": "0.0001",
            "ss_optimizer": "AdamW",
            "ss_lr_scheduler": "cosine",
            "ss_steps": "300",
            "ss_seed": "7",
            "ss_batch_size_per_device": "2",
            "ss_resolution": "(512, 640)",
            "ss_num_train_images": "24",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": "cat",
            "modelspec.resolution": "512x640",
        }.items()
    )
    assert not any(value == "None" for value in metadata.values())
    assert "modelspec.date" not in metadata and "ss_min_snr_gamma" not in metadata


def test_training_metadata_of_everything() -> None:
    facts = TrainingFacts(
        **FACTS | {"base": base_model("SDXL")},
        algorithm="loha",
        network_args={"conv_dim": 4},
        started_at=1_700_000_000.25,
        finished_at=1_700_000_100.75,
        tag_frequency={"10_cat": {"cat": 12, "猫": 3}},
        dataset_dirs={"10_cat": {"n_repeats": 10, "img_count": 12}},
        bucket_info={"buckets": {"0": {"resolution": [512, 640], "count": 12}}},
        buckets=True,
        min_snr_gamma=5.0,
        trigger_words="mycat",
        prediction_type="epsilon",
        clip_skip=2,
    )
    metadata = training_metadata(facts)
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "loha", "conv_dim": 4}
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_cat": {"cat": 12, "猫": 3}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_cat": {"n_repeats": 10, "img_count": 12}}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"]["resolution"] == [512, 640]
    assert metadata["ss_min_snr_gamma"] == "5.0"
    assert metadata["ss_enable_bucket"] == "True"
    assert metadata["ss_training_started_at"] == "1700000000.25"
    assert metadata["modelspec.date"] == "2023-11-14T22:15:00+00:00"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.encoder_layer"] == "2"
    assert metadata["modelspec.trigger_phrase"] == "mycat"
    assert json.loads(metadata["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "mycat"
    assert trigger_words(metadata) == "mycat"
    # The library takes it, so every entry can be written.
    safetensors.torch.save({"x": torch.zeros(1)}, metadata)


def test_every_field_of_the_facts_is_written() -> None:
    named = {entry.metadata["key"] for entry in fields(TrainingFacts) if "key" in entry.metadata}
    filled = {
        entry.name: FACTS.get(
            entry.name,
            {} if "info" in entry.name or "frequ" in entry.name or "dirs" in entry.name else 1,
        )
        for entry in fields(TrainingFacts)
        if "key" in entry.metadata
    }
    assert named <= training_metadata(TrainingFacts(**FACTS | filled)).keys()


@pytest.mark.parametrize(
    "family, version, architecture",
    [
        ("SD1.5", "sd_v1", "stable-diffusion-v1"),
        ("sd15", "sd_v1", "stable-diffusion-v1"),
        ("SD2", "sd_v2", "stable-diffusion-v2-512"),
        ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        ("SD3", "sd3", "stable-diffusion-3"),
        ("Flux", "flux1", "flux-1-dev"),
        ("QwenImage", "qwen_image", "Qwen-Image"),
        ("WAN21", "wan2.1", "wan2.1"),
        ("AuraFlow", "AuraFlow", "AuraFlow"),
    ],
)
def test_base_models_in_any_spelling(family: str, version: str, architecture: str) -> None:
    base = base_model(family)
    assert (base.version, base.architecture) == (version, architecture)


def test_v_prediction_of_sd2() -> None:
    base = base_model("SD2", v_prediction=True)
    assert (base.version, base.is_v2) == ("sd_v2_v", True)


def test_minimum_metadata() -> None:
    metadata = minimum_metadata("SDXL", "cat", [4, 4], [2.0, 1.0])
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def reference_legacy_hash(data: bytes) -> str:
    """The old web UI hash: 64 KiB of the file from 1 MiB on."""
    return hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("floats", [10, 300_000, 2**18 - 30], ids=["small", "large", "on the edge"])
def test_hashes_recomputed_from_the_librarys_file(tmp_path: Path, floats: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "b": torch.randn(floats, generator=generator),
        "a": torch.randn(7, generator=generator).half(),
        "alpha": torch.tensor(4.0),
    }
    facts = training_metadata(TrainingFacts(**FACTS, trigger_words="mycat"))
    serialized = Serialized.of(tensors)
    metadata = with_hashes({**facts, "sshs_model_hash": "stale"}, serialized)
    data = serialized.header(metadata) + serialized.body
    (tmp_path / "x.safetensors").write_bytes(data)

    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        read = file.metadata()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert read["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert read["modelspec.hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()
    training_only = {key: value for key, value in facts.items() if key.startswith("ss_")}
    bare = safetensors.torch.save(tensors, training_only)
    assert read["sshs_legacy_hash"] == reference_legacy_hash(bare)
    assert (read["sshs_legacy_hash"] == "e3b0c442") == (len(bare) <= 0x100000)
    # The body is the same whatever the metadata, as the hash must be.
    assert bare.endswith(bytes(body))


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({}, ""),
        ({"modelspec.trigger_phrase": "a b"}, "a b"),
        ({"ss_datasets": '[{"subsets": [{"class_tokens": "x"}, {"class_tokens": "x"}]}]'}, "x"),
        ({"ss_datasets": '[{"subsets": [{"class_tokens": "x"}, {"class_tokens": "y"}]}]'}, "x, y"),
        ({"ss_datasets": '[{"subsets": [{"class_tokens": null}]}]'}, ""),
        ({"ss_datasets": "not json"}, ""),
        ({"ss_datasets": '{"subsets": 1}'}, ""),
        ({"ss_datasets": "7"}, ""),
        ({"ss_datasets": '[{"subsets": [{"class_tokens": ["x"]}]}]'}, ""),
        ({"ss_datasets": "[" * 100_000}, ""),
    ],
)
def test_trigger_words(metadata: dict[str, str], words: str) -> None:
    assert trigger_words(metadata) == words
