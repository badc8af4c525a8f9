"""What a training step costs: our step, core's TrainLoraNode, and the floor under both.

One SD1.5-size UNet with random weights, 256x256 px, batch 1, rank 16 on every linear and
convolution layer, no gradient checkpointing. The floor is the frozen model's forward and the
backward to its input, without adapters. Each case lives in a process of its own, and the
processes step in turn.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
from measure import MB, Clock, Outcome, Row, Worker, interleaved, note, report

RANK = 16
LATENT_SHAPE = (1, 4, 32, 32)  # 256x256 px
TOKENS = 77
TIME_LIMIT = 1.15  # x the floor
BF16_TIME_LIMIT = 0.55  # x the fp32 floor
PEAK_SLACK = 1.05
WARMUPS = 2

_SD15 = {  # what the host's model_detection finds in an SD1.5 checkpoint
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
UNETS = {
    "sd15": _SD15,
    "tiny": _SD15
    | {
        "model_channels": 64,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "context_dim": 96,
    },
}


def main() -> int:
    options = _arguments()
    comfyui = measure.comfyui_path(options.comfyui)
    common = {"comfyui": comfyui, "size": options.size}
    limited = options.size == "sd15"
    rows: list[Row] = []
    other_load = measure.OtherLoad()

    def start(name: str, case: measure.Case, **settings: Any) -> Worker:
        note(f"setting up {name}")
        return Worker(name, case, options.device, **common, **settings)

    floor = start("floor", run_floor)
    ours = [
        start(f"lora-weave {dtype}", run_ours, dtype=dtype, steps=WARMUPS + options.rounds)
        for dtype in ("fp32", "bf16")
    ]
    seconds = interleaved([floor, *ours], WARMUPS, options.rounds)
    outcomes = {worker.name: worker.finish() for worker in ours}
    for mode in () if options.no_core else core_modes(comfyui):
        name = f"core TrainLoraNode, {mode}"
        core = start(name, run_core, mode=mode, steps=1 + WARMUPS + options.rounds)
        together = interleaved([floor, core], WARMUPS, options.rounds)
        # Memory does not hold all cases at once, so core has a floor timed beside it.
        beside = f"floor beside {name}"
        seconds |= {name: together[name], beside: together["floor"]}
        outcomes[name] = core.finish()
    outcomes["floor"] = floor.finish()

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
    rows.append(row("floor", "floor"))
    rows.append(row("lora-weave fp32", "floor", TIME_LIMIT, peak_limit))
    has_bf16 = outcomes["lora-weave bf16"].facts["has_bf16"]
    rows.append(row("lora-weave bf16", "floor", BF16_TIME_LIMIT if has_bf16 else None))
    for name in outcomes:
        if name.startswith("core"):
            rows += [row(f"floor beside {name}", "floor"), row(name, f"floor beside {name}")]
    if not has_bf16:
        notes.append("No limit for bf16: this machine has no bf16 instructions.")
    if not limited:
        notes.append(f"No limits: they hold for an SD1.5-size UNet, this one is {options.size}.")
    notes += other_load.note()
    return report("train_step", measure.machine(comfyui), rows, notes, options.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each case")
    parser.add_argument("--comfyui", help="a ComfyUI folder; else $LORA_WEAVE_COMFYUI, else .host")
    parser.add_argument("--size", choices=tuple(UNETS), default="sd15", help="tiny has no limits")
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

    patcher = build(size, "fp32", device)
    patcher.model.requires_grad_(False)  # 0.3.75 leaves it on, and would compute weight gradients
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    generator = torch.Generator().manual_seed(1)
    place = patcher.load_device
    x_t = torch.randn(LATENT_SHAPE, generator=generator).to(place).requires_grad_()
    context = conditioning(size)[0][0].to(place)
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

    from lora_weave.lora_core import targets
    from lora_weave.lora_core.adapters import adapter_type
    from lora_weave.lora_core.attach import attached
    from lora_weave.lora_core.host import denoiser, models, trainee
    from lora_weave.lora_core.training import config, defaults, loop

    with torch.inference_mode():
        patcher = build(size, dtype, device)
        prompt = conditioning(size)
        samples = latents(patcher)
    with trainee.trainee(patcher):
        layers = models.unet_layers(patcher)
        denoise = denoiser.HostDenoiser(patcher)
        resolved = defaults.resolve(
            config.TrainConfig(rank=RANK, batch_size=1, steps=steps + 1),
            config.TrainOptions(targets="all linear + conv", gradient_checkpointing=False),
            defaults.ModelFacts(
                family=models.family_name(patcher),
                is_flow=denoise.is_flow,
                max_sigma=float(patcher.model.model_sampling.sigma_max),
            ),
            num_images=len(samples),
        )
        generator = torch.Generator().manual_seed(0)
        lora = adapter_type(resolved.train.algorithm)
        adapters = {
            path: lora.create(layers.facts[path].shape, RANK, RANK, generator=generator)
            for path in targets.select(targets.shapes(layers.shapes()), resolved.options.targets)
        }
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


def _examples(patcher: Any, denoise: Any, samples: Any, prompt: Any) -> Any:
    """Encoded images as the dataset's cache gives them."""
    from lora_weave.lora_core.training import examples

    encoded = [patcher.model.process_latent_in(one.clone()).float() for one in samples]
    prepared = denoise.prepare(prompt, encoded[0], None)

    class InTurn:
        def batch(self, index: int) -> list[int]:
            return [index % len(encoded)]

    return examples.Examples(InTurn(), encoded, lambda item, dropped: prepared)


