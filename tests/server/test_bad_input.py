"""Bad input through `/prompt`: one clear error with every problem in it, and nothing lost.

Every test runs beside an earlier LoRA whose name the bad request wants too; no file of any
earlier run may have changed afterwards.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from . import graphs
from .graphs import node
from .lab import Lab, body_of, metadata_of, tensors_of, trained_steps

EARLIER = "earlier"
SEED = 500  # of the bad requests; the earlier run has another


@pytest.fixture(scope="module")
def earlier(lab: Lab) -> Path:
    """A LoRA file from before."""
    lab.succeed(graphs.training("SD3", output_name=EARLIER, training_seed=499, steps=3))
    return lab.loras / f"{EARLIER}.safetensors"


@pytest.fixture(autouse=True)
def nothing_is_lost(lab: Lab, earlier: Path) -> Iterator[None]:
    """No LoRA and no run that was there before has changed or gone, and none is half-written."""
    before = kept(lab)
    yield
    after = kept(lab)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in lab.base.rglob("*.tmp")]


@pytest.fixture
def nothing_is_written(lab: Lab) -> Iterator[None]:
    """Nor is there a new one: the request was refused before any work."""
    before = set(kept(lab))
    yield
    assert set(kept(lab)) == before


def kept(lab: Lab) -> dict[Path, bytes]:
    files = [*lab.output.rglob("*.safetensors"), *(lab.weave / "runs").rglob("*")]
    return {path: path.read_bytes() for path in files if path.is_file()}


def training(family: str = "SD3", **changes: Any) -> graphs.Graph:
    return graphs.training(
        family, **{"output_name": EARLIER, "training_seed": SEED, "steps": 3, **changes}
    )


def training_on(name: str) -> graphs.Graph:
    return training(folder={"folder": name})


def loading(name: str, family: str = "SD1.5") -> graphs.Graph:
    load = node(
        "LoRAWeaveLoad",
        model=["base", 0],
        clip=["base", 1],
        lora_name=name,
        strength_model=1.0,
        strength_clip=1.0,
    )
    return graphs.checkpoint(family) | {
        "load": load,
        "words": node("PreviewAny", source=["load", 3]),
    }


def saving(name: str) -> graphs.Graph:
    """The earlier LoRA into Save LoRA (Weave)."""
    graph = loading(f"{EARLIER}.safetensors", "SD3")
    del graph["words"]  # a second output would run, whatever is wrong with this one
    settings = {"output_name": name, "format": "kohya", "dtype": "float32"}
    texts = {"trigger_words": "", "comment": ""}
    graph["save"] = node("LoRAWeaveSave", lora=["load", 2], **settings, **texts)
    return graph


def photo() -> Image.Image:
    return Image.radial_gradient("L").convert("RGB").resize((96, 96))


def photo_bytes(kind: str) -> bytes:
    file = io.BytesIO()
    photo().save(file, kind)
    return file.getvalue()


# --- dataset folders


@pytest.mark.usefixtures("nothing_is_written")
def test_missing_folder(lab):
    error = lab.fail(training_on("gone"))
    assert f"{lab.input / 'gone'}: the folder does not exist" in error


@pytest.mark.usefixtures("nothing_is_written")
def test_no_folder(lab):
    assert f"no dataset folder is chosen; put one with images under {lab.input}" in lab.refuse(
        training_on("")
    )


@pytest.mark.usefixtures("nothing_is_written")
def test_empty_folder(lab):
    lab.folder("empty")
    error = lab.fail(training_on("empty"))
    assert "the folder is empty; images (.jpg .jpeg .png .webp .bmp) are expected" in error


@pytest.mark.usefixtures("nothing_is_written")
def test_folder_without_images(lab):
    folder = lab.folder("texts")
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    (folder / "b.pdf").write_bytes(b"%PDF-1.7")
    error = lab.fail(training_on("texts"))
    assert "no images (.jpg .jpeg .png .webp .bmp) in it, found .txt (1), .pdf (1)" in error


@pytest.mark.usefixtures("nothing_is_written")
@pytest.mark.parametrize("way", ["absolute", "relative", "link"])
def test_folder_outside_of_the_allowed_roots(lab, tmp_path, way):
    """Refused before anything is read; the message has the lines that would allow it."""
    photo().save(tmp_path / "a.png")
    name = str(tmp_path)
    if way == "relative":
        name = os.path.relpath(tmp_path, lab.input)
    if way == "link":
        link = lab.input / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path, target_is_directory=True)
        name = "link"
    message = lab.refuse(training_on(name))
    assert f'the dataset folder "{name}" is outside of the folders' in message
    assert str(lab.input) in message
    assert f"extra_model_paths.yaml:\nlora_weave:\n    lora_weave_datasets: {tmp_path}" in message


def test_those_lines_allow_a_folder(lab):
    """The shared server was started with a yaml of just these lines for the folder `allowed`."""
    photo().save(lab.allowed / "a.png")
    lab.succeed(training(folder={"folder": str(lab.allowed)}, output_name="allowed", steps=1))
    assert str(lab.allowed) in json.dumps(lab.client.get("/object_info/LoRAWeaveImageFolder"))


# --- images and captions


@pytest.mark.usefixtures("nothing_is_written")
def test_every_bad_image_is_in_one_message(lab):
    folder = lab.folder("bad images", lab.photos)
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    (folder / "nothing.webp").write_bytes(b"")
    (folder / "zeros.bmp").write_bytes(bytes(1000))
    (folder / "noise.png").write_bytes(bytes(range(7, 250)))
    jpeg, png = photo_bytes("JPEG"), photo_bytes("PNG")
    (folder / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "half.png").write_bytes(png[: len(png) // 2])
    Image.new("1", (13_500, 13_500)).save(folder / "huge.png")
    (folder / "tiny.png").write_bytes(tiny_png())
    error = lab.fail(training_on("bad images"))
    lines = error.splitlines()
    assert lines[0] == f"Training images in {folder}: 8 problems, no training yet"
    for said in (
        "- page.jpg: not an image that can be read: this is a web page or an SVG",
        "- nothing.webp: the file is empty (0 bytes)",
        "- zeros.bmp: the file holds only zeros: an interrupted copy or download",
        "- noise.png: not an image that can be read: the content is none of JPEG, PNG",
        f"- half.jpg: the image is truncated: it ends after {len(jpeg) // 2} bytes",
        f"- half.png: the image is truncated: it ends after {len(png) // 2} bytes",
        "- huge.png: 13500x13500 px are 182 million pixels; at most 179 million are read.",
        "- tiny.png: ",
    ):
        assert [line for line in lines if line.startswith(said)], f"{said}\nnot in\n{error}"


def tiny_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 500)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.usefixtures("nothing_is_written")
def test_caption_in_an_unknown_encoding(lab):
    folder = lab.folder("bad captions", lab.photos)
    (folder / "chelsea.txt").write_bytes(b"\x00\x01\x02 binary \xff")
    (folder / "coffee.txt").write_bytes("ein schöner Kaffee für dich".encode("utf-16-le"))
    error = lab.fail(training_on("bad captions"))
    tried = "not text in any known encoding (tried UTF-8, UTF-16 with byte order mark, Shift-JIS"
    assert f"chelsea.txt: {tried}" in error
    assert f"coffee.txt: {tried}" in error


def test_caption_in_shift_jis_is_read_and_that_is_said(lab):
    folder = lab.folder("sjis", lab.photos)
    (folder / "chelsea.txt").write_bytes("猫の写真".encode("cp932"))
    outcome = lab.succeed(training(folder={"folder": "sjis"}, output_name="sjis", steps=1))
    assert "captions read as Shift-JIS, not UTF-8: chelsea.txt" in outcome.texts("photos")[-1]
    tags = json.loads(metadata_of(lab.loras / "sjis.safetensors")["ss_tag_frequency"])
    assert tags["sjis"]["猫の写真"] == 1


# --- the training node


@pytest.mark.usefixtures("nothing_is_written")
def test_all_that_is_missing_or_wrong_is_in_one_message(lab):
    graph = training(
        output_name="../outside", options={"include": "nonsense, attn", "exclude": "alsonot"}
    )
    del graph["train"]["inputs"]["clip"], graph["train"]["inputs"]["vae"]
    error = lab.fail(graph)
    assert error.startswith("Train LoRA can't start:\n- ")
    assert "- vae is not connected: it encodes the images" in error
    assert "- clip is not connected: it encodes the captions" in error
    assert "- output_name is '../outside' with " in error
    assert "the pattern 'nonsense' matches none of the " in error
    assert "the pattern 'alsonot' matches none of the " in error
    assert "'attn'" not in error


OUTSIDE = [
    *("", "  ", "..", "a/../../b", "/abs/olute", "\\\\server\\share\\x", "C:\\x", "C:x", "a/.."),
    *("..\\up", "nul\0byte", "."),
]


@pytest.mark.usefixtures("nothing_is_written")
@pytest.mark.parametrize("name", OUTSIDE)
def test_output_name_that_leaves_its_folder(lab, name):
    error = lab.fail(training(output_name=name))
    assert f"output_name is {name!r}" in error
    assert str(lab.loras) in error


@pytest.mark.usefixtures("nothing_is_written")
def test_save_has_the_same_rules_for_names(lab):
    error = lab.fail(saving("../x"))
    assert error.startswith("output_name is '../x' with ")
    assert f"it is saved under {lab.loras}" in error


@pytest.mark.usefixtures("nothing_is_written")
def test_output_folder_that_is_a_link_to_elsewhere(lab, tmp_path):
    link = lab.loras / "elsewhere"
    link.symlink_to(tmp_path, target_is_directory=True)
    try:
        error = lab.fail(training(output_name="elsewhere/x"))
    finally:
        link.unlink()
    assert "output_name is 'elsewhere/x', which leads out of" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_written")
@pytest.mark.parametrize(
    ("where", "name", "value", "known"),
    [
        ("train", "algorithm", "magic", "lora"),
        ("train", "resume", "perhaps", "start over"),
        ("photos", "missing_caption", "made up", "file name"),
        ("options", "optimizer", "SGDDD", "AdamW"),
        ("options", "targets", "everything", "all linear + conv"),
        ("save", "format", "zip", "kohya"),
        ("save", "dtype", "int3", "bfloat16"),
    ],
)
def test_choices_that_are_not_offered(lab, where, name, value, known):
    """0.3.75 runs the graph with them, so that our nodes have to look."""
    graph = training(options={}) if where != "save" else saving("choice")
    graph[where]["inputs"][name] = value
    message = lab.reject(graph)
    assert name in message
    assert value in message
    assert known in message


@pytest.mark.usefixtures("nothing_is_written")
@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        ("train", "rank", -1, "Value -1 smaller than min of 0: rank"),
        ("train", "rank", 2000, "Value 2000 bigger than max of 1024: rank"),
        ("train", "learning_rate", 11.0, "Value 11.0 bigger than max of 10.0: learning_rate"),
        ("train", "steps", "many", "Failed to convert an input value to a INT value: steps"),
        ("photos", "bucket_step", 0, "Value 0 smaller than min of 8: bucket_step"),
    ],
)
def test_numbers_out_of_range(lab, where, name, value, said):
    """The host checks them by what our nodes declare, before anything runs."""
    graph = training()
    graph[where]["inputs"][name] = value
    assert said in lab.refuse(graph)


@pytest.mark.parametrize(
    ("name", "output", "said"),
    [
        (
            "vae",
            2,
            "vae makes latents of 16 channels, the model (SD1.5) takes 4: connect the VAE that "
            "belongs to the model",
        ),
        (
            "clip",
            1,
            "clip makes conditioning of width 4096, the model (SD1.5) takes 768: connect the CLIP "
            "that belongs to the model",
        ),
    ],
)
@pytest.mark.parametrize("text_encoder", [False, True], ids=["frozen", "text encoder"])
@pytest.mark.usefixtures("nothing_is_written")
def test_a_vae_or_clip_of_another_model(lab, name, output, said, text_encoder):
    graph = graphs.training(
        output_name="../stranger", training_seed=498, options={"text_encoder": text_encoder}
    )
    graph["other base"] = graphs.checkpoint("SD3")["base"]
    graph["train"]["inputs"][name] = ["other base", output]
    error = lab.fail(graph)
    assert said in error
    assert "../stranger" in error, "all problems at once"
    assert not list((lab.base / "output" / "loras").rglob("stranger*"))


def test_start_from_a_lora_of_another_base_model(lab):
    lab.succeed(graphs.training(output_name="of sd15", training_seed=499, steps=1))
    graph = training("SD3")
    load = loading("of sd15.safetensors")
    graph["other base"] = load["base"]
    graph["load"] = load["load"]
    graph["load"]["inputs"].update(model=["other base", 0], clip=["other base", 1])
    graph["train"]["inputs"]["start_from"] = ["load", 2]
    error = lab.fail(graph)
    assert "layers match: the file looks like SD1.5, the model is SD3" in error


# --- LoRA files


def test_lora_of_another_base_model(lab, earlier):
    layers = len({key.split(".")[0] for key in tensors_of(earlier)})
    error = lab.fail(loading(earlier.name))
    assert error.startswith(earlier.name)
    assert f"0 of {layers} layers match: the file looks like SD3, the model is SD1.5" in error


def test_unknown_lora_offers_the_nearest_name(lab):
    message = lab.refuse(loading("earlyer.safetensors"))
    assert '"earlyer.safetensors" is not in any loras folder' in message
    assert 'Did you mean "earlier.safetensors"?' in message


@pytest.mark.parametrize("name", ["../../user/x.safetensors", "/etc/passwd"])
def test_lora_name_that_leaves_its_folders(lab, name):
    assert "is not in any loras folder" in lab.refuse(loading(name))


def header(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def overlapping() -> bytes:
    entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    names = ("lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight")
    return header(json.dumps(dict.fromkeys(names, entry)).encode()) + bytes(64)


def far_outside() -> bytes:
    entry = {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}
    return header(json.dumps({"lora_unet_x.lora_up.weight": entry}).encode()) + bytes(64)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has only 0 bytes"),
        (b"<html>404</html>", "it looks like a web page"),
        (header(b"{", 2**62), "the header claims 4611686018427387904 bytes"),
        (header(b"{" + b"[" * 5000), "is nested"),
        (header(b'{"a": 1, "a": 2}'), "appears twice"),
        (overlapping(), "overlaps the tensor before it"),
        (far_outside(), "the file is truncated: 64 of 1073741824 tensor bytes are there"),
        (save({"weight": torch.ones(3)}), "it is not a LoRA"),
    ],
    ids="empty page long deep twice overlap outside other".split(),
)
def test_hostile_or_broken_safetensors(lab, content, said):
    file = lab.loras / "hostile.safetensors"
    file.write_bytes(content)
    try:
        error = lab.fail(loading(file.name))
    finally:
        file.unlink()
    assert file.name in error
    assert said in error


def test_truncated_lora(lab, earlier):
    file = lab.loras / "cut.safetensors"
    file.write_bytes(earlier.read_bytes()[:-100])
    try:
        error = lab.fail(loading(file.name, "SD3"))
    finally:
        file.unlink()
    assert "cut.safetensors: the safetensors header is damaged:\n- the file is truncated" in error


class Hostile:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("ending", ["safetensors", "pt", "ckpt", "bin"])
@pytest.mark.parametrize("kind", ["a Python pickle", "a PyTorch (.pt, .ckpt, .bin) or other zip"])
def test_pickles_are_refused_unopened(lab, tmp_path, ending, kind):
    file, marker = lab.loras / f"evil.{ending}", tmp_path / "opened"
    if kind == "a Python pickle":
        file.write_bytes(pickle.dumps(Hostile(marker)))
    else:
        torch.save({"lora_unet_x.lora_up.weight": Hostile(marker)}, file)
    try:
        error = lab.fail(loading(file.name))
    finally:
        file.unlink()
    assert f"{file.name} is not a safetensors file: it looks like {kind}" in error
    assert "can run code when they are opened and are refused" in error
    assert not marker.exists()


# --- what goes wrong while it trains


@pytest.fixture(scope="module")
def nan_checkpoint(lab: Lab) -> Iterator[str]:
    """The tiny SD3 with one weight that is not a number."""
    folder = lab.base / "models" / "checkpoints"
    tensors = torch.load(folder / graphs.CHECKPOINTS["SD3"], weights_only=True)
    name = "model.diffusion_model.final_layer.linear.bias"
    tensors[name] = tensors[name].clone()
    tensors[name][3] = float("nan")
    torch.save(tensors, folder / "nan.ckpt")
    return "nan.ckpt"


def test_a_model_that_gives_only_nan(lab, nan_checkpoint):
    graph = training(steps=40)
    graph["base"]["inputs"]["ckpt_name"] = nan_checkpoint
    outcome = lab.run(graph)
    assert outcome.ended == "execution_error"
    assert "the loss was not a number for 20 steps in a row, up to step 20." in outcome.error
    assert "Those steps were skipped and changed nothing." in outcome.error
    assert "bf16 or fp32, or a learning rate below 0.001" in outcome.error
    said = [text for text in outcome.texts("train") if "was skipped" in text]
    assert said, "skipped steps are shown while they happen"
    _, record = next(run for run in all_runs(lab) if run[1]["error"] == outcome.error)
    assert record["status"] == "failed"
    assert not Path(record["output"]).samefile(lab.loras / f"{EARLIER}.safetensors")


def test_a_learning_rate_that_breaks_the_training(lab):
    """It goes well for a few steps; what those have learned stays, and is what the file has.

    Each step moves every weight by about 10, so that the change soon overflows fp16.
    """
    options = {"warmup": 0.0, "precision": "fp16"}
    graph = training(steps=60, learning_rate=10.0, output_name="broken", options=options)
    error = lab.fail(graph)
    assert "the loss was not a number for 20 steps in a row" in error
    tensors = tensors_of(lab.loras / "broken.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_up" in key)
    first = body_of(lab.loras / "broken.safetensors")
    assert "the loss was not a number for 20 steps in a row" in lab.fail(graph)
    assert body_of(lab.loras / "broken.safetensors") == first


def test_a_damaged_state_is_told_and_start_over_helps(lab):
    graph = training(training_seed=501, output_name="damaged state", steps=6)
    lab.succeed(graph)
    file = lab.loras / "damaged state.safetensors"
    folder, _ = lab.run_of(file)
    state = folder / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    before = file.read_bytes()
    graph["train"]["inputs"]["steps"] = 8
    error = lab.fail(graph)
    assert "state.safetensors" in error
    assert "start over" in error
    assert file.read_bytes() == before
    graph["train"]["inputs"]["resume"] = "start over"
    assert trained_steps(lab.succeed(graph), 8) == (0, 8)


def all_runs(lab: Lab) -> list[tuple[str, dict[str, Any]]]:
    return list(lab.runs().items())


# --- no room left


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[None]:
    """A file system of its own at `at`, where this process may mount one."""
    at.mkdir(parents=True, exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if not sys.platform.startswith("linux") or subprocess.run(line, check=False).returncode:
        pytest.skip("can't mount a small file system here; the next test limits file sizes")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_full_disk(lab):
    """The longer LoRA does not fit beside the one that it would replace. The steps are kept."""
    folder = lab.loras / "small disk"
    with small_disk(folder, "1m"):
        graph = training(training_seed=502, output_name="small disk/lora", steps=3)
        lab.succeed(graph)
        file = folder / "lora.safetensors"
        before = file.read_bytes()
        filler = folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        graph["train"]["inputs"]["steps"] = 6
        error = lab.fail(graph)
        assert f"the disk is full: {len(before) / 1e6:.1f} MB are needed, 0.0 MB are free" in error
        assert f"in {folder}; nothing was written over" in error
        assert file.read_bytes() == before
        assert {path.name for path in folder.iterdir()} == {"lora.safetensors", "filler"}
        filler.unlink()
        outcome = lab.succeed(graph)
        assert trained_steps(outcome, 6) in ((), (6, 6)), "the steps were kept"
        assert metadata_of(file)["ss_steps"] == "6"


@contextlib.contextmanager
def limited(lab: Lab, what: str, most_bytes: int) -> Iterator[None]:
    """A resource limit of the running server, taken back afterwards."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of another process can only be set on Linux")
    import resource

    pid, kind = lab.server.process.pid, getattr(resource, what)
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


