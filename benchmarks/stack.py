"""What a stack of LoRAs costs: from the queue to patched weights, a change of strengths, a step.

Five rank-32 LoRA files of every linear and convolution layer, in float16, on an SD1.5-size UNet
with random weights: LoRA Stack beside core's chain of LoraLoaderModelOnly nodes. Each case lives in
a process of its own, and the processes of a comparison work in turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import sd15
from measure import Clock, Row, Worker, interleaved, note, report

NUM_LORAS, RANK = 5, 32
TIME_LIMIT = 0.45  # x core's chain, with files cached
STEP_LIMIT = 1.3  # a sampling step in mode live, x one with patched weights
WARMUPS = 1
TASKS = ("cold", "warm", "change", "step")
LATENT_PX = 64  # 512x512 px


def main() -> int:
    options = _arguments()
    comfyui = measure.comfyui_path(options.comfyui)
    other_load = measure.OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        maker = _start(make_files, "files", options, comfyui, folder)
        maker.step()
        maker.finish()
        rows = [
            row
            for task in options.tasks
            for row in (
                _sampling(options, comfyui, folder)
                if task == "step"
                else _applying(task, options, comfyui, folder)
            )
        ]
    return report("stack", measure.machine(comfyui), rows, other_load.note(), options.json)


def _start(
    case: Any, name: str, options: argparse.Namespace, comfyui: Path, folder: str, **settings: Any
) -> Worker:
    note(f"setting up {name}")
    fixed = {"comfyui": comfyui, "size": options.size, "folder": folder}
    return Worker(name, case, options.device, **fixed, **settings)


def _applying(task: str, options: argparse.Namespace, comfyui: Path, folder: str) -> list[Row]:
    """Core's chain and ours at one task, each beside core's; live too where a strength changes.

    Only two at a time, since memory does not hold more: a patched model has its weights twice.
    """
    modes = ("patch", "live") if task == "change" else ("patch",)
    rows: list[Row] = []
    for mode in modes:
        core = f"core's loaders, {task}" + (" (beside live)" if mode == "live" else "")
        ours = f"lora-weave {mode}, {task}"
        workers = [
            _start(run_core, core, options, comfyui, folder, task=task),
            _start(run_ours, ours, options, comfyui, folder, task=task, mode=mode),
        ]
        limit = TIME_LIMIT if task == "warm" else None
        rows += _compared(workers, limit, options)
    return rows


def _sampling(options: argparse.Namespace, comfyui: Path, folder: str) -> list[Row]:
    """A sampling step with patched weights and with the stack beside them."""
    workers = [
        _start(run_step, f"lora-weave {mode}, step", options, comfyui, folder, mode=mode)
        for mode in ("patch", "live")
    ]
    return _compared(workers, STEP_LIMIT, options)


def _compared(workers: list[Worker], limit: float | None, options: argparse.Namespace) -> list[Row]:
    """Rows of workers in turn, the first one the base, the others limited on the real size."""
    seconds = interleaved(workers, WARMUPS, options.rounds)
    base, rows = workers[0].name, []
    for worker in workers:
        is_limited = worker.name != base and options.size == "sd15"
        rows.append(
            Row(
                case=worker.name,
                base=base,
                seconds=seconds[worker.name],
                ratio=seconds[worker.name] / seconds[base],
                limit=limit if is_limited else None,
                peak_mb=worker.finish().peak_mb,
            )
        )
    return rows


def make_files(
    clock: Clock, *, device: str, comfyui: Path, size: str, folder: str
) -> dict[str, Any]:
    """LoRA files with random numbers, each on every layer."""
    measure.enter(comfyui, "cpu")
    import torch

    from lora_weave.lora_core.adapters import adapter_type
    from lora_weave.lora_core.host import models
    from lora_weave.lora_core.lora_file import LoraFile

    patcher = sd15.build(size, "fp32", "cpu")
    facts, keymap = models.unet_layers(patcher).facts, models.key_map(patcher, None)
    while clock.tick():
        for number in range(NUM_LORAS):
            generator = torch.Generator().manual_seed(number)
            adapters = {}
            for path, layer in facts.items():
                made = adapter_type("lora").create(layer.shape, RANK, RANK, generator=generator)
                made.up.data.normal_(std=1e-3, generator=generator)
                adapters[path] = made
            path = Path(folder) / f"lora{number}.safetensors"
            LoraFile(adapters).save(path, keymap, dtype=torch.float16)
    return {}


def run_core(
    clock: Clock, *, device: str, comfyui: Path, size: str, folder: str, task: str
) -> dict[str, Any]:
    """A chain of core's loaders, one node a file, and the host's patching."""
    patcher = _model(comfyui, device, size, folder)
    import torch

    import nodes

    def make() -> list[Any]:
        return [nodes.LoraLoaderModelOnly() for _ in range(NUM_LORAS)]

    loaders = make()

    def apply(turn: int) -> Any:
        model = patcher
        for name, strength, loader in zip(_names(), _strengths(turn), loaders, strict=True):
            (model,) = loader.load_lora_model_only(model, name, strength)
        return model

    with torch.inference_mode():
        turn = 0
        while clock.tick():
            turn += 1
            if task == "cold":
                loaders = make()
            _ready(patcher, task, clock)
            _load(apply(turn))
    return {}


def run_ours(
    clock: Clock,
    *,
    device: str,
    comfyui: Path,
    size: str,
    folder: str,
    task: str,
    mode: str = "patch",
) -> dict[str, Any]:
    """LoRA Stack, and the host's patching."""
    patcher = _model(comfyui, device, size, folder)
    import torch

    from lora_weave.lora_core import lora_file
    from lora_weave.nodes import stack_run

    with torch.inference_mode():
        turn = 0
        while clock.tick():
            turn += 1
            if task == "cold":
                lora_file.forget_files()
                stack_run.Grams.forget()
            _ready(patcher, task, clock)
            _load(_stacked(patcher, turn, mode))
            assert mode == "patch" or not patcher.backup, "a weight was patched in mode live"
    return {}


