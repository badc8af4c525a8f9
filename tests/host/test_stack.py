"""LoRA Stack, from rows to weights: against the host's own loaders, and what is refused."""

from __future__ import annotations

import copy
import json
import operator
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import io

import nodes as host_nodes
from lora_weave.lora_core import lora_file
from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.families import family_key_map
from lora_weave.lora_core.host.apply import Entry, apply
from lora_weave.lora_core.host.models import (
    clip_layers,
    key_map,
    patch_key,
    unet_layers,
    unpatched_weights,
)
from lora_weave.lora_core.host.stacks import as_lora_stack, is_linked, of_lora_stack, of_rows
from lora_weave.lora_core.key_map import BIAS
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.lora_model import LoraModel
from lora_weave.lora_core.stack_rows import parse_rows
from lora_weave.nodes.load import Load
from lora_weave.nodes.stack import StackNode

from .families import build
from .test_apply import adapters_of, assert_same_but_for_rounding, patched_weights
from .text_encoders import build_clip

# The types that the host computes right; LoRA is LoCon on convolutions, and full has no rank.
HOSTS = ("lora", "loha", "lokr", "full", "lora", "loha", "lokr", "lora")
RANKS = (1, 3, 4, 8)  # of one layer after the other: all are in a file, and of a layer in a stack
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module", params=DTYPES)
def base(request):
    with torch.inference_mode():
        dtype = DTYPES[request.param]
        return build("SD1.5", dtype=dtype), build_clip("SD1", dtype=dtype)


@pytest.fixture(scope="module")
def files(base) -> list[str]:
    """Names of eight files of mixed types and ranks on every layer of model and text encoder."""
    model, clip = base
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, kind in enumerate(HOSTS):
        adapters = adapters_of(kind, unet_layers(model), number, RANKS)
        adapters |= adapters_of(kind, clip_layers(clip), 100 + number, RANKS)
        names.append(f"stack/{number}_{kind}.safetensors")
        (folder / "stack").mkdir(exist_ok=True)
        LoraFile(adapters).save(folder / names[-1], key_map(model, clip), dtype=torch.float16)
    return names


def run(rows, hidden=None, normalise="off", master=1.0, mode="patch", **sockets):
    """The node as the host runs it; its outputs by name."""
    given = {io.Hidden[name]: value for name, value in (hidden or {}).items()}
    node = StackNode.PREPARE_CLASS_CLONE({**given, "hidden_inputs": given})  # 0.33: the latter
    done = node.execute(normalise=normalise, master=master, mode=mode, rows=rows, **sockets)
    names = [output.id for output in StackNode.GET_SCHEMA().outputs]
    return dict(zip(names, done.args, strict=True)) | {"ui": done.ui}


def row(name, model=1.0, clip=None, **more):
    return {
        "on": True,
        "name": name,
        "model": model,
        "clip": model if clip is None else clip,
        **more,
    }


def hosts_chain(model, clip, rows):
    for one in rows:
        model, clip = host_nodes.LoraLoader().load_lora(
            model, clip, one["name"], one["model"], one["clip"]
        )
    return model, clip


@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 3), (2, 3), (5, 3), (0, 8)]
)
def test_patch_equals_the_host_s_chain_of_loaders(base, files, first, count):
    """One of each type, then types, ranks and strengths mixed."""
    model, clip = base
    strengths = [(0.8, 0.6), (-0.5, 1.0), (1.3, -0.4), (0.2, 0.0)]
    chosen = files[first : first + count]
    rows = [row(name, *strengths[n % 4]) for n, name in enumerate(chosen)]
    found = run({"rows": rows}, model=model, clip=clip)
    theirs = hosts_chain(model, clip, rows)
    expected = patched_weights(theirs[0], theirs[1].patcher)
    ours = patched_weights(found["stacked_model"], found["stacked_clip"].patcher)
    assert_same_but_for_rounding(ours, expected)
    assert all(len(patches) == 1 for patches in found["stacked_model"].patches.values())


