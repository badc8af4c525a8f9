"""What a training step costs: our step, core's TrainLoraNode, and the floor under both.

One SD1.5-size UNet with random weights, 256x256 px, batch 1, rank 16 on every linear and
convolution layer, no gradient checkpointing. The floor is the frozen model's forward and the
backward to its input, without adapters. Each case lives in a process of its own, and the
processes step in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import core_trainer
import measure
import sd15
from measure import MB, Clock, Outcome, Row, Worker, interleaved, note, report

RANK = 16
TIME_LIMIT = 1.15  # x the floor
BF16_TIME_LIMIT = 0.55  # x the fp32 floor
PEAK_SLACK = 1.05
WARMUPS = 2
Measured = tuple[dict[str, float], dict[str, Outcome]]  # seconds and outcomes, by case


def main() -> int:
    options = _arguments()
    comfyui = measure.comfyui_path(options.comfyui)
    other_load = measure.OtherLoad()
    measured = _measure(options, comfyui)
    rows, notes = _judged(*measured, size=options.size)
    notes += other_load.note()
    return report("train_step", measure.machine(comfyui), rows, notes, options.json)


def _measure(options: argparse.Namespace, comfyui: Path) -> Measured:
    """Run all cases: the floor beside ours, then beside each mode of core's node."""

    def start(name: str, case: measure.Case, **settings: Any) -> Worker:
        note(f"setting up {name}")
        return Worker(name, case, options.device, comfyui=comfyui, size=options.size, **settings)

    floor = start("floor", run_floor)
    ours = [
        start(f"lora-weave {dtype}", run_ours, dtype=dtype, steps=WARMUPS + options.rounds)
        for dtype in ("fp32", "bf16")
    ]
    seconds = interleaved([floor, *ours], WARMUPS, options.rounds)
    outcomes = {worker.name: worker.finish() for worker in ours}
    for mode in () if options.no_core else core_trainer.modes(comfyui):
        name = f"core TrainLoraNode, {mode}"
        steps = 1 + WARMUPS + options.rounds
        core = start(name, core_trainer.run, mode=mode, rank=RANK, steps=steps)
        together = interleaved([floor, core], WARMUPS, options.rounds)
        # Memory does not hold all cases at once, so core has a floor timed beside it.
        beside = f"floor beside {name}"
        seconds |= {name: together[name], beside: together["floor"]}
        outcomes[name] = core.finish()
    outcomes["floor"] = floor.finish()
    return seconds, outcomes


def _judged(
    seconds: dict[str, float], outcomes: dict[str, Outcome], *, size: str
) -> tuple[list[Row], list[str]]:
    """The report's rows, with limits where they hold, and what there is to say about them."""
    limited = size == "sd15"

    def row(name: str, base: str, limit: float | None = None, peak: float | None = None) -> Row:
        return Row(
            case=name,
            base=base,
            seconds=seconds[name],
            ratio=seconds[name] / seconds[base],
            limit=limit if limited else None,
            peak_mb=outcomes["floor" if name.startswith("floor") else name].peak_mb,
            peak_limit_mb=peak if limited else None,
        )

    peak_limit, notes = _peak_limit(outcomes)
    has_bf16 = outcomes["lora-weave bf16"].facts["has_bf16"]
    rows = [row("floor", "floor"), row("lora-weave fp32", "floor", TIME_LIMIT, peak_limit)]
    rows.append(row("lora-weave bf16", "floor", BF16_TIME_LIMIT if has_bf16 else None))
    for name in outcomes:
        if name.startswith("core"):
            rows += [row(f"floor beside {name}", "floor"), row(name, f"floor beside {name}")]
    if not has_bf16:
        notes.append("No limit for bf16: this machine has no bf16 instructions.")
    if not limited:
        notes.append(f"No limits: they hold for an SD1.5-size UNet, this one is {size}.")
    return rows, notes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each case")
    parser.add_argument("--comfyui", help="a ComfyUI folder; else $LORA_WEAVE_COMFYUI, else .host")
    parser.add_argument(
        "--size", choices=tuple(sd15.UNETS), default="sd15", help="tiny has no limits"
    )
    parser.add_argument("--no-core", action="store_true", help="leave out core's TrainLoraNode")
    return parser.parse_args()


def _peak_limit(outcomes: dict[str, Outcome]) -> tuple[float, list[str]]:
    """The most that our peak may be, in MB, and how it comes about."""
    floor, ours = outcomes["floor"], outcomes["lora-weave fp32"].facts
    inputs_mb = floor.facts["input_bytes"] / MB
    adapters_mb = ours["adapter_bytes"] / MB
    limit = (floor.peak_mb + inputs_mb + adapters_mb) * PEAK_SLACK
    return limit, [
        f"Inputs of the {ours['num_layers']} adapted layers: {inputs_mb:.0f} MB "
        f"in {floor.facts['num_inputs']} storages, each counted once.",
        f"Adapters, their gradients and the optimizer's two moments: {adapters_mb:.0f} MB.",
        f"Peak limit: ({floor.peak_mb:.0f} + {inputs_mb:.0f} + {adapters_mb:.0f}) MB "
        f"x {PEAK_SLACK:g} = {limit:.0f} MB.",
    ]


