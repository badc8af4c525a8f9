"""LoRA files and LORA_MODELs: every spelling, round trips, all problems at once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora_weave.lora_core import files
from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.key_map import family_label, part_of
from lora_weave.lora_core.lora_file import KeyMap, LayerKey, LoraFile, LoraFileError
from lora_weave.lora_core.lora_model import LoraInfo, LoraModel

from .tolerances import assert_close

UNET = "diffusion_model.input_blocks.1.1.transformer_blocks.0."
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0."
TEXT = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"

LINEAR = LayerKey(
    UNET + "attn2.to_k",
    (8, 768),
    KOHYA + "attn2_to_k",
    (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k",
        f"unet.{DIFFUSERS}attn2.processor.to_k",
        f"unet.{DIFFUSERS}attn2.to_k",
        f"base_model.model.{DIFFUSERS}attn2.to_k",
    ),
)
CONV = LayerKey(
    "diffusion_model.input_blocks.1.0.in_layers.2",
    (6, 4, 3, 3),
    "lora_unet_down_blocks_0_resnets_0_conv1",
)
FUSED = LayerKey(
    UNET + "attn1.qkv",
    (12, 4),
    KOHYA + "attn1_qkv",
    slices={f"transformer.{DIFFUSERS}attn1.to_q": (0, 0, 4)},
)
ENCODER = LayerKey(
    TEXT,
    (5, 5),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",),
)


NORM = LayerKey(
    "diffusion_model.input_blocks.1.0.in_layers.0", (4,), "lora_unet_down_blocks_0_resnets_0_norm1"
)


def keymap_of(*layers: LayerKey, family: str = "SD1.5") -> KeyMap:
    """All but the fused layer have a bias, and so has the norm."""
    biases = frozenset({layer.path for layer in (*layers, NORM)} - {UNET + "attn1.qkv"})
    return KeyMap(family, {layer.path: layer for layer in layers}, {NORM.path: NORM}, biases)


KEYMAP = keymap_of(LINEAR, CONV, FUSED, ENCODER)


def pair(layer: LayerKey, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, *rest = layer.shape
    ones = [1] * (len(rest) - 1)
    up = torch.randn(out, rank, *ones, generator=generator)
    return up, torch.randn(rank, *rest, generator=generator)


def kohya_tensors(*layers: LayerKey, alpha: float | None = 1.0) -> dict[str, Tensor]:
    tensors = {}
    for seed, layer in enumerate(layers):
        up, down = pair(layer, seed=seed)
        tensors[f"{layer.kohya}.lora_up.weight"] = up
        tensors[f"{layer.kohya}.lora_down.weight"] = down
        if alpha is not None:
            tensors[f"{layer.kohya}.alpha"] = torch.tensor(alpha)
    return tensors


def delta(lora: LoraFile, layer: LayerKey) -> Tensor:
    return lora.adapters[layer.path].delta(torch.zeros(layer.shape)).detach()


def product(up: Tensor, down: Tensor, scale: float, layer: LayerKey) -> Tensor:
    exact = up.flatten(1).double() @ down.flatten(1).double() * scale
    return exact.reshape(layer.shape).float()


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    safetensors.torch.save_file(tensors, path, metadata or None)
    return path


# Reading


SPELLINGS = {
    "kohya": (KOHYA + "attn2_to_k", ".lora_{}.weight", ("up", "down")),
    "kohya, original names": (LINEAR.aliases[0], ".lora_{}.weight", ("up", "down")),
    "generic": (LINEAR.path, ".lora_{}.weight", ("up", "down")),
    "generic A/B": (LINEAR.path, ".lora_{}.weight", ("B", "A")),
    "PEFT": (LINEAR.aliases[3], ".lora_{}.default.weight", ("B", "A")),
    "bare A/B": (LINEAR.path, ".lora_{}", ("B", "A")),
    "diffusers": (LINEAR.aliases[2], ".lora_{}.weight", ("B", "A")),
    "diffusers middle": (LINEAR.aliases[2], ".lora.{}.weight", ("up", "down")),
    "diffusers old": (LINEAR.aliases[1], "_lora.{}.weight", ("up", "down")),
    "down and up alone": (LINEAR.path, ".{}.weight", ("up", "down")),
    "diffusers linear layer": (LINEAR.path, ".lora_linear_layer.{}.weight", ("up", "down")),
}


@pytest.mark.parametrize("module, ending, words", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_every_spelling(
    tmp_path: Path, module: str, ending: str, words: tuple[str, str], alpha: float | None
) -> None:
    up, down = pair(LINEAR)
    tensors = {module + ending.format(word): t for word, t in zip(words, (up, down), strict=True)}
    if alpha is not None:
        tensors[module + ".alpha"] = torch.tensor(alpha)
    lora = LoraFile.read(save(tmp_path / "x.safetensors", tensors), KEYMAP)
    expected = product(up, down, 1.0 if alpha is None else alpha / 2, LINEAR)
    torch.testing.assert_close(delta(lora, LINEAR), expected)


@pytest.mark.parametrize("up_4d", [True, False])
@pytest.mark.parametrize("down_4d", [True, False])
def test_convolutions_in_two_or_four_dimensions(up_4d: bool, down_4d: bool) -> None:
    up, down = pair(CONV)
    tensors = {
        CONV.path + ".lora_up.weight": up if up_4d else up.flatten(1),
        CONV.path + ".lora_down.weight": down if down_4d else down.flatten(1),
    }
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    torch.testing.assert_close(delta(lora, CONV), product(up, down, 1.0, CONV))
    assert lora.to_kohya(KEYMAP)[CONV.kohya + ".lora_down.weight"].shape == (2, 4, 3, 3)
    assert lora.to_kohya(KEYMAP)[CONV.kohya + ".lora_up.weight"].shape == (6, 2, 1, 1)


def test_a_linear_layer_saved_as_a_1x1_convolution() -> None:
    up, down = pair(LINEAR)
    tensors = {
        LINEAR.kohya + ".lora_up.weight": up[:, :, None, None],
        LINEAR.kohya + ".lora_down.weight": down[:, :, None, None],
    }
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    torch.testing.assert_close(delta(lora, LINEAR), product(up, down, 1.0, LINEAR))


def test_tucker_form() -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(6, 2, 1, 1, generator=generator)
    mid = torch.randn(2, 2, 3, 3, generator=generator)
    down = torch.randn(2, 4, 1, 1, generator=generator)
    tensors = {
        f"{CONV.kohya}.lora_{n}.weight": t
        for n, t in zip(("up", "mid", "down"), (up, mid, down), strict=True)
    }
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    exact = torch.einsum("mnhw,im,nj->ijhw", mid, up[..., 0, 0], down[..., 0, 0])
    torch.testing.assert_close(delta(lora, CONV), exact)
    assert lora.to_generic().keys() == {
        f"{CONV.path}.{name}"
        for name in ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha")
    }


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_adapters_are_float32_whatever_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in kohya_tensors(LINEAR).items()}
    lora = LoraFile.read(save(tmp_path / "x.safetensors", tensors), KEYMAP)
    assert {p.dtype for p in lora.adapters[LINEAR.path].parameters()} == {torch.float32}


def test_reading_in_inference_mode_gives_tensors_that_can_be_trained(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", kohya_tensors(LINEAR))
    with torch.inference_mode():
        lora = LoraFile.read(path, KEYMAP)
        model = LoraModel(kohya_tensors(LINEAR)).to_file(KEYMAP)
    for file in (lora, model):
        adapter = file.adapters[LINEAR.path]
        adapter.delta(torch.zeros(LINEAR.shape)).sum().backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_parts_that_are_not_connected_are_left_out(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", kohya_tensors(LINEAR, ENCODER))
    unet_only = LoraFile.read(path, keymap_of(LINEAR, CONV))
    assert list(unet_only.adapters) == [LINEAR.path]
    assert unet_only.left_out.keys() == kohya_tensors(ENCODER).keys()
    clip_only = LoraFile.read(path, keymap_of(ENCODER, family="text encoder"))
    assert list(clip_only.adapters) == [TEXT]
    path = save(tmp_path / "te.safetensors", kohya_tensors(ENCODER))
    with pytest.raises(
        LoraFileError, match="the only layer is for the text encoder; connect a CLIP"
    ):
        LoraFile.read(path, keymap_of(LINEAR))


def test_parts_that_are_not_connected_are_saved_all_the_same(tmp_path: Path) -> None:
    """As LORA_MODEL, from a node that had the MODEL alone, and as a file."""
    whole = kohya_tensors(LINEAR, ENCODER) | {f"{ENCODER.kohya}.dora_scale": torch.ones(6)}
    keymap = keymap_of(LINEAR)
    lora = LoraFile.read(save(tmp_path / "x.safetensors", whole), keymap)
    lora.save(tmp_path / "file.safetensors", keymap)
    LoraModel.from_file(lora, keymap).save(tmp_path / "model.safetensors")
    for name in ("file", "model"):
        again = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())


# Saving


def test_saved_files_are_kohyas_and_come_back_equal(tmp_path: Path) -> None:
    lora = LoraFile.from_state_dict(kohya_tensors(LINEAR, CONV, ENCODER), KEYMAP)
    path = tmp_path / "sub" / "cat.safetensors"
    lora.save(path, KEYMAP, metadata={"ss_steps": "5"})
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == kohya_tensors(LINEAR, CONV, ENCODER).keys()
    for name, tensor in kohya_tensors(LINEAR, CONV, ENCODER).items():
        assert torch.equal(tensors[name], tensor) and tensors[name].shape == tensor.shape
    again = LoraFile.read(path, KEYMAP)
    assert again.path == path
    assert again.to_generic().keys() == lora.to_generic().keys()
    assert all(torch.equal(t, again.to_generic()[n]) for n, t in lora.to_generic().items())
    assert (
        again.metadata.items()
        >= {
            "ss_steps": "5",
            "ss_base_model_version": "sd_v1",
            "ss_network_dim": "2",
            "ss_network_alpha": "1.0",
            "modelspec.title": "cat",
        }.items()
    )


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    forward, backward = (LINEAR, CONV, ENCODER), (ENCODER, CONV, LINEAR)
    tensors = kohya_tensors(*forward)
    turned = dict(reversed(tensors.items()))
    for index, (keymap, given) in enumerate([(forward, tensors), (backward, turned)]):
        lora = LoraFile.from_state_dict(given, keymap_of(*keymap), {"b": "1", "a": "2"})
        lora.save(tmp_path / str(index) / "x.safetensors", keymap_of(*keymap))
    assert (tmp_path / "0/x.safetensors").read_bytes() == (
        tmp_path / "1/x.safetensors"
    ).read_bytes()


def test_hashes_of_a_saved_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stale = {"sshs_model_hash": "0", "modelspec.hash_sha256": "0x0"}
    LoraFile.from_state_dict(kohya_tensors(LINEAR), KEYMAP, stale).save(path, KEYMAP)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == "0x" + digest
    assert metadata["sshs_legacy_hash"] == "e3b0c442"  # of nothing: the file is below 1 MiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_a_saved_file(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensors = kohya_tensors(LINEAR, CONV, alpha=0.3)
    LoraFile.from_state_dict(tensors, KEYMAP).save(path, KEYMAP, dtype=dtype)
    for name, tensor in safetensors.torch.load_file(path).items():
        if name.endswith(".alpha"):
            assert tensor.dtype == torch.float32 and tensor.shape == ()
            assert tensor.item() == pytest.approx(0.3, rel=1e-7)
        else:
            assert torch.equal(tensor, tensors[name].to(dtype))


def test_values_too_large_for_a_dtype_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = kohya_tensors(LINEAR)
    tensors[LINEAR.kohya + ".lora_up.weight"] *= 1e6
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    with pytest.raises(LoraFileError, match="1 of them are too large for torch.float16"):
        lora.save(path, KEYMAP, dtype=torch.float16)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]
    lora.save(path, KEYMAP, dtype=torch.bfloat16)


def test_a_failing_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise PermissionError("in use")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(PermissionError):
        LoraFile.from_state_dict(kohya_tensors(LINEAR), KEYMAP).save(path, KEYMAP)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]


def test_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(LoraFileError, match="x.safetensors: there are no tensors to write"):
        LoraModel({}).save(tmp_path / "x.safetensors", format="comfyui")


def test_layers_without_a_name_can_not_be_saved(tmp_path: Path) -> None:
    lora = LoraFile.from_state_dict(kohya_tensors(LINEAR, CONV), KEYMAP)
    with pytest.raises(LoraFileError, match="1 layer is not in the model: " + CONV.path):
        lora.save(tmp_path / "x.safetensors", keymap_of(LINEAR))
    assert os.listdir(tmp_path) == []


# The cache


def test_a_file_rewritten_under_the_same_name_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for alpha in (1.0, 2.0, 1.0):
        LoraFile.from_state_dict(kohya_tensors(LINEAR, alpha=alpha), KEYMAP).save(path, KEYMAP)
        assert LoraFile.read(path, KEYMAP).adapters[LINEAR.path].alpha == alpha


def test_changing_what_was_read_does_not_change_the_cache(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", kohya_tensors(LINEAR, CONV))
    first = LoraFile.read(path, KEYMAP)
    before = first.to_generic()
    with torch.no_grad():
        for adapter in first.adapters.values():
            for parameter in adapter.parameters():
                parameter.zero_()
    first.metadata["new"] = "1"
    again = LoraFile.read(path, KEYMAP)
    assert all(torch.equal(t, again.to_generic()[n]) for n, t in before.items())
    assert "new" not in again.metadata


# What bad input gets


def sdxl_tensors() -> dict[str, Tensor]:
    tensors = {}
    for index in range(264):
        name = f"lora_unet_input_blocks_7_1_transformer_blocks_{index}_attn2_to_k"
        tensors[name + ".lora_up.weight"] = torch.zeros(2, 1)
        tensors[name + ".lora_down.weight"] = torch.zeros(1, 2048)
    return tensors


def test_a_lora_of_another_base_model(tmp_path: Path) -> None:
    path = save(tmp_path / "xl.safetensors", sdxl_tensors())
    with pytest.raises(LoraFileError) as caught:
        LoraFile.read(path, KEYMAP)
    assert "xl.safetensors" in str(caught.value)
    assert caught.value.problems[0] == (
        "0 of 264 layers match: the file looks like SDXL, the model is SD1.5"
    )
    assert "264 layers are not in the model (SD1.5): lora_unet_input_blocks_7_1" in str(
        caught.value
    )
    with pytest.raises(LoraFileError):  # nothing at all is no success, strict or not
        LoraFile.read(path, KEYMAP, strict=False)


def test_equal_names_of_another_base_model_are_told_by_their_shapes() -> None:
    tensors = {
        LINEAR.kohya + ".lora_up.weight": torch.zeros(8, 2),
        LINEAR.kohya + ".lora_down.weight": torch.zeros(2, 1024),
    }
    with pytest.raises(LoraFileError) as caught:
        LoraFile.from_state_dict(tensors, KEYMAP)
    first, second = caught.value.problems
    assert first == "0 of 1 layers match: the file looks like SD2, the model is SD1.5"
    assert second.startswith(f"{LINEAR.path} ({LINEAR.kohya}): lora_down.weight is (2, 1024)")


def test_all_problems_in_one_error() -> None:
    tensors = kohya_tensors(LINEAR, CONV, ENCODER)
    tensors["lora_unet_elsewhere.lora_up.weight"] = torch.zeros(2, 2)
    tensors["lora_unet_elsewhere.lora_down.weight"] = torch.zeros(2, 2)
    tensors["weird"] = torch.zeros(1)
    tensors[f"transformer.{DIFFUSERS}attn1.to_q.lora_A.weight"] = torch.zeros(2, 4)
    tensors[f"transformer.{DIFFUSERS}attn1.to_q.lora_B.weight"] = torch.zeros(4, 2)
    tensors[LINEAR.path + ".lora_up.weight"] = torch.zeros(8, 2)  # the layer again
    del tensors[CONV.kohya + ".lora_down.weight"]
    tensors[ENCODER.kohya + ".lora_up.weight"][0, 0] = float("nan")
    tensors[KOHYA + "attn1_qkv.lora_up.weight"] = torch.zeros(12, 3)
    tensors[KOHYA + "attn1_qkv.lora_down.weight"] = torch.zeros(2, 4)
    with pytest.raises(LoraFileError) as caught:
        LoraFile.from_state_dict(tensors, KEYMAP, source="mixed.safetensors")
    text = str(caught.value)
    for expected in (
        "mixed.safetensors:\n- ",
        f"{FUSED.path} is there twice: transformer.{DIFFUSERS}attn1.to_q, {FUSED.kohya}",
        "1 layer is not in the model (SD1.5): lora_unet_elsewhere",
        "1 tensor has names of no known kind: weird",
        f"{LINEAR.path} is there twice: {LINEAR.kohya}, {LINEAR.path}",
        f"{CONV.path} ({CONV.kohya}): lora_down.weight is missing; there is only alpha, lora_up",
        f"{TEXT} ({ENCODER.kohya}): lora_up.weight has 1 of 10 values that are not finite",
    ):
        assert expected in text
    assert len(caught.value.problems) == 6


def test_without_strict_what_matches_is_loaded_and_the_rest_told() -> None:
    tensors = kohya_tensors(LINEAR, CONV)
    tensors["lora_unet_elsewhere.lora_up.weight"] = torch.zeros(2, 2)
    del tensors[CONV.kohya + ".lora_down.weight"]
    lora = LoraFile.from_state_dict(tensors, KEYMAP, strict=False)
    assert list(lora.adapters) == [LINEAR.path]
    assert len(lora.problems) == 2
    assert LoraFile.from_state_dict(kohya_tensors(LINEAR), KEYMAP).problems == ()


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "another layer": ({"lora_unet_z.lora_up.weight": torch.ones(2, 1)}, "is not in the model"),
    "a name of no kind": ({"weird": torch.ones(1)}, "names of no known kind"),
    "half a pair": ({f"{CONV.kohya}.lora_up.weight": torch.ones(6, 1)}, "is missing"),
    "a shape": ({f"{CONV.kohya}.diff": torch.ones(2, 2)}, "expected (6, 4, 3, 3)"),
    "a number": ({f"{CONV.kohya}.diff": torch.full((6, 4, 3, 3), torch.nan)}, "not finite"),
    "a bias that is not there": ({f"{FUSED.kohya}.diff_b": torch.ones(12)}, "changes a bias"),
    "a layer's tensor of no kind": (
        {
            f"{CONV.kohya}.lora_up.weight": torch.ones(6, 1),
            f"{CONV.kohya}.lora_down.weight": torch.ones(1, 36),
            f"{CONV.kohya}.lora_diag": torch.ones(1),
        },
        "names of no known kind",
    ),
    "a foreign type": ({f"{CONV.kohya}.boft_R": torch.ones(2, 3)}, "can't be read here"),
    "another weight": ({f"{CONV.kohya}.set_weight": torch.ones(6)}, "expected (6, 4, 3, 3)"),
    "another shape": ({f"{CONV.kohya}.reshape_weight": torch.tensor([6, 8])}, "a layer of (6, 8)"),
    "the layer again": ({f"{LINEAR.path}.diff": torch.ones(8, 768)}, "is there twice"),
    "another spelling": (
        {f"{LINEAR.kohya}.lora_B.weight": torch.ones(8, 2)},
        "in another spelling",
    ),
}


@pytest.mark.parametrize("added, problem", BROKEN.values(), ids=BROKEN.keys())
def test_without_strict_one_broken_thing_leaves_the_rest(
    added: dict[str, Tensor], problem: str
) -> None:
    tensors = {**kohya_tensors(LINEAR, ENCODER), **added}
    with pytest.raises(LoraFileError) as caught:
        LoraFile.from_state_dict(tensors, KEYMAP)
    lora = LoraFile.from_state_dict(tensors, KEYMAP, strict=False)
    assert lora.problems == caught.value.problems
    assert len(lora.problems) == 1 and problem in lora.problems[0]
    assert lora.adapters.keys() == {LINEAR.path, ENCODER.path}
    torch.testing.assert_close(delta(lora, LINEAR), product(*pair(LINEAR), 0.5, LINEAR))


KINDS = {  # not read: (names, what is said, whether they belong to the layer's other tensors)
    "OFT of an old PEFT": (["{}.oft_r"], "1 tensor looks like the type OFT or BOFT of PEFT", True),
    "BOFT of PEFT": (
        ["{}.boft_R", "{}.boft_s"],
        "2 tensors look like the type OFT or BOFT of PEFT",
        True,
    ),
    "embedding": (["{}.lora_embedding_A"], "1 tensor changes an embedding, and no layer", False),
    "old LyCORIS": (
        ["{}.bias_indices", "{}.bias_values", "{}.bias_size"],
        "3 tensors change single weights, too, as old LyCORIS files do",
        True,
    ),
    "ControlLoRA": (
        ["lora_controlnet", "input_blocks.0.0.up", "input_blocks.0.0.down"],
        "3 tensors are a ControlLoRA's, which is a ControlNet and no LoRA",
        False,
    ),
    "cloneofsimo": (
        ["unet:0:up", "unet:0:down"],
        "2 tensors number the layers, as cloneofsimo's lora",
        False,
    ),
}


@pytest.mark.parametrize("names, why, belong", KINDS.values(), ids=KINDS)
def test_forms_that_are_not_read_are_named(names: list[str], why: str, belong: bool) -> None:
    others = {name.format(LINEAR.kohya): torch.zeros(8, 1) for name in names}
    with pytest.raises(LoraFileError, match=f"^alone: {why}"):
        LoraFile.from_state_dict(others, KEYMAP, source="alone")
    tensors = {**kohya_tensors(LINEAR, CONV), **others}
    with pytest.raises(LoraFileError) as caught:
        LoraFile.from_state_dict(tensors, KEYMAP)
    (problem,) = caught.value.problems
    assert problem.startswith(why) and problem.endswith(", ".join(others))
    lora = LoraFile.from_state_dict(tensors, KEYMAP, strict=False)
    # What another type has for a layer belongs together; an embedding is a layer of its own.
    assert (LINEAR.path in lora.adapters) == (not belong) and CONV.path in lora.adapters


# Replaced weights and shapes


def test_a_replaced_weight_is_the_one_in_the_file(tmp_path: Path) -> None:
    value, base = torch.randn(8, 768), torch.randn(8, 768)
    norm = torch.randn(4)
    tensors = {f"{LINEAR.kohya}.set_weight": value, f"{NORM.kohya}.set_weight": norm}
    lora = LoraFile.from_state_dict({**tensors, **kohya_tensors(CONV)}, KEYMAP)
    assert_close(base + lora.adapters[LINEAR.path].delta(base), value)
    assert lora.adapters.keys() == {LINEAR.path, NORM.path, CONV.path}
    lora.save(tmp_path / "x.safetensors", KEYMAP)
    saved = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_a_replaced_weight_goes_alone() -> None:
    both = {**kohya_tensors(LINEAR, CONV), f"{LINEAR.kohya}.set_weight": torch.ones(8, 768)}
    with pytest.raises(LoraFileError, match="lora_up.weight does not go with set_weight"):
        LoraFile.from_state_dict(both, KEYMAP)
    part = {f"{next(iter(FUSED.slices))}.set_weight": torch.ones(4, 4)}
    change = LoraFile.from_state_dict(part, KEYMAP).adapters[FUSED.path].delta(torch.zeros(12, 4))
    assert (change[:4] == 1).all() and not change[4:].any()


def test_the_shape_that_a_layer_has_anyway_is_left_out() -> None:
    shape = {f"{LINEAR.kohya}.reshape_weight": torch.tensor([8, 768])}
    lora = LoraFile.from_state_dict({**kohya_tensors(LINEAR), **shape}, KEYMAP)
    assert_close(delta(lora, LINEAR), product(*pair(LINEAR), 0.5, LINEAR))
    alone = LoraFile.from_state_dict({**kohya_tensors(CONV), **shape}, KEYMAP)
    assert alone.adapters.keys() == {CONV.path}


# Other tensors than pairs


def test_every_registered_type_is_read(tmp_path: Path) -> None:
    for name, kind in ADAPTERS.items():
        adapter = kind.create(LINEAR.shape, 2, 3.0, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        tensors = {f"{LINEAR.kohya}.{key}": t for key, t in adapter.tensors().items()}
        lora = LoraFile.from_state_dict(tensors, KEYMAP)
        assert lora.adapters[LINEAR.path].name == name
        lora.save(tmp_path / f"{name}.safetensors", KEYMAP)
        again = LoraFile.read(tmp_path / f"{name}.safetensors", KEYMAP)
        assert again.to_kohya(KEYMAP).keys() == tensors.keys()
        for key, tensor in again.to_kohya(KEYMAP).items():
            assert torch.equal(tensor, tensors[key])


MAGNITUDES = [
    *("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    *("lora_magnitude_vector.default", "lora_magnitude_vector.default.weight"),
]


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("ending", ["dora_scale", *MAGNITUDES])
def test_magnitudes_in_every_spelling(layer: LayerKey, ending: str) -> None:
    """PEFT has them as (O,) of a Linear and as (1, O, 1, 1) of a Conv2d, always of the rows."""
    out, ones = layer.shape[0], [1] * (len(layer.shape) - 2)
    scale = torch.linspace(0.5, 1.5, out)
    shape = [out, 1, *ones] if ending == "dora_scale" else [1, out, *ones] if ones else [out]
    tensors = kohya_tensors(layer) | {f"{layer.kohya}.{ending}": scale.reshape(shape)}
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(9))
    pair_delta = product(*pair(layer), 0.5, layer)
    changed = (weight + pair_delta).flatten(1)
    exact = scale[:, None] * changed / changed.norm(dim=1, keepdim=True)
    found = lora.adapters[layer.path].delta(weight) + weight
    torch.testing.assert_close(found.flatten(1).detach(), exact)
    name = f"{layer.kohya}.dora_scale"
    assert lora.to_kohya(KEYMAP)[name].shape == (out, 1, *ones)


def test_changes_of_norms_and_biases() -> None:
    diff, diff_b = torch.arange(4.0), torch.arange(6.0)
    for weight, bias in (("diff", "diff_b"), ("w_norm", "b_norm")):
        tensors = {
            f"{NORM.kohya}.{weight}": diff,
            f"{NORM.kohya}.{bias}": diff + 1,
            f"{CONV.kohya}.diff_b": diff_b,
            **kohya_tensors(CONV),
        }
        lora = LoraFile.from_state_dict(tensors, KEYMAP)
        paths = {NORM.path, NORM.path + ".bias", CONV.path, CONV.path + ".bias"}
        assert lora.adapters.keys() == paths
        changes = {path: a.delta(torch.zeros(a.shape)) for path, a in lora.adapters.items()}
        assert torch.equal(changes[NORM.path], diff)
        assert torch.equal(changes[NORM.path + ".bias"], diff + 1)
        assert torch.equal(changes[CONV.path + ".bias"], diff_b)
        generic = lora.to_generic()
        assert torch.equal(generic[NORM.path + ".diff_b"], diff + 1)
        for named in (generic, lora.to_kohya(KEYMAP)):
            again = LoraFile.from_state_dict(named, KEYMAP)
            assert again.adapters.keys() == paths
            assert all(torch.equal(t, generic[n]) for n, t in again.to_generic().items())


@pytest.mark.parametrize("ending", ["lora_B.bias", "lora_up.bias", "lora_B.default.bias"])
def test_the_bias_of_an_up_is_scaled_as_the_lora(ending: str) -> None:
    tensors = kohya_tensors(LINEAR, alpha=1.0) | {f"{LINEAR.kohya}.{ending}": torch.ones(8)}
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    bias = lora.adapters[LINEAR.path + ".bias"]
    assert torch.equal(bias.delta(torch.zeros(8)).detach(), torch.full((8,), 0.5))


@pytest.mark.parametrize(
    "added, message",
    [
        ({f"{FUSED.kohya}.diff_b": torch.zeros(12)}, "changes a bias, which the layer does not"),
        ({f"{LINEAR.kohya}.diff_b": torch.zeros(7)}, r"diff_b is \(7,\), expected \(8,\)"),
        ({f"{CONV.kohya}.lora_B.bias": torch.zeros(6)}, "lora_up.bias does not go without a LoRA"),
        ({f"{LINEAR.kohya}.hada_w1_a": torch.zeros(8, 2)}, "hada_w1_a does not go with the type"),
        ({f"{LINEAR.kohya}.lora_A.weight": torch.zeros(2, 768)}, "in another spelling, too"),
        ({"some.weight": torch.zeros(2, 768)}, "names of no known kind: some.weight"),
    ],
)
def test_tensors_that_do_not_go_together(added: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoraFileError, match=message):
        LoraFile.from_state_dict({**kohya_tensors(LINEAR), **added}, KEYMAP)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(8, 2, dtype=torch.int32), "lora_up.weight is torch.int32, expected floating"),
        (torch.zeros(8, 0), r"lora_up.weight is empty: \(8, 0\)"),
        (torch.full((8, 2), float("inf")), "16 of 16 values that are not finite"),
        (torch.zeros(9, 2), r"lora_up.weight is \(9, 2\), expected \(8, 2\)"),
        (torch.zeros(()), r"lora_up.weight is \(\), expected \(8, 2\)"),
    ],
)
def test_tensors_that_fit_no_layer(tensor: Tensor, message: str) -> None:
    tensors = {**kohya_tensors(LINEAR), LINEAR.kohya + ".lora_up.weight": tensor}
    with pytest.raises(LoraFileError, match=message):
        LoraFile.from_state_dict(tensors, KEYMAP)


def _of_size(kind: str, size: float) -> dict[str, Tensor]:
    """A change of LINEAR of the type, whose factors are all `size`."""
    shapes = {
        "lora": {"lora_up.weight": (8, 2), "lora_down.weight": (2, 768)},
        "loha": {
            **{"hada_w1_a": (8, 2), "hada_w1_b": (2, 768)},
            **{"hada_w2_a": (8, 2), "hada_w2_b": (2, 768)},
        },
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 384)},
        "glora": {
            **{"a1.weight": (768, 2), "a2.weight": (2, 768)},
            **{"b1.weight": (8, 2), "b2.weight": (2, 768)},
        },
        "full": {"diff": (8, 768)},
    }
    named = {name: torch.full(shape, size) for name, shape in shapes[kind].items()}
    if kind == "glora":
        named["a2.weight"].zero_()  # as they start; the other pair alone is too large
    return {f"{LINEAR.kohya}.{name}": tensor for name, tensor in named.items()}


@pytest.mark.parametrize(
    "kind, size", [("lora", 1e30), ("loha", 1e12), ("lokr", 1e16), ("glora", 1e30)]
)
def test_products_beyond_float32_are_refused(kind: str, size: float) -> None:
    tensors = {**kohya_tensors(CONV), **_of_size(kind, size)}
    with pytest.raises(LoraFileError, match="its numbers are too large for float32"):
        LoraFile.from_state_dict(tensors, KEYMAP)
    lora = LoraFile.from_state_dict(tensors, KEYMAP, strict=False)
    assert lora.adapters.keys() == {CONV.path}


@pytest.mark.parametrize(
    "kind, size", [("lora", 1e18), ("loha", 1e8), ("lokr", 1e11), ("full", 1e38)]
)
def test_large_changes_that_float32_holds_are_read(kind: str, size: float) -> None:
    lora = LoraFile.from_state_dict(_of_size(kind, size), KEYMAP)
    assert lora.adapters[LINEAR.path].delta(torch.zeros(8, 768)).isfinite().all()


@pytest.mark.parametrize(
    "alpha", [torch.tensor(torch.inf).half(), torch.tensor(1e10), torch.tensor(3e38)]
)
def test_the_alpha_of_a_lokr_of_whole_blocks_may_be_anything(tmp_path: Path, alpha: Tensor) -> None:
    """LyCORIS writes its lora_dim there, 100000 for whole blocks, which float16 has not."""
    w1, w2 = torch.randn(2, 2), torch.randn(4, 384)
    module = LINEAR.kohya
    tensors = {f"{module}.lokr_w1": w1, f"{module}.lokr_w2": w2, f"{module}.alpha": alpha}
    lora = LoraFile.from_state_dict(tensors, KEYMAP)
    lora.save(tmp_path / "x.safetensors", KEYMAP)
    for file in (lora, LoraFile.read(tmp_path / "x.safetensors", KEYMAP)):
        assert_close(delta(file, LINEAR), torch.kron(w1, w2))
        alpha = file.adapters[LINEAR.path].tensors()["alpha"]
        assert alpha.isfinite() and alpha > 0


@pytest.mark.parametrize("alpha", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_an_alpha_that_counts_must_be_finite(kind: str, alpha: float) -> None:
    tensors = {**_of_size(kind, 1.0), f"{LINEAR.kohya}.alpha": torch.tensor(alpha)}
    with pytest.raises(LoraFileError, match="alpha has 1 of 1 values that are not finite"):
        LoraFile.from_state_dict(tensors, KEYMAP)


def test_a_whole_model_is_refused_before_it_is_read(tmp_path: Path) -> None:
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}
    path = save(tmp_path / "model.safetensors", weights)
    with pytest.raises(LoraFileError, match="model.safetensors: it is not a LoRA: none of its 1"):
        LoraFile.read(path, KEYMAP)
    path = save(tmp_path / "none.safetensors", {})
    with pytest.raises(LoraFileError, match="it has no tensors"):
        LoraFile.read(path, KEYMAP)


def test_long_lists_are_cut_but_kept_in_the_error() -> None:
    layers = [LayerKey(f"diffusion_model.{i}.x", (2, 2), f"lora_unet_{i}_x") for i in range(50)]
    tensors = {f"{layer.kohya}.lora_up.weight": torch.zeros(2, 1) for layer in layers}
    with pytest.raises(LoraFileError, match="- and 30 more$") as caught:
        LoraFile.from_state_dict(tensors, keymap_of(*layers, family="Flux"))
    assert len(caught.value.problems) == 50


# Names and families


def test_ambiguous_names_are_an_error_of_the_map() -> None:
    with pytest.raises(ValueError, match="'same' means both 'a' and 'b'"):
        keymap_of(LayerKey("a", (1,), "same"), LayerKey("b", (1,), "other", ("same",)))
    with pytest.raises(ValueError, match="'c' holds the layer 'a'"):
        KeyMap("SDXL", {"c": LayerKey("a", (1,), "x")})


def test_family_labels() -> None:
    spellings = ["sd15", "SD1.5", "SDXL", "QwenImage", "WAN21", "Flux", "zimage", "AuraFlow"]
    assert [family_label(spelling) for spelling in spellings] == [
        *("SD1.5", "SD1.5", "SDXL", "Qwen-Image", "Wan", "Flux", "Z-Image", "AuraFlow")
    ]
    assert keymap_of(LINEAR, family="sdxl").label == "SDXL"


@pytest.mark.parametrize(
    "name, part",
    [
        ("lora_te_text_model", "text encoder"),
        ("lora_te2_text_model", "text encoder"),
        ("lora_text_encoders_t5xxl_x", "text encoder"),
        ("text_encoders.clip_l.x", "text encoder"),
        ("text_encoder_2.x", "text encoder"),
        ("te1.text_model.x", "text encoder"),
        ("lora_unet_x", "model"),
        ("lora_tensor_x", "model"),
        ("diffusion_model.text_encoder.x", "model"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


# LORA_MODEL


def core_result() -> dict[str, Tensor]:
    """What core's TrainLoraNode gives: flat factors, alpha 1, and changes of norms and biases."""
    generator = torch.Generator().manual_seed(0)
    norm = "diffusion_model.input_blocks.1.0.in_layers.0"
    return {
        f"{CONV.path}.lora_up.weight": torch.randn(6, 2, generator=generator).bfloat16(),
        f"{CONV.path}.lora_down.weight": torch.randn(2, 36, generator=generator).bfloat16(),
        f"{CONV.path}.alpha": torch.tensor(1.0).bfloat16(),
        f"{CONV.path}.diff_b": torch.randn(6, generator=generator).bfloat16(),
        f"{LINEAR.path}.lora_up.weight": torch.randn(8, 2, generator=generator).bfloat16(),
        f"{LINEAR.path}.lora_down.weight": torch.randn(2, 768, generator=generator).bfloat16(),
        f"{LINEAR.path}.alpha": torch.tensor(1.0).bfloat16(),
        f"{norm}.diff": torch.randn(4, generator=generator).bfloat16(),
        f"{norm}.diff_b": torch.randn(4, generator=generator).bfloat16(),
    }


