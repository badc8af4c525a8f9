"""What each adapter type costs on one layer, beside PEFT, LyCORIS and the host's own.

Forward and backward, gradient of the input included, of a frozen Linear 1280x1280 at 1024 tokens
and a frozen Conv3x3 of 320 channels at 48x48, batch 1, float32. The floor is the frozen layer
alone: forward and the gradient of its input. All cases run in turn in one thread of one process.
Peers get an adapter of the same numbers, and where they compute something else, a note says so.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import adapter_peers
import measure
from measure import InProcess, Row, interleaved, note, report

PEER_LIMIT = 1.03  # x the best peer: less is noise
WARMUPS = 3
SAME = 1e-3  # largest difference of a peer's change, of the change's largest value
LINEAR = "linear 1280x1280, 1024 tokens"
CONV = "conv 3x3, 320 channels, 48x48"


@dataclass(frozen=True)
class Kind:
    """An adapter on a layer. `limit` is in floors; an `extra` one has no limits at all."""

    label: str
    type: str
    layer: str = LINEAR
    rank: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    dora: bool = False
    limit: float | None = None
    extra: bool = True

    @property
    def name(self) -> str:
        where = "conv" if self.layer == CONV else "linear"
        return f"{where} {self.label}{' (extra)' if self.extra else ''}"


WHOLE = 10_000  # a LoKr of this rank has no factors in its second block
KINDS = (
    Kind("LoRA r16", "lora", limit=1.10, extra=False),
    Kind("DoRA r16", "lora", dora=True, limit=1.18, extra=False),
    Kind("LoHa r8", "loha", rank=8, limit=1.30, extra=False),
    Kind("LoKr f16 r16", "lokr", options={"factor": 16}, extra=False),
    Kind("LoCon r16", "lora", layer=CONV, limit=1.15, extra=False),
    Kind("LoRA r64", "lora", rank=64),
    Kind("LoRA r128", "lora", rank=128),
    Kind("DoRA r64", "lora", rank=64, dora=True),
    Kind("LoHa r16", "loha", rank=16),
    Kind("LoHa r32", "loha", rank=32),
    Kind("LoHa r8 + DoRA", "loha", rank=8, dora=True),
    Kind("LoKr f16 whole", "lokr", rank=WHOLE, options={"factor": 16}),
    Kind("LoKr f4 whole", "lokr", rank=WHOLE, options={"factor": 4}),
    Kind("LoKr whole", "lokr", rank=WHOLE),
    Kind("LoKr f16 r16 + DoRA", "lokr", options={"factor": 16}, dora=True),
    Kind("LoCon r4", "lora", layer=CONV, rank=4),
    Kind("LoCon r8", "lora", layer=CONV, rank=8),
    Kind("LoCon r64", "lora", layer=CONV, rank=64),
    Kind("LoCon r16 Tucker", "lora", layer=CONV, options={"tucker": True}),
    Kind("LoCon r16 + DoRA", "lora", layer=CONV, dora=True),
    Kind("LoHa r8", "loha", layer=CONV, rank=8),
    Kind("LoHa r8 Tucker", "loha", layer=CONV, rank=8, options={"tucker": True}),
    Kind("LoKr f4 r16", "lokr", layer=CONV, options={"factor": 4}),
    Kind("LoKr f4 whole", "lokr", layer=CONV, rank=WHOLE, options={"factor": 4}),
)


def main() -> int:
    options = _arguments()
    where = measure.enter_for(options)
    other_load = measure.OtherLoad()
    rows, notes = measure.as_prompts_run(_measure, options)
    notes.append(f"Median of {options.rounds} rounds. (extra): without limits.")
    return report("adapters", where, rows, notes + other_load.note(), options.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each case")
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="count the processor's time of one thread: on a busy machine, too",
    )
    parser.add_argument("--only", default="", help="only adapters whose name has this in it")
    parser.add_argument("--comfyui", help="a ComfyUI folder; else $LORA_WEAVE_COMFYUI, else .host")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    kinds = [kind for kind in (*KINDS, *other_types()) if options.only in kind.name]
    rows: list[Row] = []
    notes: list[str] = []
    for layer in (LINEAR, CONV):
        with contextlib.ExitStack() as stack, measure.in_training():
            floor = f"floor, {layer}"
            cases = {floor: stack.enter_context(stepping(layer, None, options.device))}
            ours = [kind for kind in kinds if kind.layer == layer]
            for kind in list(ours):
                note(f"setting up {kind.name}")
                try:
                    adapter = make_adapter(kind, options.device)
                except ValueError as error:
                    notes.append(f"{kind.name} can't be made: {error}")
                    ours.remove(kind)
                else:
                    cases |= _with_peers(kind, adapter, stack, options.device, notes)
            if not ours:
                continue
            clock = time.thread_time if options.one_thread else time.perf_counter
            steps = [InProcess(name, step, options.device, clock) for name, step in cases.items()]
            seconds = interleaved(steps, WARMUPS, options.rounds)
        rows.append(Row(case=floor, base=floor, seconds=seconds[floor], ratio=1.0, limit=None))
        for kind in ours:
            rows += _rows(kind, seconds, floor)
    return rows, notes


def _rows(kind: Kind, seconds: dict[str, float], floor: str) -> list[Row]:
    """Ours to the floor and to the best peer, then the peers."""

    def row(case: str, base: str, limit: float | None = None) -> Row:
        ratio = seconds[case] / seconds[base]
        return Row(case=case, base=base, seconds=seconds[case], ratio=ratio, limit=limit)

    others = [name for name in seconds if name.startswith(f"{kind.name}: ")]
    rows = [row(kind.name, floor, kind.limit)]
    if others:
        best = min(others, key=lambda name: seconds[name])
        rows.append(row(kind.name, best, None if kind.extra else PEER_LIMIT))
    return rows + [row(name, floor) for name in others]


def other_types() -> list[Kind]:
    """What is registered and not in KINDS, at rank 16 where it has one, on both layers."""
    from lora_weave.lora_core.adapters import ADAPTERS

    known = {kind.type for kind in KINDS}
    return [
        Kind(name, name, layer=layer)
        for name in ADAPTERS
        for layer in (LINEAR, CONV)
        if name not in known
    ]


def _with_peers(
    kind: Kind, adapter: Any, stack: contextlib.ExitStack, device: str, notes: list[str]
) -> dict[str, Callable[[], None]]:
    """{name: a step} of ours and of each peer that has such an adapter."""
    cases = {kind.name: stack.enter_context(stepping(kind.layer, adapter, device))}
    x, _ = example(kind.layer, device)
    bare = make_layer(kind.layer, device)
    expected = _output(make_layer(kind.layer, device), adapter, x)
    for peer, make in adapter_peers.peers().items():
        trained = make(adapter, make_layer(kind.layer, device))
        if trained is None:
            continue
        name = f"{kind.name}: {peer}"
        cases[name] = _step(trained.forward, trained.parameters, kind.layer, device)
        change = (expected - bare(x)).abs().max()
        error = float((trained.forward(x) - expected).detach().abs().max() / change.detach())
        if error > SAME:
            notes.append(f"{name} computes something else: {error:.1%} of the change apart.")
    return cases


@contextlib.contextmanager
def stepping(layer: str, adapter: Any, device: str) -> Iterator[Callable[[], None]]:
    """A training step of our adapter attached to its live layer, or of the frozen layer alone."""
    from lora_weave.lora_core.attach import attached

    module = make_layer(layer, device)
    adapters = {} if adapter is None else {"layer": adapter}
    parameters = [] if adapter is None else list(adapter.parameters())
    with attached({"layer": module}, adapters, {"layer": facts(module)}):
        yield _step(module, parameters, layer, device)


def _step(
    forward: Callable[..., Any], parameters: list[Any], layer: str, device: str
) -> Callable[[], None]:
    """Forward and backward of the same input and the same gradient of the output, for all."""
    x, grad = example(layer, device)
    x.requires_grad_()

    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        forward(x).backward(grad)

    return step


def _output(module: Any, adapter: Any, x: Any) -> Any:
    from lora_weave.lora_core.attach import attached

    with attached({"layer": module}, {"layer": adapter}, {"layer": facts(module)}):
        return module(x).detach()


def make_layer(layer: str, device: str) -> Any:
    """The frozen layer, each time a new one with the same numbers."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Linear(1280, 1280) if layer == LINEAR else nn.Conv2d(320, 320, 3, padding=1)
    return module.requires_grad_(False).to(device)


