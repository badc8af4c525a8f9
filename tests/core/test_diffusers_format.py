"""Files that are written here: exact when read again, and equal in PEFT, diffusers and LyCORIS."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, Bias
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.key_map import KeyMap, LayerKey
from lora_weave.lora_core.lora_file import LoraFile, LoraFileError
from lora_weave.lora_core.lora_model import LoraInfo, LoraModel
from lora_weave.lora_core.lora_naming import FORMATS
from lora_weave.lora_core.peft_config import CONFIG, METADATA, WEIGHTS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 4)
        self.to_k = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(4, 6)


def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


MODULES = {n: m for n, m in net().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def layer_key(name: str, module: nn.Module) -> LayerKey:
    diffusers, kohya = f"unet.{name}", "lycoris_" + name.replace(".", "_")
    shape = tuple(module.weight.shape)
    aliases = (diffusers, f"base_model.model.{name}")
    return LayerKey(f"diffusion_model.{name}", shape, kohya, aliases, diffusers=(diffusers,))


PLAIN = {key.path: key for key in (layer_key(name, module) for name, module in MODULES.items())}
ROWS = {
    f"unet.attn.to_{word}": rows
    for word, rows in zip("qkv", [(0, 0, 8), (0, 8, 4), (0, 12, 8)], strict=True)
}
FUSED = LayerKey(
    "diffusion_model.attn.qkv", (20, 6), "lycoris_qkv", slices=ROWS, diffusers=tuple(ROWS)
)
TURNED = LayerKey(
    "diffusion_model.last",
    (8, 6),
    "lycoris_last",
    swapped=("unet.norm_out.linear",),
    diffusers=("unet.norm_out.linear",),
)
TEXT = LayerKey(
    "text_encoders.clip_l.transformer.q",
    (6, 6),
    "lora_te_q",
    ("text_encoder.q",),
    diffusers=("text_encoder.q",),
)
NORM = LayerKey(
    "diffusion_model.norm", (4,), "lycoris_norm", ("unet.norm",), diffusers=("unet.norm",)
)
KEYMAP = KeyMap(
    "SD1.5",
    {**PLAIN, **{key.path: key for key in (FUSED, TURNED, TEXT)}},
    {NORM.path: NORM},
    frozenset({*PLAIN, NORM.path}),
)


def filled(
    kind: str,
    shape: tuple[int, ...],
    seed: int,
    *,
    alpha: float = 1.0,
    rank: int = 2,
    **options: Any,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    made = ADAPTERS[kind].create(
        shape, rank, alpha, options=CreateOptions(**options), generator=generator
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def loras(keys: Any, *, magnitude: bool = False) -> dict[str, Adapter]:
    """LoRAs of several ranks, with alphas that no short fraction of the rank is."""
    adapters = {}
    for seed, key in enumerate(keys):
        lora = filled("lora", key.shape, seed, alpha=0.3 + seed % 3, rank=1 + seed % 2)
        assert isinstance(lora, LoRA)
        if magnitude:
            lora.decompose(torch.randn(key.shape, generator=torch.Generator().manual_seed(seed)))
        adapters[key.path] = lora
    return adapters


def delta(adapter: Adapter, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return adapter.delta(weight)


def assert_same(again: LoraFile, adapters: dict[str, Adapter]) -> None:
    assert again.adapters.keys() == adapters.keys()
    for path, adapter in adapters.items():
        found, expected = again.adapters[path].tensors(), adapter.tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Round trips


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_round_trips_are_exact(tmp_path: Path, format: Any, magnitude: bool) -> None:
    adapters = loras(KEYMAP.layers.values(), magnitude=magnitude)
    path = tmp_path / "x.safetensors"
    LoraFile(adapters).save(path, KEYMAP, format=format)
    assert_same(LoraFile.read(path, KEYMAP), adapters)
    model = LoraModel.from_file(LoraFile.read(path, KEYMAP), KEYMAP)
    model.save(tmp_path / "y.safetensors", format=format)
    assert_same(LoraFile.read(tmp_path / "y.safetensors", KEYMAP), adapters)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "boft"])
def test_round_trips_of_fused_layers(tmp_path: Path, format: Any, kind: str) -> None:
    """Cut into q, k and v for diffusers, in their own type, and swapped there."""
    adapters = {key.path: filled(kind, key.shape, 1, alpha=0.75) for key in (FUSED, TURNED)}
    if kind == "lokr":  # blocks of 4 rows, where our own rule makes them of 5
        tensors = {"lokr_w1": torch.randn(5, 2), "lokr_w2": torch.randn(4, 3)}
        adapters[FUSED.path] = ADAPTERS[kind].from_tensors(tensors, FUSED.shape)
    path = tmp_path / "x.safetensors"
    LoraFile(adapters).save(path, KEYMAP, format=format)
    assert_same(LoraFile.read(path, KEYMAP), adapters)
    if format == "diffusers":
        assert all(name.startswith((*ROWS, TURNED.diffusers[0])) for name in _keys(path))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_round_trips_of_other_types(tmp_path: Path, format: Any, kind: str) -> None:
    """Each under its own tensor names, and changes of norms and biases beside it."""
    adapters = {key.path: filled(kind, key.shape, 1, alpha=0.3) for key in PLAIN.values()}
    ones = torch.ones(4)
    adapters[NORM.path] = Full.from_tensors({"diff": ones}, (4,))
    adapters[NORM.path + ".bias"] = Bias.from_tensors({"diff_b": ones}, (4,))
    conv = next(path for path in PLAIN if path.endswith("conv"))
    adapters[conv + ".bias"] = Bias.from_tensors({"diff_b": 2 * ones}, (4,))
    path = tmp_path / "x.safetensors"
    LoraFile(adapters).save(path, KEYMAP, format=format)
    assert_same(LoraFile.read(path, KEYMAP), adapters)
    if kind != "lora":
        names = {f".{name}" for name in adapters[conv].tensors()}
        found = {f".{key.rpartition('conv.')[2]}" for key in _keys(path) if "conv" in key}
        assert found == names | {".diff_b"}


def _keys(path: Path) -> list[str]:
    return list(safetensors.torch.load_file(path))


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_round_trip_of_a_folder(tmp_path: Path, magnitude: bool) -> None:
    adapters = loras(PLAIN.values(), magnitude=magnitude)
    LoraFile(adapters).save_peft(tmp_path / "x", KEYMAP)
    assert_same(LoraFile.read(tmp_path / "x", KEYMAP), adapters)


def large(num_layers: int) -> KeyMap:
    """A model of small layers with the names of a large one's."""
    names = [
        f"down_blocks.{n // 70}.attentions.{n // 10 % 7}.transformer_blocks.{n % 10}.attn1.to_q"
        for n in range(num_layers)
    ]
    keys = [layer_key(name, nn.Linear(3, 4, bias=False)) for name in names]
    return KeyMap("SDXL", {key.path: key for key in keys})


