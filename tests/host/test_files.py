"""Files that are written here give the same weights in the host, PEFT and LyCORIS as read here.

Every type on every kind of layer, in every precision of a file, wherever the tool knows the type
and computes it rightly. The formula, in float64, is what our own reading is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.utils
import peft
import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters.ia3 import IA3
from lora_weave.lora_core.adapters.oft_input import InputOFT
from lora_weave.lora_core.key_map import KeyMap, LayerKey
from lora_weave.lora_core.lora_file import LoraFile

from ..core import closed_forms
from ..core.layer_kinds import cases
from ..core.peers import peft_applies, plain_layer, weight_of
from ..core.samples import Sample, samples
from ..core.tolerances import assert_close

PATH, KOHYA = "diffusion_model.layer", "lycoris_layer"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
OUR_TYPES = ("lora", "loha", "lokr", "full", "oft", "boft", "ia3", "glora")
STRENGTHS = (0.5, 1.0, 2.0, -1.0)


@dataclass(frozen=True)
class FileSample(Sample):
    """A sample whose tensors are rounded to a file's precision."""

    file_dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = super().tensors
        return {
            name: tensor if name == "alpha" else tensor.to(self.file_dtype).to(self.dtype)
            for name, tensor in named.items()
        }

    @property
    def keymap(self) -> KeyMap:
        names = ("base_model.model.layer", "unet.layer")
        layer = LayerKey(PATH, self.shape, KOHYA, names, diffusers=("unet.layer",))
        return KeyMap("SD1.5", {PATH: layer})


@dataclass(frozen=True)
class Tool:
    """`changed` gives W + strength · ΔW from a file in a `format`, or a PEFT folder."""

    applies: Callable[[Sample], bool]
    changed: Callable[[Path, FileSample, float], Tensor]
    format: str = "kohya"
    strengths: Callable[[Sample], tuple[float, ...]] = lambda sample: STRENGTHS


def host_applies(sample: Sample) -> bool:
    """Where the host has no bug that is known.

    Its DoRA along the out axis takes the norm of the original weight, its Tucker forms know Conv2d
    alone, its Tucker LoKr none, and it multiplies a whole w2 that has one kernel axis or three by
    w1 on the wrong axes. It leaves out OFT's rescale, takes a constraint as it is, and knows no
    (IA)³ and no rotation of inputs. `tests/core/test_known_bugs.py` has the sizes.
    """
    names, is_2d = sample.tensors.keys(), len(sample.shape) in (2, 4)
    if sample.case.name in ("full", "glora"):
        return True
    if sample.case.name in ("oft", "boft"):
        unlike = sample.case.options.constraint or "oft_R.weight" in names
        has_pairs = sample.case.name == "oft" or sample.rank % 2 == sample.shape[0] % 2 == 0
        return not unlike and has_pairs and ("rescale" not in names or sample.case.name == "boft")
    if sample.case.name not in ("lora", "loha", "lokr") or sample.magnitude not in (None, "in"):
        return False
    if "lokr_t2" in names:
        return False
    return is_2d or not {"lora_mid.weight", "hada_t1", "lokr_w2"} & names


def host_strengths(sample: Sample) -> tuple[float, ...]:
    """It applies the strength of a rotation twice."""
    return (1.0,) if sample.case.name in ("oft", "boft") else STRENGTHS


def host_changed(file: Path, sample: FileSample, strength: float) -> Tensor:
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    return hosts_weight(tensors, sample.weight, strength)


def hosts_weight(tensors: dict[str, Tensor], weight: Tensor, strength: float) -> Tensor:
    """The patched weight in `weight`'s dtype, which the host's patcher makes float32."""
    known = {KOHYA: "w.weight", PATH: "w.weight"}
    patches = comfy.lora.load_lora(tensors, known, log_missing=False)
    patch = (strength, patches["w.weight"], 1.0, None, None)
    changed = comfy.lora.calculate_weight(
        [patch], weight.clone(), "w.weight", intermediate_dtype=weight.dtype
    )
    assert not torch.equal(changed, weight)  # the host logs an error and goes on
    return changed


def folder_applies(sample: Sample) -> bool:
    """LoRA, LoHa, (IA)³ and the rotation of inputs, on the layers that PEFT has them for."""
    adapter, axes = sample.adapter(), len(sample.shape)
    if isinstance(adapter, InputOFT):
        return axes == 2 or axes == 4 and sample.shape[2] == sample.shape[3]
    if isinstance(adapter, IA3):
        return axes != 3
    is_tucker_1d = axes == 3 and "hada_t1" in sample.tensors
    return sample.case.name in ("lora", "loha") and peft_applies(sample) and not is_tucker_1d


def folder_changed(folder: Path, sample: FileSample, strength: float) -> Tensor:
    model = peft.PeftModel.from_pretrained(nn.ModuleDict({"layer": plain_layer(sample)}), folder)
    merged = model.merge_and_unload()["layer"].weight.detach()
    return sample.weight + strength * (merged - sample.weight)


