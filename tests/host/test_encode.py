"""Images and captions are encoded as the host encodes them, once, and found again."""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.sd1_clip import ClipTokenWeightEncoder
from torch import Tensor

import nodes as host_nodes
from lora_weave.demo import tiny_checkpoint
from lora_weave.lora_core.buckets import Bucketed, plan
from lora_weave.lora_core.cache import TensorCache
from lora_weave.lora_core.dataset import Dataset, from_tensors
from lora_weave.lora_core.host import encode, text_batch
from lora_weave.lora_core.host.encode import encode_caption, encode_captions, encode_images
from lora_weave.lora_core.host.identity import clip_identity, vae_identity
from lora_weave.lora_core.host.inplace import in_place
from lora_weave.lora_core.host.progress import Interrupted
from lora_weave.lora_core.pixels import read_pixels

from . import families
from .text_encoders import TARGETS, build_clip

# Convolutions of a batch sum in another order than those of one image. Observed: 2.8e-5 of values
# up to 13.
BATCHED = 1e-4
KINDS = [name for name in TARGETS if name != "SD3"]  # the tiny SD3's encoders don't fit together
CAPTIONS = ["a cat", "", "zxq, a photo of 猫"]


@pytest.fixture(autouse=True)
def executor() -> Iterator[None]:
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(tmp_path) -> TensorCache:
    return TensorCache(tmp_path / "cache")


class Progress:
    """Keeps what it is told; `stop_at` interrupts as the user would."""

    def __init__(self, stop_at: int = 0) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.stop_at = stop_at

    def __call__(self, *told: Any) -> None:
        self.told.append(told)
        if told[1] == self.stop_at:
            raise Interrupted


# --- images


@functools.cache
def taesd(seed: int) -> dict[str, Tensor]:
    """The tiny checkpoint's autoencoder."""
    pool = tiny_checkpoint.Pool(seed)
    tensors = tiny_checkpoint.taesd(latent_channels=4, scale=0.18215, shift=0.0, pool=pool)
    return {name.removeprefix("first_stage_model."): value for name, value in tensors.items()}


def build_vae(seed: int = 0) -> comfy.sd.VAE:
    """By the host's own loader."""
    return comfy.sd.VAE(sd=dict(taesd(seed)))


@pytest.fixture(scope="module")
def vae() -> comfy.sd.VAE:
    return build_vae()