def test_the_files_of_the_chain_mix_ranks_and_kinds_of_layers(base, files):
    """In each file, and for each layer of a stack of three; on linear layers and convolutions."""
    keymap, of_layer = key_map(*base), dict[str, list[int]]()
    for name, kind in zip(files, HOSTS, strict=True):
        adapters = LoraFile.read(
            folder_paths.get_full_path_or_raise("loras", name), keymap
        ).adapters
        assert {len(adapter.shape) for adapter in adapters.values()} == {2, 4}
        if kind != "full":
            assert {adapter.rank for adapter in adapters.values()} >= set(RANKS), name
            for path, adapter in adapters.items():
                of_layer.setdefault(path, []).append(adapter.rank)
    assert all(len(set(ranks[:3])) == 3 for ranks in of_layer.values())


def test_string_object_and_wrapped_rows_give_the_same_model(base, files):
    model, _ = base
    rows = [row(files[0], 0.7), row(files[1], -0.3)]
    forms = [{"v": 1, "rows": rows}, json.dumps({"v": 1, "rows": rows}), {"__value__": rows}]
    found = [patched_weights(run(form, model=model)["stacked_model"]) for form in forms]
    for other in found[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in found[0].items())


def test_rows_that_are_off_and_no_rows_change_nothing(base, files):
    model, clip = base
    before = patched_weights(model, clip.patcher)
    for rows in ("", {"rows": [row(files[0], on=False)]}):
        found = run(rows, model=model, clip=clip)
        after = patched_weights(found["stacked_model"], found["stacked_clip"].patcher)
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_blending_over_all_that_comes_in(base, files):
    """lora_stack, stack, LORA_MODEL, rows: in this order, blended as one, applied once."""
    model, clip = base
    inner = run({"rows": [row(files[1], 2.0, 1.0)]})
    path = folder_paths.get_full_path_or_raise("loras", files[2])
    lora = LoraModel.from_file(LoraFile.read(path, key_map(model, clip)), key_map(model, clip))
    found = run(
        {"rows": [row(files[3], -4.0, 0.0)]},
        normalise="sum to 1",
        master=0.5,
        model=model,
        clip=clip,
        lora_stack=[(files[0], 1.0, 3.0)],
        stack=inner["stacked"],
        lora_1=lora,
    )
    labels = [f"entry 1 of lora_stack ({files[0]})", f"row 1 ({files[1]}) of the incoming stack"]
    labels += ["lora_1 (2_lokr.safetensors)", f"row 1 ({files[3]})"]
    assert [entry.label for entry in found["stacked"]] == labels
    expected = [(1 / 16, 3 / 10), (2 / 16, 1 / 10), (1 / 16, 1 / 10), (-4 / 16, 0.0)]
    assert [(e.model, e.clip) for e in found["stacked"]] == [pytest.approx(e) for e in expected]
    (shown,) = found["ui"]["lora_weave_stack"]
    assert [(one["row"], one["model"], one["share"]) for one in shown["rows"]] == [(0, -0.25, 0.5)]
    rows = [row(name, *strengths) for name, strengths in zip(files, expected, strict=False)]
    theirs = hosts_chain(model, clip, rows)
    ours = patched_weights(found["stacked_model"], found["stacked_clip"].patcher)
    expected_weights = patched_weights(theirs[0], theirs[1].patcher)
    for name, weight in expected_weights.items():  # the LORA_MODEL went through float32
        error = (ours[name].double() - weight.double()).abs().max()
        eps = torch.finfo(weight.dtype).eps
        assert error <= max(2 * eps, 1e-6) * weight.double().abs().max(), name


def test_equal_energy(base, files):
    """Norms as of the dense changes; of a LoHa, LoKr, full and LoRA."""
    model, clip = base
    rows = [row(name, strength) for name, strength in zip(files[:4], (1, 1, -2, 1), strict=True)]
    found = run({"rows": rows}, normalise="equal energy", model=model, clip=clip)
    keymap, weight = key_map(model, clip), unpatched_weights(model, clip)
    for part, attribute in (("diffusion_model", "model"), ("text_encoders", "clip")):
        norms = []
        for entry in found["stacked"]:
            adapters = LoraFile.read(entry.path, keymap).adapters
            of_part = {p: a for p, a in adapters.items() if p.startswith(part)}
            dense = [a.delta(weight(p)).double().square().sum() for p, a in of_part.items()]
            norms.append(getattr(entry, attribute) * torch.stack(dense).sum().sqrt().item())
        assert [norm / norms[0] for norm in norms] == [pytest.approx(x) for x in (1, 1, -2, 1)]


