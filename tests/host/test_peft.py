"""Folders that PEFT saved of the host's own model: applied here as PEFT merges them there."""

import peft
import pytest
import torch

from lora_weave.lora_core.adapters import BiasGain
from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.apply import Entry, apply
from lora_weave.lora_core.host.models import key_map
from lora_weave.lora_core.host.trainee import trainee
from lora_weave.lora_core.key_map import BIAS
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.nodes.training_adapters import trained_layers

from ..core.tolerances import assert_close
from .families import build
from .one_step import OneStep
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


def test_ia3_is_trained_further(tmp_path):
    """PEFT's factor is that of the weight and of the bias, so its gradient is their sum."""
    patcher = build("SD1.5", inference=False)
    theirs = peft.get_peft_model(patcher.model.diffusion_model, CONFIGS["ia3"]())
    generator = torch.Generator().manual_seed(0)
    for name, factor in theirs.named_parameters():
        if "ia3_l" in name:
            factor.data += 0.1 * torch.randn(factor.shape, generator=generator)
    theirs.save_pretrained(str(tmp_path))
    with trainee(patcher):
        factors = {
            name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): parameter
            for name, parameter in theirs.named_parameters()
            if "ia3_l" in name
        }
        for factor in factors.values():
            factor.requires_grad_()
        OneStep.of(patcher, "SD1.5").backward()
        expected = {PREFIX + name: factor.grad.flatten() for name, factor in factors.items()}

    with torch.inference_mode():
        model = build("SD1.5")
        adapters = LoraFile.read(tmp_path, key_map(model, None)).adapters
        assert any(isinstance(adapter, BiasGain) for adapter in adapters.values())
        with trainee(model):
            layers = trained_layers(model, None)
            with attached(layers.modules, adapters, layers.facts):
                step = OneStep.of(model, "SD1.5")
                before = step.backward()
                parameters = {path: next(it.parameters()) for path, it in adapters.items()}
                found = {path: parameter.grad for path, parameter in parameters.items()}
                torch.optim.SGD(parameters.values(), lr=1e-3).step()
                after = step.loss()
    assert after < before
    assert found.keys() - expected.keys() == {path for path in found if path.endswith(BIAS)}
    for path, gradient in expected.items():
        gain = found.get(path + BIAS, torch.zeros(()))
        total = found[path].flatten() + gain.flatten()
        # Observed: 4e-6.
        assert (total - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, path
