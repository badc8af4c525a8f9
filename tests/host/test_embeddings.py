"""Changes of embeddings, which the host takes by its own names of them."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.host.apply import Entry, apply
from lora_weave.lora_core.host.live import apply_live
from lora_weave.lora_core.host.models import key_map
from lora_weave.lora_core.lora_file import LoraFile, LoraFileError

from ..core.tolerances import assert_close
from .text_encoders import TARGETS, build_clip


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


def tensors_of(clip, ending: str = "") -> dict[str, Tensor]:
    """A pair for each embedding whose path ends so, in the host's generic form."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, layer in key_map(None, clip).embeddings.items():
        if path.endswith(ending):
            rows, width = layer.shape
            tensors[f"{path}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
            tensors[f"{path}.lora_down.weight"] = torch.randn(2, width, generator=generator)
            tensors[f"{path}.alpha"] = torch.tensor(0.5)
    return tensors


def loaded(clip) -> tuple[Tensor, dict[str, Tensor]]:
    """What a text is encoded to, and copies of the embeddings as they are for it."""
    tokens = clip.tokenize("a red cat on a mat")
    out = clip.encode_from_tokens(tokens, return_pooled=True)
    tables = {
        name: module.weight.clone()
        for name, module in clip.patcher.model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return torch.cat([one.flatten() for one in out]), tables


@pytest.mark.parametrize("name", TARGETS)
def test_names_are_those_that_the_host_reads(name, caplog):
    clip = build_clip(name)
    keymap, theirs = key_map(None, clip), comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    root = clip.cond_stage_model
    tables = {n: m for n, m in root.named_modules() if isinstance(m, nn.Embedding)}
    assert {path.removeprefix("text_encoders.") for path in keymap.embeddings} == tables.keys()
    for path, layer in keymap.embeddings.items():
        key = path.removeprefix("text_encoders.") + ".weight"
        assert layer.shape == tuple(root.get_parameter(key).shape)
        assert {path, layer.kohya, *layer.aliases} == {n for n, k in theirs.items() if k == key}
    lora = LoraFile.from_state_dict(tensors_of(clip), keymap)
    assert lora.adapters.keys() == keymap.embeddings.keys()
    loaded = comfy.lora.load_lora(lora.to_kohya(keymap), theirs)
    assert len(loaded) == len(tables) and not caplog.records


@pytest.mark.parametrize("name", ["SD1", "SDXL", "Flux"])  # SD3 joins encoders of its own widths
@pytest.mark.parametrize("ending", ["token_embedding", "position_embedding", ""])
def test_they_do_what_the_host_makes_of_them(name, ending):
    clip = build_clip(name)
    tensors = tensors_of(clip, ending)
    lora = LoraFile.from_state_dict(tensors, key_map(None, clip))
    _, ours = apply(None, clip, [Entry(lora.adapters, 1.0, 0.7)])
    _, theirs = comfy.sd.load_lora_for_models(None, clip, dict(tensors), 1.0, 0.7)
    plain, before = loaded(clip)
    found, tables = loaded(ours)
    wanted, their_tables = loaded(theirs)
    assert min((out - plain).norm() for out in (found, wanted)) > 1e-3 * plain.norm()
    changed = {name for name, table in before.items() if not torch.equal(tables[name], table)}
    assert changed == {name for name in before if name.endswith(ending)} != set()
    for name, table in their_tables.items():
        assert_close(tables[name], table)
    assert torch.equal(loaded(clip)[0], plain)


def test_live_refuses_them():
    """CLIP adds its position embeddings by themselves, so that a change beside them were lost."""
    clip = build_clip("SD1")
    lora = LoraFile.from_state_dict(tensors_of(clip, "position_embedding"), key_map(None, clip))
    with pytest.raises(ValueError, match=r"live can't change embeddings.*: .*position_embedding"):
        apply_live(None, clip, [Entry(lora.adapters, 1.0, 1.0)])


def test_diffusers_files_can_not_hold_them(tmp_path):
    """PEFT calls a pair of an embedding lora_embedding_A and B, and turns both."""
    clip = build_clip("SD1")
    keymap = key_map(None, clip)
    lora = LoraFile.from_state_dict(tensors_of(clip), keymap)
    with pytest.raises(LoraFileError, match="token_embedding: diffusers' name for it is not known"):
        lora.save(tmp_path / "x.safetensors", keymap, format="diffusers")