@pytest.fixture
def seen(vae, monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the batches that the VAE really encodes."""
    shapes: list[tuple[int, ...]] = []
    really = vae.encode

    def encoding(pixels: Tensor) -> Tensor:
        shapes.append(tuple(pixels.shape))
        return really(pixels)

    monkeypatch.setattr(vae, "encode", encoding)
    return shapes


@pytest.fixture
def in_batches(monkeypatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(encode, "shares_batches", lambda device: True)


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((height, width, 3), generator=generator) for width, height in sizes]


def laid_out(images: list[Tensor], **settings: Any) -> tuple[Dataset, Bucketed]:
    settings = {"resolution_px": 64, "bucket_step_px": 32, **settings}
    dataset = from_tensors(images, CAPTIONS[:1], **settings)
    return dataset, plan(dataset)


MIXED = [(64, 64), (128, 64), (70, 66), (96, 64), (64, 128), (64, 64)]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in batches"])
def test_latents_are_the_hosts(vae, cache, together, monkeypatch):
    monkeypatch.setattr(encode, "shares_batches", lambda device: together)
    dataset, plan_ = laid_out(pictures(*MIXED))
    latents = encode_images(vae, dataset, plan_, cache, Progress())
    assert len(latents) == len(MIXED)
    for item, where, latent in zip(dataset.items, plan_.placements, latents, strict=True):
        pixels = read_pixels(item, where)[None]
        (alone,) = host_nodes.VAEEncode().encode(vae, pixels)
        width, height = where.bucket_px
        assert latent.shape == (1, 4, height // 8, width // 8)
        assert (latent.dtype, latent.device.type) == (torch.float32, "cpu")
        tolerance = BATCHED if together else 0
        torch.testing.assert_close(latent, alone["samples"], rtol=0, atol=tolerance)


def test_images_of_one_bucket_are_encoded_together(vae, cache, seen, in_batches):
    dataset, plan_ = laid_out(pictures(*MIXED))
    encode_images(vae, dataset, plan_, cache, Progress())
    counts = {size: plan_.bucket_of.count(size) for size in set(plan_.bucket_of)}
    assert max(counts.values()) > 1
    expected = sorted((count, h, w, 3) for (w, h), count in counts.items())
    assert sorted(seen) == expected


def test_a_batch_has_a_limit(vae, cache, seen, monkeypatch, in_batches):
    monkeypatch.setattr(encode, "PIXELS_PER_BATCH", 2 * 64 * 64 + 1)
    dataset, plan_ = laid_out(pictures(*[(64, 64)] * 5))
    encode_images(vae, dataset, plan_, cache, Progress())
    assert [shape[0] for shape in seen] == [2, 2, 1]


def test_an_image_over_the_limit_is_encoded_all_the_same(vae, cache, seen, monkeypatch):
    monkeypatch.setattr(encode, "PIXELS_PER_BATCH", 10)
    dataset, plan_ = laid_out(pictures((64, 64), (64, 64)))
    encode_images(vae, dataset, plan_, cache, Progress())
    assert [shape[0] for shape in seen] == [1, 1]


def test_video_vaes_get_images_one_by_one():
    """They would read a batch as the frames of one video."""
    dataset, plan_ = laid_out(pictures(*[(64, 64)] * 3))
    pairs = zip(dataset.items, plan_.placements, strict=True)
    missing = {str(i): pair for i, pair in enumerate(pairs)}
    sizes = [len(batch) for batch in encode._batches(missing, one_by_one=True)]
    assert sizes == [1, 1, 1]


def test_a_second_time_comes_from_the_cache(vae, cache, seen):
    dataset, plan_ = laid_out(pictures(*MIXED))
    first = encode_images(vae, dataset, plan_, cache, Progress())
    encoded, again = len(seen), Progress()
    second = encode_images(vae, dataset, plan_, cache, again)
    assert len(seen) == encoded
    assert again.told == []
    assert all(map(torch.equal, first, second))


def test_only_what_is_new_is_encoded(vae, cache, seen):
    images = pictures(*MIXED)
    dataset, plan_ = laid_out(images[:3])
    first = encode_images(vae, dataset, plan_, cache, Progress())
    seen.clear()
    dataset, plan_ = laid_out([*images[3:], *images[:3]])
    second = encode_images(vae, dataset, plan_, cache, Progress())
    assert sum(shape[0] for shape in seen) == 3
    assert all(map(torch.equal, second[3:], first))


def test_latents_do_not_depend_on_what_else_the_cache_lacked(vae, cache, tmp_path):
    """Else the same seed would not give the same LoRA: batches differ in their last bits."""
    images = pictures(*[(64, 64)] * 4)
    encode_images(vae, *laid_out(images[1:2]), cache, Progress())
    after_one = encode_images(vae, *laid_out(images), cache, Progress())
    fresh = encode_images(vae, *laid_out(images), TensorCache(tmp_path / "fresh"), Progress())
    assert all(map(torch.equal, after_one, fresh))


def test_the_same_picture_twice_is_encoded_once(vae, cache, seen):
    (image,) = pictures((64, 64))
    dataset, plan_ = laid_out([image, image.clone()])
    progress = Progress()
    one, two = encode_images(vae, dataset, plan_, cache, progress)
    assert [shape[0] for shape in seen] == [1]
    assert torch.equal(one, two)
    assert progress.told == [("encoding images", 1, 1)]


@pytest.mark.parametrize("what", ["pixels", "placement", "vae"])
def test_another_input_is_another_entry(vae, cache, what):
    images = pictures((128, 96))
    dataset, plan_ = laid_out(images)
    (first,) = encode_images(vae, dataset, plan_, cache, Progress())
    if what == "pixels":
        images[0][40:50, 60:70] = 1.0 - images[0][40:50, 60:70]
        dataset, plan_ = laid_out(images)
    elif what == "placement":
        dataset, plan_ = laid_out(images, resolution_px=96)
    else:
        vae = build_vae(seed=1)
    (second,) = encode_images(vae, dataset, plan_, cache, Progress())
    assert first.shape != second.shape or not torch.equal(first, second)


def test_a_damaged_entry_is_encoded_again(vae, cache, seen):
    dataset, plan_ = laid_out(pictures(*MIXED))
    first = encode_images(vae, dataset, plan_, cache, Progress())
    seen.clear()
    damaged = sorted(cache.folder.rglob("*.safetensors"))[2]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    second = encode_images(vae, dataset, plan_, cache, Progress())
    assert [shape[0] for shape in seen] == [1]
    assert damaged.stat().st_size == len(whole)
    assert all(map(torch.equal, first, second))


def test_an_interruption_keeps_what_was_encoded(vae, cache, seen, monkeypatch):
    monkeypatch.setattr(encode, "PIXELS_PER_BATCH", 1)
    dataset, plan_ = laid_out(pictures(*MIXED))
    with pytest.raises(Interrupted):
        encode_images(vae, dataset, plan_, cache, Progress(stop_at=4))
    assert len(seen) == 4
    progress = Progress()
    encode_images(vae, dataset, plan_, cache, progress)
    assert len(seen) == len(MIXED)
    assert progress.told == [("encoding images", 1, 2), ("encoding images", 2, 2)]


# --- captions


@pytest.fixture(scope="module")
def clips() -> dict[str, comfy.sd.CLIP]:
    return {name: build_clip(name) for name in KINDS}


def same(one: Any, two: Any) -> bool:
    """Equal structure and bits; a list for a tuple is all right."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("caption", CAPTIONS)
def test_conditioning_is_the_hosts(clips, name, caption):
    """What CLIPTextEncode gives for a text without brackets."""
    (expected,) = host_nodes.CLIPTextEncode().encode(clips[name], caption)
    assert same(encode_caption(clips[name], caption), expected)


@pytest.mark.parametrize(
    ("caption", "literal"),
    [
        ("a (cat:1.5) sits", "a (cat:1.5) sits"),
        ("a cat (animal)", "a cat (animal)"),
        (r"saber \(fate\)", "saber (fate)"),
        ("((smile))", "((smile))"),
        (":) (", ":) ("),
    ],
)
def test_brackets_are_text_in_a_caption(clips, caption, literal):
    """The host would read them as weights; booru tags escape them already."""
    clip = clips["SD1"]
    tokens = clip.tokenize(re.sub(r"(?<!\\)([()])", r"\\\1", caption))["l"]
    assert all(weight == 1.0 for chunk in tokens for _, weight in chunk)
    plain = clip.tokenizer.clip_l.tokenizer(literal)["input_ids"]
    assert [token for token, _ in tokens[0]][: len(plain)] == plain
    expected = clip.encode_from_tokens(tokens_of(clip, plain), return_dict=True)
    assert torch.equal(encode_caption(clip, caption)[0][0], expected["cond"])


def tokens_of(clip: Any, ids: list[int]) -> dict[str, Any]:
    """One chunk of tokens as the host's tokenizer would give it, padded with the end token."""
    padded = ids + [ids[-1]] * (77 - len(ids))
    return {"l": [[(token, 1.0) for token in padded]]}


@pytest.mark.parametrize("name", KINDS)
def test_cached_conditioning_is_bit_for_bit_the_fresh_one(clips, cache, name):
    fresh = encode_captions(clips[name], CAPTIONS, cache, Progress())
    again = Progress()
    cached = encode_captions(clips[name], CAPTIONS, cache, again)
    assert list(fresh) == list(cached) == CAPTIONS
    assert same(cached, fresh)
    assert again.told == []


LONG = " ".join(["a photo of a red fox in the snow,"] * 12)  # two sections of CLIP's


@pytest.mark.parametrize("name", KINDS)
def test_captions_share_batches(clips, cache, monkeypatch, name, in_batches):
    """Each encoder is called once for all rows of a length, and gives what it gives one by one."""
    captions = [*CAPTIONS, LONG, "a dog"]
    single = {caption: encode_caption(clips[name], caption) for caption in captions}
    calls = rows_encoded(clips[name], monkeypatch)
    together = encode_captions(clips[name], captions, cache, Progress())
    assert all(len(lengths) == len(set(lengths)) for lengths in calls.values())
    assert sum(map(len, calls.values())) < len(captions) * len(calls)
    for caption in captions:
        close(together[caption], single[caption])


def rows_encoded(clip: Any, monkeypatch: Any) -> dict[str, list[int]]:
    """{encoder: length of the token rows of each call}"""
    calls: dict[str, list[int]] = {}
    for name, module in clip.cond_stage_model.named_modules():
        if isinstance(module, ClipTokenWeightEncoder):
            lengths = calls.setdefault(name, [])

            def forward(tokens: Any, lengths: Any = lengths, really: Any = module.forward) -> Any:
                lengths.append(len(tokens[0]))
                return really(tokens)

            monkeypatch.setattr(module, "forward", forward)
    return calls


def close(one: Any, two: Any) -> None:
    """Equal but for the rounding of a batch. Observed: 1e-6 of values up to 3."""
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            close(one[name], two[name])
    elif isinstance(one, (list, tuple)):
        for part, other in zip(one, two, strict=True):
            close(part, other)
    else:
        assert one == two


def test_many_tokens_are_encoded_in_parts(clips, cache, monkeypatch, in_batches):
    monkeypatch.setattr(text_batch, "TOKENS_PER_BATCH", 2 * 77)
    calls = rows_encoded(clips["SD1"], monkeypatch)
    encode_captions(clips["SD1"], ["a", "b", LONG, "c", "d"], cache, Progress())
    assert calls == {"clip_l": [77, 77, 77]}


def test_encoders_are_left_as_they_were(clips, cache, monkeypatch):
    model = clips["SDXL"].cond_stage_model
    monkeypatch.setattr(model.clip_l, "encode", model.clip_l.encode)  # another pack's
    before = [dict(vars(module)) for module in model.modules()]
    encode_captions(clips["SDXL"], CAPTIONS, cache, Progress())
    assert [dict(vars(module)) for module in model.modules()] == before


def test_an_embedding_among_the_tokens_is_encoded_alone(clips):
    """As the host puts a textual inversion in the place of its name."""
    clip = clips["SD1"]
    word = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def encode_one(text: str) -> Any:
        (tokens,) = clip.tokenize(text)["l"]
        if text == "word":
            tokens[1] = (word, 1.0)
        return clip.encode_from_tokens({"l": [tokens]}, return_dict=True)

    expected = {text: encode_one(text) for text in ("word", "a cat", "a dog")}
    close(text_batch.encoded_together(clip, [*expected], encode_one), expected)


class OnePooledText(ClipTokenWeightEncoder, torch.nn.Module):
    """An encoder whose pooled output is of the first row alone, as some hosts' might be."""

    def encode(self, tokens: list[list[int]]) -> Any:
        out = torch.tensor(tokens, dtype=torch.float32)[..., None]
        return out, out[0].sum(0)


def test_an_encoder_that_does_not_answer_by_rows_is_asked_one_by_one():
    encoder = OnePooledText()
    clip = SimpleNamespace(cond_stage_model=encoder)

    def encode_one(text: str) -> Any:
        return encoder.encode_token_weights([[(ord(letter), 1.0) for letter in text]])

    expected = {text: encode_one(text) for text in ("ab", "cd", "e")}
    assert same(text_batch.encoded_together(clip, [*expected], encode_one), expected)


@pytest.mark.parametrize("name", KINDS)
def test_conditioning_does_not_depend_on_what_else_the_cache_lacked(clips, cache, name):
    encode_captions(clips[name], ["a dog"], cache, Progress())
    after_one = encode_captions(clips[name], [*CAPTIONS, "a dog"], cache, Progress())
    assert same(after_one, {text: encode_caption(clips[name], text) for text in after_one})


def test_equal_captions_are_encoded_once(clips, cache):
    progress = Progress()
    encode_captions(clips["SD1"], ["a", "b", "a", "a"], cache, progress)
    assert progress.told == [("encoding captions", 1, 2), ("encoding captions", 2, 2)]


def test_an_interruption_keeps_the_captions_so_far(clips, cache):
    with pytest.raises(Interrupted):
        encode_captions(clips["SD1"], CAPTIONS, cache, Progress(stop_at=2))
    progress = Progress()
    encode_captions(clips["SD1"], CAPTIONS, cache, progress)
    assert progress.told == [("encoding captions", 1, 1)]


def patched(clip: Any) -> Any:
    """The CLIP with a LoRA of the host's on one layer."""
    clone = clip.clone()
    path = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    lora = {
        f"{path}.lora_up.weight": torch.ones(64, 1),
        f"{path}.lora_down.weight": torch.ones(1, 64),
    }
    return comfy.sd.load_lora_for_models(None, clone, lora, 0, 0.5)[1]


def skipping(clip: Any) -> Any:
    clone = clip.clone()
    clone.clip_layer(-2)
    return clone


CHANGES = {
    "weights": lambda clip: build_clip("SD1", seed=1),
    "patch": patched,
    "clip skip": skipping,
    "dtype": lambda clip: build_clip("SD1", dtype=torch.float16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_text_encoder_has_entries_of_its_own(clips, cache, change):
    changed = CHANGES[change](clips["SD1"])
    first = encode_captions(clips["SD1"], ["a cat"], cache, Progress())["a cat"]
    progress = Progress()
    second = encode_captions(changed, ["a cat"], cache, progress)["a cat"]
    assert progress.told == [("encoding captions", 1, 1)]
    assert not torch.equal(first[0][0], second[0][0])
    assert same(second, encode_caption(changed, "a cat"))


def test_conditioning_that_can_not_be_cached_is_an_error(clips, cache, monkeypatch):
    """Better than a training on half of what the text encoder said."""
    clip = clips["SD1"]

    def with_object(*_: Any, **__: Any) -> dict[str, Any]:
        return {"cond": torch.ones(1), "hooks": object()}

    monkeypatch.setattr(clip, "encode_from_tokens", with_object)
    with pytest.raises(TypeError, match="conditioning holds a object, which can't be cached"):
        encode_captions(clip, ["a"], cache, Progress())
    assert not list(cache.folder.rglob("*.safetensors"))


def test_every_kind_of_value_comes_back():
    value = [[torch.ones(2), {"a": None, "b": (1, 2.5, True, "x"), "c": {"d": torch.zeros(0)}}]]
    tensors, skeleton = encode._pack(value)
    assert same(encode._unpack(tensors, skeleton), value)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_conditioning_of_the_models_own_kind_fits(family):
    encode.check_conditionings([families.conditioning(family)], families.build(family))


@pytest.mark.parametrize("family", ["SD1.5", "SDXL", "SD3", "Flux", "Qwen-Image", "Lumina2"])
def test_conditioning_of_another_model(family):
    own, other = families.conditioning(family), [[torch.zeros(1, 7, 50), {}]]
    takes = families.FAMILIES[family].context_shape[-1]
    with pytest.raises(ValueError, match=rf"of width 48, 50, the model \(.+\) takes {takes}: "):
        encode.check_conditionings([own, other], families.build(family))


# --- identity


def test_identity_lasts_over_a_new_load():
    """Also where a file lacks a weight, as those of SD1.5 lack the projection of the pooled text:
    the host leaves it to whatever the memory held, and the model does not read it."""
    first, junk = build_clip("SD1"), [torch.randn(64, 64) for _ in range(100)]
    del junk
    gc.collect()
    second = build_clip("SD1")
    projection = second.cond_stage_model.clip_l.transformer.text_projection.weight
    projection.fill_(float("nan"))
    assert clip_identity(first) == clip_identity(second)
    assert vae_identity(build_vae()) == vae_identity(build_vae())


def test_identity_of_a_model_that_is_patched_right_now(clips):
    """Weights that the host has patched in place count as they were before."""
    clip = patched(clips["SD1"])
    before = clip_identity(clip)
    clip.patcher.patch_model()
    try:
        assert clip_identity(clip) == before
    finally:
        clip.patcher.unpatch_model()
    assert clip_identity(clip) == before != clip_identity(clips["SD1"])


def test_a_caption_can_be_trained_through(clips):
    """Outside inference mode, with the text encoder's weights made ordinary tensors."""
    clip = build_clip("SD1")
    clip.patcher.model.requires_grad_(False)
    # the layers add to their input in place, as in training/protection.py
    mutable = torch.autograd.graph.allow_mutation_on_saved_tensors()
    with torch.inference_mode(False), torch.enable_grad(), mutable:
        with in_place(clip.cond_stage_model):
            layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1
            change = torch.zeros(layer.weight.shape, requires_grad=True)
            hook = layer.register_forward_hook(lambda _, x, out: out + x[0] @ change.T)
            encode_caption(clip, "a cat")[0][0].square().sum().backward()
            hook.remove()
    assert change.grad is not None and change.grad.abs().sum() > 0


def test_items_with_other_captions_share_latents(vae, cache, seen):
    """A caption that was mended does not make the images be encoded anew."""
    dataset, plan_ = laid_out(pictures((64, 64)))
    encode_images(vae, dataset, plan_, cache, Progress())
    renamed = tuple(dataclasses.replace(item, caption="other") for item in dataset.items)
    encode_images(vae, dataclasses.replace(dataset, items=renamed), plan_, cache, Progress())
    assert len(seen) == 1