def run_step(
    clock: Clock, *, device: str, comfyui: Path, size: str, folder: str, mode: str
) -> dict[str, Any]:
    """One call of the model, prompt and empty prompt in a batch, as a sampler's step makes it."""
    patcher = _model(comfyui, device, size, folder)
    import torch

    with torch.inference_mode():
        model = _stacked(patcher, 1, mode)
        _load(model)
        generator = torch.Generator().manual_seed(1)
        place = patcher.load_device
        x = torch.randn((2, 4, LATENT_PX, LATENT_PX), generator=generator).to(place)
        context = sd15.conditioning(size)[0][0].to(place).repeat(2, 1, 1)
        sigma = torch.full((2,), 3.0, device=place)
        while clock.tick():
            model.model.apply_model(x, sigma, c_crossattn=context, transformer_options={})
    return {}


def _model(comfyui: Path, device: str, size: str, folder: str) -> Any:
    """The model, loaded and unpatched, and the files in a loras folder."""
    measure.enter(comfyui, device)
    import folder_paths
    import torch

    import nodes  # noqa: F401  (before the pack's nodes, as the host imports them)

    folder_paths.add_model_folder_path("loras", folder, is_default=True)
    with torch.inference_mode():
        patcher = sd15.build(size, "fp32", device)
        _load(patcher)
    return patcher


def _stacked(patcher: Any, turn: int, mode: str) -> Any:
    """What the node LoRA Stack gives for five rows."""
    from lora_weave.nodes.stack import StackNode

    rows = [
        {"on": True, "name": name, "model": strength}
        for name, strength in zip(_names(), _strengths(turn), strict=True)
    ]
    node = StackNode.PREPARE_CLASS_CLONE({})
    return node.execute(
        normalise="off", master=1.0, mode=mode, rows={"v": 1, "rows": rows}, model=patcher
    ).args[0]


def _ready(patcher: Any, task: str, clock: Clock) -> None:
    """Weights without patches, unless the task is to change those that are there."""
    if task != "change":
        _load(patcher)
    clock.begin()


def _load(model: Any) -> None:
    """As before sampling: the host puts the patches into the weights."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)


def _names() -> list[str]:
    return [f"lora{number}.safetensors" for number in range(NUM_LORAS)]


def _strengths(turn: int) -> list[float]:
    return [0.5 + 0.1 * number + 0.01 * (turn % 7) for number in range(NUM_LORAS)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="those to measure")
    parser.add_argument("--comfyui", help="a ComfyUI folder; else $LORA_WEAVE_COMFYUI, else .host")
    parser.add_argument(
        "--size", choices=tuple(sd15.UNETS), default="sd15", help="tiny has no limits"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
