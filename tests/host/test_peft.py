"""Folders that PEFT saved of the host's own model: applied here as PEFT merges them there."""

import peft
import pytest
import torch

from lora_weave.lora_core.host.apply import Entry, apply
from lora_weave.lora_core.host.models import key_map
from lora_weave.lora_core.lora_file import LoraFile

from ..core.tolerances import assert_close
from .families import build
from .test_apply import patched_weights

PREFIX = "diffusion_model."
TARGETS = r"(input|output)_blocks.*\.(attn1\.to_q|attn2\.to_k|proj_in|ff\.net\.2|out_layers\.3)"
CONFIGS = {
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
    "oft-exact": lambda: peft.OFTConfig(
        target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False
    ),
    "oft-shared": lambda: peft.OFTConfig(
        target_modules=TARGETS, oft_block_size=4, block_share=True, coft=True, eps=0.1
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=TARGETS, feedforward_modules=r".*(ff\.net\.2|to_q)"
    ),
    "lora": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=6, use_rslora=True),
    "dora": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=6, use_dora=True),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=2, alpha=3),
    "lokr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=2, alpha=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_applied_as_peft_merges_it(name, tmp_path):
    base = patched_weights(build("SD1.5"))
    theirs = peft.get_peft_model(
        build("SD1.5", inference=False).model.diffusion_model, CONFIGS[name]()
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path))
    merged = dict(theirs.merge_and_unload().named_parameters())

    model = build("SD1.5")
    lora = LoraFile.read(tmp_path, key_map(model, None))
    weights = [path for path in lora.adapters if not path.endswith(".bias")]
    assert len(weights) == 30 and lora.dialect == "PEFT"
    for strength in (1.0, 0.5, -1.5):
        found = patched_weights(apply(model, None, [Entry(lora.adapters, strength, 0.0)])[0])
        changed = 0
        for key, weight in base.items():
            end = merged[key.removeprefix(PREFIX)].detach()
            expected = weight + strength * (end - weight)
            changed += not torch.equal(end, weight)
            assert_close(found[key], expected)
        assert changed == len(lora.adapters)