def test_a_lora_model_is_a_dict_with_info(tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.safetensors", kohya_tensors(LINEAR), **{"modelspec.trigger_phrase": "cat"}
    )
    lora = LoraFile.read(path, KEYMAP)
    model = LoraModel.from_file(lora, KEYMAP)
    assert isinstance(model, dict) and model.keys() == lora.to_generic().keys()
    assert model.info.trigger_words == "cat"
    assert (model.info.family, model.info.provenance) == ("SD1.5", "x.safetensors")
    back = model.to_file(KEYMAP)
    assert all(torch.equal(t, back.to_generic()[n]) for n, t in model.items())
    assert back.metadata == lora.metadata
    assert LoraModel.of(model) is model
    assert LoraModel.of({"a": torch.zeros(1)}).info == LoraInfo()


def test_cores_result_is_saved_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    LoraModel.of(core_result()).save(path, format="comfyui", metadata={"ss_training_comment": "hi"})
    saved = safetensors.torch.load_file(path)
    assert saved.keys() == core_result().keys()
    for name, tensor in core_result().items():
        assert torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_training_comment"] == "hi" and len(metadata["sshs_model_hash"]) == 64
    LoraModel.of(core_result()).save(path, format="comfyui", dtype=torch.float16)
    saved = safetensors.torch.load_file(path)
    assert {t.dtype for n, t in saved.items() if not n.endswith("alpha")} == {torch.float16}