@pytest.mark.parametrize("folder", [False, True], ids=["diffusers", "PEFT"])
def test_many_layers_of_other_ranks_are_read_soon(tmp_path: Path, folder: bool) -> None:
    """A pattern for nearly every layer: 700 took half a minute, and are read in a second."""
    keymap, path = large(700), tmp_path / "x.safetensors"
    adapters = {
        key.path: filled("lora", key.shape, seed, alpha=0.3 + seed, rank=1 + seed % 9)
        for seed, key in enumerate(keymap.layers.values())
    }
    if folder:
        path = tmp_path / "x"
        LoraFile(adapters).save_peft(path, keymap)
    else:
        LoraFile(adapters).save(path, keymap, format="diffusers")
    started = time.perf_counter()
    again = LoraFile.read(path, keymap)
    assert time.perf_counter() - started < 10
    assert_same(again, adapters)


@pytest.mark.parametrize("num_layers", [1, 12, 700])
def test_ia3_of_many_layers_as_a_folder(tmp_path: Path, num_layers: int) -> None:
    """PEFT's factor is 1 + w, so w is rounded once, to a step of float32 at 1."""
    keymap = large(num_layers)
    adapters = {
        key.path: filled("ia3", key.shape, seed, on_input=seed % 3 > 0)
        for seed, key in enumerate(keymap.layers.values())
    }
    LoraFile(adapters).save_peft(tmp_path / "x", keymap)
    again = LoraFile.read(tmp_path / "x", keymap)
    assert again.adapters.keys() == adapters.keys()
    for path, adapter in adapters.items():
        found, expected = again.adapters[path].tensors(), adapter.tensors()
        assert found["on_input"] == expected["on_input"]
        torch.testing.assert_close(found["weight"], expected["weight"], rtol=0, atol=2**-23)


def test_diffusers_files_have_its_own_names_and_no_alphas(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    LoraFile(loras([FUSED, TEXT])).save(path, KEYMAP, format="diffusers")
    modules = [*ROWS, "text_encoder.q"]
    assert set(_keys(path)) == {f"{m}.lora_{x}.weight" for m in modules for x in "AB"}
    with safetensors.safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()[METADATA])
    assert settings["unet.r"] == 1 and settings["text_encoder.r"] == 2
    assert settings["text_encoder.lora_alpha"] == pytest.approx(1.3)


# Other tools