def lycoris_applies(sample: Sample) -> bool:
    """What `create_lycoris_from_weights` makes rightly: DoRA along the out axis, no Tucker LoKr, no
    OFT whose blocks are larger than their number, and no (IA)³, for which it raises.
    """
    if sample.case.name in ("oft", "boft"):
        blocks = sample.tensors.get("oft_blocks")
        if sample.case.name == "oft":
            return blocks is not None and blocks.shape[1] <= blocks.shape[0]
        return sample.shape[0] % 2 == 0
    known = sample.case.name in ("lora", "loha", "lokr", "full", "glora")
    return known and sample.magnitude != "in" and "lokr_t2" not in sample.tensors


def lycoris_changed(file: Path, sample: FileSample, strength: float) -> Tensor:
    from lycoris import create_lycoris_from_weights

    model = nn.ModuleDict({"layer": plain_layer(sample)})
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    assert len(network.loras) == 1
    network.apply_to()
    return sample.weight + strength * (weight_of(model["layer"], sample) - sample.weight)


def formula_changed(file: Path, sample: FileSample, strength: float) -> Tensor:
    return closed_forms.changed(sample, strength)


TOOLS = {
    "formula": Tool(lambda sample: sample.case.name in closed_forms.FORMULAS, formula_changed),
    "host": Tool(host_applies, host_changed, strengths=host_strengths),
    "host-comfyui": Tool(host_applies, host_changed, "comfyui", host_strengths),
    "PEFT": Tool(folder_applies, folder_changed, "PEFT folder"),
    "LyCORIS": Tool(lycoris_applies, lycoris_changed),
}


def written() -> list[Sample]:
    """The samples without those that are written alike: (O,) as (O, 1), and kinds of one shape."""
    kinds: dict[tuple[int, ...], str] = {}
    found = [sample for sample in samples() if sample.magnitude != "1d"]
    return [one for one in found if kinds.setdefault(one.shape, one.kind) == one.kind]


CASES = [
    pytest.param(FileSample(**vars(sample)), tool, id=f"{sample}-{tool}")
    for sample in written()
    for tool in TOOLS
    if TOOLS[tool].applies(sample)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("sample", "tool"), CASES)
def test_a_written_file_gives_the_same_weight_everywhere(
    tmp_path: Path,
    sample: FileSample,
    tool: str,
    dtype: torch.dtype,
    count_case: Callable[..., None],
) -> None:
    sample = FileSample(**{**vars(sample), "file_dtype": dtype})
    lora, path = LoraFile({PATH: sample.adapter()}), tmp_path / "x.safetensors"
    if TOOLS[tool].format == "PEFT folder":
        lora.save_peft(tmp_path, sample.keymap, dtype=dtype)
        path = tmp_path
    else:
        lora.save(path, sample.keymap, format=TOOLS[tool].format, dtype=dtype)
    ours = LoraFile.read(path, sample.keymap).adapters[PATH]
    assert ours.tensors().keys() == sample.adapter().tensors().keys()
    change = ours.delta(sample.weight).detach()
    for strength in TOOLS[tool].strengths(sample):
        expected = TOOLS[tool].changed(path, sample, strength)
        assert_close(sample.weight + strength * change, expected.detach().to(sample.weight.dtype))
    count_case("file oracles", forms=sample.form, layers=sample.kind, dtypes=dtype, oracles=tool)


def test_every_form_is_read_by_another_tool_or_none_has_it_right() -> None:
    read: dict[str, set[str]] = {}
    for case in CASES:
        sample, tool = case.values
        read.setdefault(sample.form, set()).add(tool)
    known = {sample.form for sample in written() if sample.case.name in OUR_TYPES}
    assert {form for form in known if read[form] == {"formula"}} == {
        *("lokr-tucker", "lokr-tucker+dora-out", "lokr-tucker+dora-in")
    }


def test_lokr_with_two_ranks_is_scaled_by_that_of_w2() -> None:
    """No trainer writes such a file, and only the host loads one."""
    case = cases()["lokr-both"]
    sample = Sample("lokr-both", case, "linear", dtype=torch.float64)
    tensors = sample.tensors
    for name, axis in (("lokr_w1_a", 1), ("lokr_w1_b", 0)):
        tensors[name] = torch.cat([tensors[name], 0.5 * tensors[name]], axis)
    assert [len(tensors[name]) for name in ("lokr_w1_b", "lokr_w2_b")] == [2, 1]
    found = case.type.from_tensors(tensors, sample.shape).delta(sample.weight)
    named = {f"{KOHYA}.{name}": tensor for name, tensor in tensors.items()}
    assert_close(sample.weight + found, hosts_weight(named, sample.weight, 1.0))