def test_cores_result_under_kohyas_names(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = LoraModel(core_result(), LoraInfo(keymap=KEYMAP))
    model.save(path, format="kohya", dtype=torch.float32)
    saved = safetensors.torch.load_file(path)
    pairs = {name for name in kohya_tensors(CONV, LINEAR)}
    norm = {NORM.kohya + ".w_norm", NORM.kohya + ".b_norm"}
    assert saved.keys() == pairs | norm | {CONV.kohya + ".diff_b"}
    assert saved[CONV.kohya + ".lora_down.weight"].shape == (2, 4, 3, 3)
    assert torch.equal(
        saved[NORM.kohya + ".w_norm"],
        core_result()["diffusion_model.input_blocks.1.0.in_layers.0.diff"].float(),
    )
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"


def test_kohyas_names_that_are_not_known_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(LoraFileError, match="kohya's names for its 9 tensors are not known"):
        LoraModel.of(core_result()).save(path, format="kohya")
    tensors = core_result() | {
        "text_encoders.clip_l.final_norm.diff": torch.zeros(3),
        "odd": torch.zeros(1),
        f"{ENCODER.path}.lora_up.weight": torch.zeros(5, 1),
        f"{ENCODER.path}.lora_down.weight": torch.zeros(1, 5),
    }
    model = LoraModel(tensors, LoraInfo(keymap=keymap_of(LINEAR, CONV)))
    with pytest.raises(LoraFileError) as caught:
        model.save(path, format="kohya")
    left_out, stranger, misfit, nameless = caught.value.problems
    assert left_out.startswith(
        "3 tensors are for the text encoder, which was not connected, and can't be renamed:"
        f" text_encoders.clip_l.final_norm.diff, {TEXT}.lora_up.weight, {TEXT}.lora_down.weight;"
    )
    assert stranger == "1 layer is not in the model (SD1.5): text_encoders.clip_l.final_norm"
    assert misfit.startswith(f"{TEXT}: lora_up.weight is (5, 1), expected (768, 1)")
    assert nameless == (
        "1 tensor has no name in kohya's format: odd; the format comfyui keeps their names"
    )
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="unknown LoRA format 'a1111'; known: kohya, comfyui, dif"):
        model.save(path, format="a1111")  # type: ignore[arg-type]


