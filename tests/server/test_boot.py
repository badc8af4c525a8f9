"""The server starts with the pack, offers its nodes, and samples with the tiny checkpoints."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lora_weave.devtools.paths import PACK_NAME, ROOT

# Ids and input ids are stored in workflows, so they never change; new inputs are appended.
NODES = {
    "LoRAWeaveImageFolder": [
        *("folder", "trigger_word", "repeats", "missing_caption"),
        *("resolution", "buckets", "bucket_step"),
    ],
    "LoRAWeaveImages": [
        *("images", "trigger_word", "repeats", "resolution", "buckets", "bucket_step"),
        "captions",
    ],
    "LoRAWeaveTrain": [
        *("model", "dataset", "algorithm", "rank", "alpha", "steps", "learning_rate"),
        *("batch_size", "training_seed", "output_name", "resume"),
        *("clip", "vae", "start_from", "options"),
    ],
    "LoRAWeaveTrainOptions": [],
    "LoRAWeaveLoad": ["lora_name", "strength_model", "strength_clip", "model", "clip"],
    "LoRAWeaveSave": ["lora", "output_name", "format", "dtype", "trigger_words", "comment"],
}


def test_the_pack_is_imported(server):
    log = server.log_text()
    failures = [line for line in log.splitlines() if PACK_NAME in line and "IMPORT FAILED" in line]
    assert not failures
    assert any(PACK_NAME in line and "seconds" in line for line in log.splitlines())


@pytest.mark.parametrize("name", NODES)
def test_node_is_offered(client, name):
    info = client.get(f"/object_info/{name}")[name]
    declared = [*info["input"].get("required", {}), *info["input"].get("optional", {})]
    first = [field for field in declared if field in NODES[name]]
    assert first == NODES[name]
    assert info["category"].startswith("LoRA Weave")


def test_no_input_is_randomised_by_the_page(client):
    """Pages change inputs called seed after every queueing, and each would be a new run."""
    for name in NODES:
        info = client.get(f"/object_info/{name}")[name]
        for group in info["input"].values():
            for field, spec in group.items():
                assert field not in ("seed", "noise_seed")
                assert not (len(spec) > 1 and spec[1].get("control_after_generate"))


def test_web_files_are_served(client):
    """Extension scripts and help pages; each file of web/ is what the browser gets."""
    for path in sorted((ROOT / "web").rglob("*")):
        if path.is_file():
            where = f"/extensions/{PACK_NAME}/{path.relative_to(ROOT / 'web').as_posix()}"
            assert client.get_bytes(where) == path.read_bytes()


@pytest.mark.parametrize("checkpoint", ["tiny_sd15.ckpt", "tiny_sd3.ckpt"])
def test_a_tiny_checkpoint_makes_images(client, checkpoint):
    first, again = (sample(client, checkpoint, "a cat") for _ in range(2))
    other = sample(client, checkpoint, "a dog")
    assert first.std() > 5, "the image is all but constant"
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other), "the prompt changes nothing"


def sample(client, checkpoint: str, prompt: str) -> np.ndarray:
    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("CLIPTextEncode", clip=["1", 1], text=prompt),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "4": node(
            "KSampler",
            model=["1", 0],
            positive=["2", 0],
            negative=["2", 0],
            latent_image=["3", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("PreviewImage", images=["5", 0]),
    }
    shown = client.run(json.loads(json.dumps(graph)))["6"]["images"][0]
    return np.asarray(Image.open(io.BytesIO(client.image(shown)))).astype(float)