def run_floor(clock: Clock, *, device: str, comfyui: Path, size: str) -> dict[str, Any]:
    """The frozen float32 model, forward and backward to its input; nothing of ours runs."""
    measure.enter(comfyui, device)
    import comfy.model_management
    import torch

    patcher = sd15.build(size, "fp32", device)
    patcher.model.requires_grad_(False)  # 0.3.75 leaves it on, and would compute weight gradients
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    generator = torch.Generator().manual_seed(1)
    place = patcher.load_device
    x_t = torch.randn(sd15.LATENT_SHAPE, generator=generator).to(place).requires_grad_()
    context = sd15.conditioning(size)[0][0].to(place)
    sigma = torch.full((1,), 3.0, device=place)

    def forward() -> torch.Tensor:
        options = {"optimized_attention_override": _same_attention}
        return patcher.model.apply_model(
            x_t, sigma, c_crossattn=context, transformer_options=options
        )

    with _in_training():
        while clock.tick():
            x_t.grad = None
            forward().square().mean().backward()
        with held_inputs(patcher) as inputs:
            forward()
        return {"num_inputs": len(inputs), "input_bytes": sum(inputs.values())}


def run_ours(
    clock: Clock, *, device: str, comfyui: Path, size: str, dtype: str, steps: int
) -> dict[str, Any]:
    """`Training.steps` on the host's live model, as the training node runs it."""
    measure.enter(comfyui, device)
    import torch

    from lora_weave.lora_core.attach import attached
    from lora_weave.lora_core.host import denoiser, models, trainee
    from lora_weave.lora_core.training import loop

    with torch.inference_mode():
        patcher = sd15.build(size, dtype, device)
        prompt = sd15.conditioning(size)
        samples = sd15.latents(patcher)
    with trainee.trainee(patcher):
        layers = models.unet_layers(patcher)
        denoise = denoiser.HostDenoiser(patcher)
        resolved = _settings(patcher, denoise, num_images=len(samples), steps=steps + 1)
        adapters = _adapters(layers, resolved)
        training = loop.Training(resolved, adapters, denoise.device)
        with attached(layers.modules, adapters, layers.facts):
            events = training.steps(_examples(patcher, denoise, samples, prompt), denoise)
            next(events)  # Started; the first warm-up below takes two steps, then each takes one
            while clock.tick():
                next(events)
    num_weights = sum(parameter.numel() for parameter in training.parameters)
    return {
        "num_layers": len(adapters),
        "adapter_bytes": 4 * 4 * num_weights,  # weight, gradient, two moments, float32
        "has_bf16": _has_bf16(device),
    }


def _settings(patcher: Any, denoise: Any, *, num_images: int, steps: int) -> Any:
    """What the training node would resolve, at this benchmark's rank and layers."""
    from lora_weave.lora_core.host import models
    from lora_weave.lora_core.training import config, defaults

    return defaults.resolve(
        config.TrainConfig(rank=RANK, batch_size=1, steps=steps),
        config.TrainOptions(targets="all linear + conv", gradient_checkpointing=False),
        defaults.ModelFacts(
            family=models.family_name(patcher),
            is_flow=denoise.is_flow,
            max_sigma=float(patcher.model.model_sampling.sigma_max),
        ),
        num_images=num_images,
    )


def _adapters(layers: Any, resolved: Any) -> dict[str, Any]:
    """A fresh adapter for each chosen layer, by its path."""
    import torch

    from lora_weave.lora_core import targets
    from lora_weave.lora_core.adapters import adapter_type

    generator = torch.Generator().manual_seed(0)
    lora = adapter_type(resolved.train.algorithm)
    return {
        path: lora.create(layers.facts[path].shape, RANK, RANK, generator=generator)
        for path in targets.select(targets.shapes(layers.shapes()), resolved.options.targets)
    }


def _examples(patcher: Any, denoise: Any, samples: Any, prompt: Any) -> Any:
    """Encoded images as the dataset's cache gives them."""
    from lora_weave.lora_core.training import examples

    encoded = [patcher.model.process_latent_in(one.clone()).float() for one in samples]
    prepared = denoise.prepare(prompt, encoded[0], None)

    class InTurn:
        def batch(self, index: int) -> list[int]:
            return [index % len(encoded)]

    return examples.Examples(InTurn(), encoded, lambda item, dropped: prepared)


@contextmanager
def held_inputs(patcher: Any) -> Iterator[dict[int, int]]:
    """Fills {storage: bytes} with the inputs of the adaptable layers that run in the context.

    They are held until it ends, so that no storage is counted for two inputs.
    """
    from lora_weave.lora_core.host import models

    held: list[Any] = []
    sizes: dict[int, int] = {}

    def hold(module: Any, args: tuple[Any, ...]) -> None:
        storage = args[0].untyped_storage()
        held.append(storage)
        sizes[storage.data_ptr()] = storage.nbytes()

    layers = models.unet_layers(patcher).modules.values()
    handles = [layer.register_forward_pre_hook(hold) for layer in layers]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_training() -> Iterator[None]:
    """0.33 runs some kernels without a backward unless it is told; 0.3.75 has no such flag."""
    import comfy.model_management

    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _same_attention(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention that our own step uses."""
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)


def _has_bf16(device: str) -> bool:
    """Whether the machine multiplies bf16 numbers faster than float32 ones."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


if __name__ == "__main__":
    sys.exit(main())