def of_sd15(name: str, kind: str, seed: int) -> str:
    """A file of one real layer of SD1.5, as its family's names are known without a model."""
    keymap = family_key_map("SD1.5")
    path = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    generator = torch.Generator().manual_seed(seed)
    adapter = ADAPTERS[kind].create(keymap.layers[path].shape, 4, 4.0, generator=generator)
    for parameter in adapter.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    LoraFile({path: adapter}).save(folder / name, keymap)
    return name


def test_without_a_model_the_family_s_layers_are_taken():
    names = [of_sd15(f"sd15_{seed}.safetensors", "lora", seed) for seed in (1, 2)]
    rows = {"rows": [row(names[0], 0.5), row(names[1], 1.5, blocks={"IN": 0.5})]}
    found = run(rows, normalise="equal energy")
    norms = []
    for entry, weight in zip(found["stacked"], (1.0, 0.5), strict=True):
        (adapter,) = LoraFile.read(entry.path).adapters.values()
        norms.append(entry.model * weight * adapter.delta(torch.zeros(adapter.shape)).norm().item())
    assert norms[1] / norms[0] == pytest.approx(3.0)
    assert f"row 1 ({names[0]}) and row 2 ({names[1]})" in found["report"]


def test_equal_energy_of_types_that_depend_on_the_weight_needs_the_model(base):
    model, _ = base
    name = of_sd15("sd15_oft.safetensors", "oft", 3)
    with pytest.raises(ValueError, match="depends on the base weight: link the model"):
        run({"rows": [row(name)]}, normalise="equal energy")
    assert "Cosines are not known without the model" in run({"rows": [row(name)]})["report"]
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    adapters = adapters_of("oft", unet_layers(model), seed=3)
    LoraFile(adapters).save(folder / "an_oft.safetensors", key_map(model, None))
    found = run({"rows": [row("an_oft.safetensors")]}, normalise="equal energy", model=model)
    assert found["stacked"][0].model == pytest.approx(1.0)


@pytest.mark.parametrize("is_loaded", [False, True], ids=["plain", "patched"])
def test_weights_of_everything_that_a_file_may_change(base, is_loaded):
    """Norms, biases and embeddings among them, as they are without the patches on them."""
    model, clip = base
    keymap = key_map(model, clip)
    everything = {**keymap.layers, **keymap.norms, **keymap.embeddings}
    paths = [*everything, *(path + BIAS for path in keymap.biases)]
    before = patched_weights(model, clip.patcher)
    if is_loaded:
        tensors = {f"{path}.diff": torch.ones(layer.shape) for path, layer in everything.items()}
        tensors |= {f"{path}.diff_b": torch.ones(keymap.shape(path)[0]) for path in keymap.biases}
        lora = LoraFile.from_state_dict(tensors, keymap)
        model, clip = apply(model, clip, [Entry(lora.adapters, 1.0, 1.0)])
        patched_weights(model, clip.patcher)
    weight = unpatched_weights(model, clip)
    for path in paths:
        assert torch.equal(weight(path), before[patch_key(path)].float()), path


def test_changes_of_norms_and_biases_that_depend_on_the_weight(base):
    """As control LoRAs have them for norms, and PEFT's (IA)³ for biases."""
    model, clip = base
    keymap = key_map(model, clip)
    norm = next(iter(keymap.norms))
    biased = next(path for path in keymap.layers if path in keymap.biases)
    table = next(iter(keymap.embeddings))
    rows, width = keymap.embeddings[table].shape
    tensors = {
        f"{norm}.set_weight": torch.rand(keymap.shape(norm)),
        f"{biased}.ia3_b": torch.rand(keymap.shape(biased)[0]),
        f"{table}.lora_up.weight": torch.rand(rows, 1),
        f"{table}.lora_down.weight": torch.rand(1, width),
        f"{table}.dora_scale": torch.rand(rows, 1),
    }
    lora = LoraFile.from_state_dict(tensors, keymap)
    given = LoraModel.from_file(lora, keymap)
    report = run({"rows": []}, lora_1=given, lora_2=given, model=model, clip=clip)["report"]
    assert report.count("+1.00") == 2  # of the model and of the text encoder