def expected_weights(adapters: dict[str, Adapter], model: nn.Module) -> dict[str, Tensor]:
    weights = {}
    for path, adapter in adapters.items():
        name = path.removeprefix("diffusion_model.")
        weight = model.get_submodule(name).weight
        weights[name] = weight + delta(adapter, weight)
    return weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_peft_loads_a_folder(tmp_path: Path, magnitude: bool) -> None:
    adapters = loras(PLAIN.values(), magnitude=magnitude)
    LoraFile(adapters).save_peft(tmp_path, KEYMAP)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    model = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    merged = model.merge_and_unload()
    for name, weight in expected_weights(adapters, net()).items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_diffusers_way_of_loading(tmp_path: Path, magnitude: bool) -> None:
    """A part's tensors and settings without its name, into PEFT: what its loader does."""
    adapters = loras(PLAIN.values(), magnitude=magnitude)
    path = tmp_path / "x.safetensors"
    LoraFile(adapters).save(path, KEYMAP, format="diffusers")
    tensors = {k.removeprefix("unet."): t for k, t in safetensors.torch.load_file(path).items()}
    with safetensors.safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
    settings = {key.removeprefix("unet."): value for key, value in metadata.items()}
    model = net()
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), model, "default")
    model.peft_config = {"default": peft.LoraConfig(**settings)}
    result = peft.set_peft_model_state_dict(model, tensors, "default")
    assert not result.unexpected_keys
    for name, weight in expected_weights(adapters, net()).items():
        layer = model.get_submodule(name)
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight, weight)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full", "dora"])
def test_lycoris_loads_our_files(tmp_path: Path, kind: str) -> None:
    from lycoris import create_lycoris_from_weights

    adapters: dict[str, Adapter] = {}
    for key in PLAIN.values():
        adapter = filled(kind if kind != "dora" else "lora", key.shape, 1, alpha=0.75)
        if kind == "dora":
            adapter.decompose(net().get_submodule(key.path.removeprefix("diffusion_model.")).weight)
            adapter.magnitude.data.mul_(1.5)
        adapters[key.path] = adapter
    path = tmp_path / "x.safetensors"
    LoraFile(adapters).save(path, KEYMAP)
    model = net()
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    assert len(network.loras) == len(adapters)
    network.apply_to()
    plain = net()
    weights = expected_weights(adapters, plain)
    for name, module in MODULES.items():
        shape = (2, 3, 5, 5) if isinstance(module, nn.Conv2d) else (2, module.in_features)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        layer = copy.deepcopy(plain.get_submodule(name))
        layer.weight.data = weights[name]
        with torch.no_grad():
            torch.testing.assert_close(model.get_submodule(name)(x), layer(x), rtol=1e-4, atol=1e-5)


# What can't be written


def test_what_diffusers_can_not_hold_is_told_at_once(tmp_path: Path) -> None:
    adapters = loras(PLAIN.values())
    adapters[FUSED.path] = filled("boft", FUSED.shape, 0)
    paths = list(PLAIN)
    in_axis = adapters[paths[0]]
    in_axis.magnitude = nn.Parameter(torch.ones(1, 6))
    adapters[paths[1]].magnitude = nn.Parameter(torch.ones(4, 1))
    with pytest.raises(LoraFileError) as caught:
        LoraFile(adapters).save(tmp_path / "x.safetensors", KEYMAP, format="diffusers")
    text = str(caught.value)
    assert f"{FUSED.path}: diffusers has it in 3 parts, but this boft can't be cut" in text
    assert "the formats kohya and comfyui keep it as it is" in text
    name = PLAIN[paths[0]].diffusers[0]
    assert f"{name}: its DoRA is of the weight's columns" in text
    assert "DoRA is on some layers of unet only" in text
    assert list(tmp_path.iterdir()) == []


MIXED = list(zip(PLAIN, ["lora", "ia3"], strict=False))


def test_what_a_folder_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(LoraFileError, match="one type of IA3, InputOFT, LoHa, LoRA, not GLoRA"):
        path = next(iter(PLAIN))
        LoraFile({path: filled("glora", PLAIN[path].shape, 0)}).save_peft(tmp_path / "x", KEYMAP)
    with pytest.raises(LoraFileError, match="for one model, not for text_encoder, unet"):
        LoraFile(loras([*PLAIN.values(), TEXT])).save_peft(tmp_path / "x", KEYMAP)
    with pytest.raises(LoraFileError, match="one type of .*, not IA3, LoRA"):
        mixed = {path: filled(kind, PLAIN[path].shape, 0) for path, kind in MIXED}
        LoraFile(mixed).save_peft(tmp_path / "x", KEYMAP)
    with pytest.raises(LoraFileError, match="PEFT has no Tucker forms of a LoRA: blocks.0.conv"):
        conv = "diffusion_model.blocks.0.conv"
        tucker = filled("lora", PLAIN[conv].shape, 0, tucker=True)
        LoraFile({conv: tucker}).save_peft(tmp_path / "x", KEYMAP)
    with pytest.raises(LoraFileError, match="diffusers' name for it is not known"):
        LoraFile(loras([LayerKey("diffusion_model.z", (4, 4), "z")])).save_peft(tmp_path, KEYMAP)
    assert list(tmp_path.iterdir()) == []


def test_a_lora_model_without_a_model_has_no_diffusers_names(tmp_path: Path) -> None:
    model = LoraModel.from_file(LoraFile(loras(PLAIN.values())), KEYMAP)
    model.info = LoraInfo()
    with pytest.raises(LoraFileError, match="diffusers' names for its .* are not known"):
        model.save(tmp_path / "x.safetensors", format="diffusers")