def core_modes(comfyui: Path) -> tuple[str, ...]:
    """The modes of core's node in this host: 0.3.75 has no bypass_mode."""
    source = (comfyui / "comfy_extras" / "nodes_train.py").read_text(encoding="utf-8")
    return ("default", "bypass_mode") if "bypass_mode" in source else ("default",)


def run_core(
    clock: Clock, *, device: str, comfyui: Path, size: str, mode: str, steps: int
) -> dict[str, Any]:
    """Core's own node, run as the host's executor runs it; its progress bar is our clock."""
    measure.enter(comfyui, device)
    import comfy.utils
    import torch
    from comfy_extras import nodes_train

    class Bar:
        def __init__(self, total: int) -> None:
            pass

        def update(self, value: int) -> None:  # after each optimizer step
            clock.tick()

    nodes_train.ProgressBar = Bar
    comfy.utils.PROGRESS_BAR_ENABLED = False
    settings = {
        "batch_size": 1,
        "steps": steps,
        "grad_accumulation_steps": 1,
        "learning_rate": 2e-4,
        "rank": RANK,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": mode == "bypass_mode",
    }
    node = nodes_train.TrainLoraNode
    known = inspect.signature(node.execute).parameters
    with torch.inference_mode():
        patcher = build(size, "fp32", device)
        # 0.33 trains a second copy, which it loads from disk through this; here it is built anew.
        patcher.cached_patcher_init = (_rebuild, (size, "fp32", device))
        node.execute(
            model=[patcher],
            latents=[{"samples": samples} for samples in latents(patcher)],
            positive=[conditioning(size)],
            **{name: [value] for name, value in settings.items() if name in known},
        )
    return {}


def _rebuild(size: str, dtype: str, device: str, disable_dynamic: bool = False) -> Any:
    return build(size, dtype, device)


def build(size: str, dtype: str, device: str) -> Any:
    """A MODEL of SD1.5's class with seeded random weights of variance 1/fan-in."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(dict(UNETS[size]))
    config.set_inference_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], None)
    model = config.get_model({}, "", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                bound = (3.0 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=torch.device(device), offload_device=torch.device("cpu")
    )


def latents(patcher: Any) -> list[Any]:
    """Two images' latents as a VAE gives them; 0.3.75's node takes no single one."""
    import torch

    generator = torch.Generator().manual_seed(2)
    noise = (torch.randn(LATENT_SHAPE, generator=generator) for _ in range(2))
    return [patcher.model.latent_format.process_out(one) for one in noise]


def conditioning(size: str) -> list[list[Any]]:
    """One prompt's CONDITIONING."""
    import torch

    generator = torch.Generator().manual_seed(3)
    width = UNETS[size]["context_dim"]
    return [[torch.randn((1, TOKENS, width), generator=generator), {}]]


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
    """0.33 runs some kernels without a backward unless it is told."""
    import comfy.model_management

    if hasattr(comfy.model_management, "in_training"):
        comfy.model_management.in_training = True
    yield


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