def test_types_that_are_not_registered_keep_their_tensors_under_kohyas_names(
    tmp_path: Path,
) -> None:
    tensors = {
        **LoraFile.from_state_dict(kohya_tensors(LINEAR), KEYMAP).to_generic(),
        f"{LINEAR.path}.dora_scale": torch.ones(8, 1),
        f"{CONV.path}.lokr_w1": torch.ones(2, 2),
        f"{CONV.path}.lokr_w2": torch.ones(3, 2, 3, 3),
        f"{CONV.path}.alpha": torch.tensor(4.0),
    }
    path = tmp_path / "x.safetensors"
    LoraModel(tensors, LoraInfo(keymap=KEYMAP)).save(path)
    names = {LINEAR.path: LINEAR.kohya, CONV.path: CONV.kohya}
    saved = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        module = next(module for module in names if name.startswith(module))
        assert torch.equal(saved[names[module] + name.removeprefix(module)], tensor)
    assert len(saved) == len(tensors)


def test_a_saved_lora_model_comes_back(tmp_path: Path) -> None:
    lora = LoraFile.from_state_dict(kohya_tensors(LINEAR, CONV, ENCODER), KEYMAP)
    model = LoraModel.from_file(lora, KEYMAP)
    for format in ("kohya", "comfyui"):
        path = tmp_path / f"{format}.safetensors"
        model.save(path, format=format)
        again = LoraFile.read(path, KEYMAP).to_generic()
        assert again.keys() == model.keys()
        assert all(torch.equal(t, again[n]) for n, t in model.items())