@pytest.mark.parametrize("linked", ["model", "clip"])
def test_equal_energy_counts_the_part_that_is_not_linked(base, files, linked, monkeypatch):
    """By the family's layers, since the stack goes on with both strengths."""
    model, clip = base
    rows = {"rows": [row(files[0]), row(files[1], 2.0)]}
    whole = run(rows, normalise="equal energy", model=model, clip=clip)["stacked"]
    keymap = key_map(model, clip)
    monkeypatch.setattr(lora_file, "key_map_for", lambda shapes, metadata=None: keymap)
    given = {"model": model} if linked == "model" else {"clip": clip}
    found = run(rows, normalise="equal energy", **given)["stacked"]
    assert [(e.model, e.clip) for e in found] == [pytest.approx((e.model, e.clip)) for e in whole]
    monkeypatch.undo()
    lora_file.forget_files()
    with pytest.raises(ValueError, match="too, since the stack goes on with"):
        run(rows, normalise="equal energy", **given)


def test_the_report_tells_cosines(base, files):
    model, _ = base
    rows = {"rows": [row(files[0]), row(files[0], 0.5), row(files[1])]}
    opposed = {"rows": [row(files[0]), row(files[0], -0.5)]}
    assert "-1.00  row 1" in run(opposed, model=model)["report"]
    report = run(rows, model=model)["report"]
    assert f"+1.00  row 1 ({files[0]}) and row 2 ({files[0]})" in report
    assert "typed 0.5" in report and "20% of the blend" in report


def test_a_file_of_the_same_name_is_read_again(base, files):
    model, _ = base
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    path, rows = folder / "changing.safetensors", {"rows": [row("changing.safetensors")]}
    weights, stamps = [], []
    for seed in (1, 2):
        adapters = adapters_of("lora", unet_layers(model), seed=seed)
        LoraFile(adapters).save(path, key_map(model, None))
        stamps.append(StackNode.fingerprint_inputs(rows=rows, mode="patch"))
        weights.append(patched_weights(run(rows, model=model)["stacked_model"]))
    assert stamps[0] != stamps[1]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_configuration_of_the_same_name_is_read_again(base):
    """A PEFT folder's alphas are in its adapter_config.json, whose change both nodes notice."""
    model, _ = base
    folder = Path(folder_paths.get_folder_paths("loras")[0]) / "a_peft_folder"
    name = f"{folder.name}/adapter_model.safetensors"
    rows = {"rows": [row(name), row("beside_a_folder.safetensors")]}
    lora, keymap = LoraFile(adapters_of("lora", unet_layers(model), seed=1)), key_map(model, None)
    lora.save_peft(folder, keymap)
    lora.save(folder.with_name("beside_a_folder.safetensors"), keymap)
    config = folder / "adapter_config.json"
    stamps, blends = [], []
    for alpha in (2.0, 20.0):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": alpha}))
        stamps.append(StackNode.fingerprint_inputs(rows=rows, mode="patch"))
        stamps.append(Load.fingerprint_inputs(lora_name=name))
        found = run(rows, normalise="equal energy", model=model)["stacked"]
        blends.append(found[1].model / found[0].model)
    assert len(set(stamps)) == 4
    assert blends[1] == pytest.approx(10 * blends[0])


# --- what comes out for others