def test_a_file_that_can_not_be_written(lab):
    """Whatever the system's reason: told, the earlier file whole, and the next try goes on."""
    graph = training(training_seed=503, output_name="limited", rank=64, steps=2)
    lab.succeed(graph)
    file = lab.loras / "limited.safetensors"
    before = file.read_bytes()
    assert len(before) > 2 * len(lab.server.log_text()) + 500_000
    graph["train"]["inputs"]["steps"] = 4
    with limited(lab, "RLIMIT_FSIZE", len(before) // 2):
        error = lab.fail(graph)
    assert "File too large" in error
    assert file.read_bytes() == before
    lab.succeed(graph)
    assert metadata_of(file)["ss_steps"] == "4"


@pytest.mark.parametrize("too_large", ["state", "state and LoRA"])
def test_an_interrupt_whose_files_can_not_be_written_is_told(lab, too_large):
    """Else nobody would learn that the steps are lost. What can be written is."""
    name, seed = f"stopped {too_large}", 505 + len(too_large)
    graph = training(training_seed=seed - 1, output_name="size of it", rank=64, steps=1)
    lab.succeed(graph)
    size = (lab.loras / "size of it.safetensors").stat().st_size  # its state is three times that
    options = {"save_state_every": 400}  # only the interrupt saves
    graph = training(training_seed=seed, output_name=name, rank=64, steps=400, options=options)
    known = lab.runs()
    with limited(lab, "RLIMIT_FSIZE", 2 * size if too_large == "state" else size // 2):
        outcome = lab.run(graph, interrupt_at=3)
    assert outcome.ended == "execution_error"
    (record,) = [record for run, record in lab.runs().items() if run not in known]
    step = int(re.search(r"the training was interrupted at step (\d+), but not", outcome.error)[1])
    assert 3 <= step < 400
    assert "File too large" in outcome.error
    assert outcome.error.endswith("Queueing the same graph again goes on from step 0.")
    assert (record["status"], record["step"], record["error"]) == ("failed", 0, outcome.error)
    file = lab.loras / f"{name}.safetensors"
    assert file.exists() == (too_large == "state")
    if file.exists():
        assert metadata_of(file)["ss_steps"] == str(step)
    again = lab.run(graph, interrupt_at=1)
    assert again.ended == "execution_interrupted"
    assert trained_steps(again, 400)[0] == 0
    assert int(metadata_of(file)["ss_steps"]) > 0


def test_out_of_memory(lab):
    """Says what to change; the server lives on."""
    status = Path(f"/proc/{lab.server.process.pid}/status").read_text()
    now = 1024 * int(status.split("VmSize:")[1].split()[0])
    folder = {"repeats": 2000, "resolution": 96}
    graph = training(training_seed=504, folder=folder, batch_size=1024, output_name="too much")
    with limited(lab, "RLIMIT_AS", now + 256 * 2**20):
        error = lab.fail(graph)
    assert error.startswith("out of memory while training. Switch on gradient_checkpointing in")
    assert "the resolution, the batch size or the rank" in error
    lab.succeed(training(training_seed=504, output_name="enough"))
