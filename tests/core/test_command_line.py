"""`python -m lora_core`, as people call it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from lora_weave.devtools.paths import ROOT
from lora_weave.lora_core.__main__ import main
from lora_weave.lora_core.adapters.loha import LoHa
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.families import family_key_map
from lora_weave.lora_core.lora_file import LoraFile

PATHS = [
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "diffusion_model.input_blocks.4.1.proj_in",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
]
KEYMAP = family_key_map("SD1.5")


def adapter(kind, path, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = KEYMAP.layers[path].shape
    made = kind.create(shape, rank, rank / 2, generator=generator)
    with torch.no_grad():
        for parameter in made.last_factors():
            parameter.normal_(generator=generator)
    return made


@pytest.fixture
def files(tmp_path):
    """A LoRA of rank 4, and a LoHa of rank 2."""
    for name, kind, rank in (("a", LoRA, 4), ("b", LoHa, 2)):
        adapters = {path: adapter(kind, path, rank, rank) for path in PATHS}
        LoraFile(adapters).save(tmp_path / f"{name}.safetensors", KEYMAP)
    return tmp_path


@pytest.fixture
def call(files, monkeypatch, capsys):
    """call(*arguments): stdout and stderr of a call in the folder of the files."""
    monkeypatch.chdir(files)

    def run(*arguments, code=0):
        assert main(arguments) == code
        told = capsys.readouterr()
        return told.out, told.err

    return run


def change(path, layer) -> torch.Tensor:
    found = LoraFile.read(path).adapters[layer]
    return found.delta(torch.zeros(found.shape)).detach().reshape(found.shape)


def test_in_a_process_of_its_own(files):
    """Nothing but the standard library leads to us, and no ComfyUI."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
    program += "runpy.run_module('lora_core', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", program, "convert", "a.safetensors", "-o", "c.safetensors"]
    done = subprocess.run(line, cwd=files, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "c.safetensors: 3 layers" in done.stdout and (files / "c.safetensors").exists()


def test_merge(files, call):
    arguments = ["merge", "a.safetensors:0.7", "b.safetensors:-0.4", "-o", "c.safetensors"]
    out, _ = call(*arguments, "--dtype", "float32")
    assert "c.safetensors: 3 layers" in out
    for path in PATHS:
        expected = 0.7 * change(files / "a.safetensors", path)
        expected = expected - 0.4 * change(files / "b.safetensors", path)
        torch.testing.assert_close(change(files / "c.safetensors", path), expected)
    with safe_open(files / "c.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lora_weave.merged_from"])[1] == {
        "name": "b.safetensors",
        "model": -0.4,
        "clip": -0.4,
    }
    assert json.loads(metadata["lora_weave.merge_method"])["method"] == "sum"
    assert metadata["ss_network_dim"] == "8"  # 4 of the LoRA, 2² of the LoHa


def test_merge_by_a_method_to_a_rank(files, call):
    line = ["merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors"]
    out, _ = call(*line, "--method", "TIES", "--density", "0.3", "--rank", "3")
    assert "kept of the changes' norm" in out
    assert {one.rank for one in LoraFile.read(files / "c.safetensors").adapters.values()} == {3}


def test_nothing_is_overwritten_unasked(files, call):
    (files / "c.safetensors").write_bytes(b"mine")
    line = ["resize", "a.safetensors", "--rank", "2", "-o", "c.safetensors"]
    _, error = call(*line, code=1)
    assert "is there already" in error and (files / "c.safetensors").read_bytes() == b"mine"
    call(*line, "--overwrite")
    assert LoraFile.read(files / "c.safetensors").adapters[PATHS[0]].rank == 2


def test_resize_makes_a_lora_of_a_loha(files, call):
    call("resize", "b.safetensors", "--energy", "1", "-o", "c.safetensors")
    for path in PATHS:
        found, expected = (
            change(files / "c.safetensors", path),
            change(files / "b.safetensors", path),
        )
        assert (found - expected).norm() < 2e-3 * expected.norm()  # float16
    with safe_open(files / "c.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
        assert file.metadata()["ss_network_dim"] == "4"


def test_convert(files, call):
    call("convert", "a.safetensors", "-o", "c.safetensors", "--format", "comfyui")
    with safe_open(files / "c.safetensors", "pt") as file:
        assert f"{PATHS[0]}.lora_up.weight" in file.keys()
        assert file.get_tensor(f"{PATHS[0]}.lora_up.weight").dtype == torch.float16


def test_inspect(files, call):
    out, _ = call("inspect", "b.safetensors", "--json")
    facts = json.loads(out)
    assert facts["family"] == "SD1.5" and facts["types"] == {"loha": 3}
    assert facts["blocks"] == "IN01 IN04 BASE" or facts["blocks"] == "BASE IN01 IN04"
    out, _ = call("inspect", "a.safetensors")
    assert "types      lora (3)" in out and "ranks      4 (3)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "a.safetensors", "gone.safetensors", "-o", "c"], "gone.safetensors"),
        (["merge", "a.safetensors", "-o", "c", "--density", "0.5"], "sum has no density"),
        (["resize", "a.safetensors", "-o", "c", "--energy", "2"], "energy is 2, expected"),
    ],
)
def test_errors_are_one_sentence(files, call, arguments, message):
    out, error = call(*arguments, code=1)
    assert message in error and error.startswith("Error: ") and "Traceback" not in error
    assert not (files / "c").exists()


def test_strengths_and_paths_with_colons(files, call):
    (files / "a.safetensors").rename(files / "x:y.safetensors")
    out, _ = call("merge", "x:y.safetensors", "x:y.safetensors:0.5", "-o", "c.safetensors")
    assert "3 layers" in out