def test_lora_stack_goes_through_another_pack_s_consumer(base, files):
    """A list of exact 3-tuples, appended to what came in; as other packs unpack and add to it."""
    model, clip = base
    incoming = [(files[0], 0.5, 0.25)]
    hidden = {"unique_id": "7", "prompt": {"9": {"inputs": {"lora_stack": ["7", 2]}}}}
    found = run({"rows": [row(files[1], 0.8, 0.1)]}, hidden, lora_stack=incoming)["stacked_loras"]
    assert type(found) is list and found == [*incoming, (files[1], 0.8, 0.1)]
    assert incoming == [(files[0], 0.5, 0.25)]
    rows = []
    for name, strength_model, strength_clip in found:
        rows.append(row(name, strength_model, strength_clip))
    theirs = patched_weights(*[hosts_chain(model, clip, rows)[0]])
    ours = patched_weights(run("", model=model, lora_stack=found)["stacked_model"])
    assert_same_but_for_rounding(ours, theirs)


def test_a_lora_stack_that_can_not_hold_a_row_fails_when_it_is_linked(base, files):
    model, _ = base
    hidden = {"unique_id": "7", "prompt": {"9": {"inputs": {"x": ["7", 2]}}}}
    rows = {"rows": [row(files[0], blocks={"IN": 0.5}), row(files[1], schedule="0:0, 1:1")]}
    with pytest.raises(ValueError) as error:
        run(rows, hidden)
    assert f"row 1 ({files[0]}) has block weights; row 2 ({files[1]}) has a schedule" in str(
        error.value
    )
    later = run(rows, {"unique_id": "7", "prompt": {}})["stacked_loras"]
    uses = (lambda: list(later), lambda: len(later), lambda: later + [], later.copy)
    own = (files[2], 1.0, 1.0)  # in place, as some packs do
    adds = (lambda: later.append(own), lambda: later.extend([own]), lambda: later.insert(0, own))
    adds += (lambda: operator.iadd(later, [own]), lambda: list(reversed(later)))
    for use in (*uses, *adds, lambda: [] + later, lambda: 1 in later):
        with pytest.raises(ValueError, match="has block weights"):
            use()
    lora = {"diffusion_model.x.lora_up.weight": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="lora_2 has no file"):
        run("", hidden, lora_2=lora)


def test_links_are_found():
    prompt = {"1": {"inputs": {"a": 1, "b": ["3:2", 2]}}, "2": {"inputs": {}}}
    assert is_linked(prompt, "3:2", 2)
    assert not is_linked(prompt, "3:2", 1) and not is_linked(prompt, "3", 2)
    assert not is_linked(None, "3", 2)


def test_names_as_other_packs_write_them(files):
    folder = folder_paths.get_folder_paths("loras")[0]
    spelled = [files[0].replace("/", "\\"), str(Path(folder) / files[0]), files[0]]
    spelled += [files[0].removesuffix(".safetensors"), Path(files[0]).name, Path(files[0]).stem]
    found = of_lora_stack([*((name, 1, 0.5) for name in spelled), ("None", 1, 1)])
    assert [entry.name for entry in found] == [files[0]] * 6
    assert as_lora_stack(found) == [(files[0], 1.0, 0.5)] * 6
    rows = parse_rows({"rows": [*({"name": name} for name in spelled), {"lora": "None"}]})
    assert [entry.name for entry in of_rows(rows)] == [files[0]] * 6


# --- what is refused


def test_missing_files_are_told_before_the_prompt_runs(files):
    rows = {
        "rows": [row("stack/0_lorra.safetensors"), row(files[1]), row("gone"), row("", on=False)]
    }
    said = StackNode.validate_inputs(rows=rows)
    assert 'row 1 (stack/0_lorra.safetensors): the LoRA file "stack/0_lorra.safetensors"' in said
    assert f'Did you mean "{files[0]}"?' in said and 'row 3 (gone): the LoRA file "gone"' in said
    assert "row 2" not in said and "row 4" not in said
    assert StackNode.validate_inputs(rows={"rows": [row(files[1])]}) is True
    assert StackNode.validate_inputs(rows=None) is True
    assert "not valid JSON" in StackNode.validate_inputs(rows="{")
    for blocks, problem in (("IN04=x", "IN04 is 'x'"), ([1, 2, 3], "3 block weights; known")):
        said = StackNode.validate_inputs(rows=[row(files[0]), row(files[1], blocks=blocks)])
        assert said.startswith("row 2: ") and problem in said
    assert StackNode.validate_inputs(rows=[row(files[0], blocks=[1.0] * 20)]) is True
    with pytest.raises(ValueError, match="row 1"):
        run(rows)