def example(layer: str, device: str) -> tuple[Any, Any]:
    """(input, gradient of the output), which has the input's shape."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (1, 1024, 1280) if layer == LINEAR else (1, 320, 48, 48)
    x, grad = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return x, grad


def facts(module: Any) -> Any:
    """What training tells an adapter of its layer."""
    from lora_weave.lora_core.adapters import Layer

    axes = module.weight.ndim - 2
    geometry = ("stride", "padding", "dilation") if axes else ()
    return Layer(
        shape=tuple(module.weight.shape),
        weight=lambda: module.weight,
        bias=lambda: module.bias,
        **{name: getattr(module, name) for name in geometry},
    )


def make_adapter(kind: Kind, device: str) -> Any:
    """The kind's adapter with numbers in it, as in the middle of a training."""
    import torch

    from lora_weave.lora_core.adapters import adapter_type
    from lora_weave.lora_core.adapters.create_options import CreateOptions

    generator = torch.Generator().manual_seed(2)
    weight = make_layer(kind.layer, "cpu").weight
    adapter = adapter_type(kind.type).create(
        tuple(weight.shape),
        kind.rank,
        float(kind.rank),
        options=CreateOptions(**kind.options),
        generator=generator,
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.05, generator=generator))
    if kind.dora:
        adapter.decompose(weight)
    return adapter.to(device)


if __name__ == "__main__":
    sys.exit(main())