def test_everything_wrong_with_the_files_is_said_at_once(base, files):
    model, clip = base
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    (folder / "damaged.safetensors").write_bytes(b"nothing")
    rows = {"rows": [row("damaged.safetensors"), row(files[0], blocks={"IN77": 1})]}
    with pytest.raises(ValueError) as error:
        run(rows, model=model, clip=clip)
    assert "damaged.safetensors" in str(error.value)
    assert f"row 2 ({files[0]}): there is no block IN77; the model has BASE, IN00" in str(
        error.value
    )


def test_a_schedule_needs_mode_live(base, files):
    model, _ = base
    rows = {"rows": [row(files[0], schedule="0:0, 1:1")]}
    with pytest.raises(ValueError, match=r"row 1 \(.*\): a schedule needs mode live"):
        run(rows, model=model)
    assert run(rows)["stacked"][0].schedule is not None
    assert run(rows, model=model, mode="live")["stacked_model"] is not None
    with pytest.raises(ValueError, match="mode is 'other'"):
        run("", mode="other")


def test_incoming_stacks_that_are_something_else(files):
    with pytest.raises(ValueError) as error:
        run("", lora_stack=[(files[0], 1.0), ("gone", 1, 1), 5])
    for text in ("entry 1 of lora_stack: ", "entry 2 of lora_stack", "entry 3 of lora_stack"):
        assert text in str(error.value)


def test_strengths_of_an_incoming_stack_are_finite_as_those_of_rows_are(files):
    nan, inf = float("nan"), float("inf")
    given = [(files[0], nan, 1.0), (files[1], 1.0, -inf), (files[2], True, 1), (files[3], "x", 1)]
    with pytest.raises(ValueError) as error:
        of_lora_stack(given)
    assert str(error.value).splitlines() == [
        f"entry 1 of lora_stack ({files[0]}): the model strength is nan, not a number",
        f"entry 2 of lora_stack ({files[1]}): the clip strength is -inf, not a number",
        f"entry 3 of lora_stack ({files[2]}): the model strength is True, not a number",
        f"entry 4 of lora_stack ({files[3]}): the model strength is 'x', not a number",
    ]
    (entry,) = of_lora_stack([(files[0], np.float32(0.5), "0.25")])
    assert (entry.model, entry.clip) == (0.5, 0.25)


def test_other_packs_patches_before_and_after_keep_their_effect(base, files):
    model, clip = base
    rows = [row(name, 0.5) for name in files[:3]]
    before = host_nodes.LoraLoader().load_lora(model, clip, files[0], 0.5, 0.5)
    ours = run({"rows": rows[1:2]}, model=before[0], clip=before[1])
    after = host_nodes.LoraLoader().load_lora(
        ours["stacked_model"], ours["stacked_clip"], files[2], 0.5, 0.5
    )
    found = patched_weights(after[0], after[1].patcher)
    theirs = hosts_chain(model, clip, rows)
    assert_same_but_for_rounding(found, patched_weights(theirs[0], theirs[1].patcher))


def test_load_lora_is_a_stack_of_one(base, files):
    model, clip = base
    node = Load.PREPARE_CLASS_CLONE({})
    loaded = node.execute(files[0], 0.7, 0.3, model=model, clip=clip).args
    stacked = run({"rows": [row(files[0], 0.7, 0.3)]}, model=model, clip=clip)
    one = patched_weights(loaded[0], loaded[1].patcher)
    other = patched_weights(stacked["stacked_model"], stacked["stacked_clip"].patcher)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unloading_restores_every_bit(base, files):
    model, clip = base
    before = copy.deepcopy(dict(model.model.state_dict()))
    for mode in ("patch", "live"):
        found = run({"rows": [row(files[0]), row(files[1])]}, mode=mode, model=model)
        comfy.model_management.load_models_gpu([found["stacked_model"]], force_full_load=True)
        comfy.model_management.unload_all_models()
        after = model.model.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
