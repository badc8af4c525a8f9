"""Full, LoRA, LoHa and LoKr side by side: size of the file, speed and memory, with stars.

The comparison that the LyCORIS guidelines make with symbols, for what can be measured. Fidelity,
flexibility and diversity need somebody who judges images, and stay open. The lines are markdown,
and `--write` puts them into docs/adapter-types.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import measure
from adapters import (
    CONV,
    LINEAR,
    WARMUPS,
    WHOLE,
    Kind,
    example,
    facts,
    make_adapter,
    make_layer,
    stepping,
)
from measure import MB, ROOT, InProcess, interleaved

PAGE = ROOT / "docs" / "adapter-types.md"
START = "<!-- written by: python3 dev.py bench table --write -->\n"
END = "<!-- end -->\n"
BYTES_IN_FILE = 2  # of a number
BYTES_IN_TRAINING = 16  # of a number: itself, its gradient and two moments, in float32
MOST_STARS = 5
# The linear layers of the attention and feed-forward blocks of SDXL's UNet, (O, I), and how many.
CENSUS = {
    (1280, 1280): 372,
    (1280, 2048): 120,
    (10240, 1280): 60,
    (1280, 5120): 60,
    (640, 640): 70,
    (640, 2048): 20,
    (5120, 640): 10,
    (640, 2560): 10,
}
TYPES = (
    Kind("full", "full"),
    Kind("LoRA, rank 16", "lora"),
    Kind("LoHa, rank 8", "loha", rank=8),
    Kind("LoKr, low factor (4)", "lokr", rank=WHOLE, options={"factor": 4}),
    Kind("LoKr, high factor (16)", "lokr", rank=WHOLE, options={"factor": 16}),
)


@dataclass(frozen=True)
class Figures:
    """One line of the table, as it is shown. In all of them less is better."""

    case: str
    file_mb: float
    linear_ratio: float
    conv_ratio: float
    memory_mb: float


@dataclass(frozen=True)
class Column:
    """A measured column: its heading, its field in `Figures`, and its decimals."""

    heading: str
    field: str
    decimals: int


COLUMNS = (
    Column("file, MB", "file_mb", 1),
    Column("linear, x frozen", "linear_ratio", 2),
    Column("convolution, x frozen", "conv_ratio", 2),
    Column("memory, MB", "memory_mb", 1),
)
OPEN = ("fidelity", "flexibility", "diversity")


def main() -> int:
    options = _arguments()
    where = measure.enter_for(options)
    other_load = measure.OtherLoad()
    rows = measure.as_prompts_run(_measure, options)
    notes = [f"Median of {options.rounds} rounds.", *other_load.note()]
    if options.json:
        found = [asdict(row) for row in rows]
        print(json.dumps({"benchmark": "table", "machine": where, "rows": found, "notes": notes}))
    else:
        print(f"table on {where}", markdown(rows), "\n".join(notes), sep="\n\n")
    if options.write:
        write(f"{markdown(rows)}\n{where}. {notes[0]}\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each case")
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="count the processor's time of one thread: on a busy machine, too",
    )
    parser.add_argument("--comfyui", help="a ComfyUI folder; else $LORA_WEAVE_COMFYUI, else .host")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> list[Figures]:
    linear, conv = (_ratios(layer, options) for layer in (LINEAR, CONV))
    return [
        rounded(
            Figures(
                case=kind.label,
                file_mb=file_mb(kind),
                linear_ratio=linear[kind.label],
                conv_ratio=conv[kind.label],
                memory_mb=memory_mb(kind, options.device),
            )
        )
        for kind in TYPES
    ]


def _ratios(layer: str, options: argparse.Namespace) -> dict[str, float]:
    """{label: time of a step to that of the frozen layer}."""
    clock = time.thread_time if options.one_thread else time.perf_counter
    adapters: dict[str, Any] = {"frozen": None}
    for kind in TYPES:
        adapters[kind.label] = make_adapter(replace(kind, layer=layer), options.device)
    with contextlib.ExitStack() as stack, measure.in_training():
        steps = [
            InProcess(
                label,
                stack.enter_context(stepping(layer, adapter, options.device)),
                options.device,
                clock,
            )
            for label, adapter in adapters.items()
        ]
        seconds = interleaved(steps, WARMUPS, options.rounds)
    return {label: seconds[label] / seconds["frozen"] for label in seconds}


def file_mb(kind: Kind) -> float:
    """The tensors of a file for the CENSUS, at 16 bits a number."""
    from lora_weave.lora_core.adapters import adapter_type
    from lora_weave.lora_core.adapters.create_options import CreateOptions

    numbers = 0
    for shape, count in CENSUS.items():
        adapter = adapter_type(kind.type).create(
            shape, kind.rank, 1.0, options=CreateOptions(**kind.options)
        )
        numbers += count * sum(tensor.numel() for tensor in adapter.tensors().values())
    return numbers * BYTES_IN_FILE / MB


def memory_mb(kind: Kind, device: str) -> float:
    """What training one linear layer takes beside its frozen weight, its input and its output.

    That is what the forward pass allocates and keeps for the backward pass, measured, and
    BYTES_IN_TRAINING for each trained number.
    """
    from lora_weave.lora_core.attach import attached

    adapter = make_adapter(replace(kind, layer=LINEAR), device)
    module = make_layer(LINEAR, device)
    x = example(LINEAR, device)[0].requires_grad_()
    with attached({"layer": module}, {"layer": adapter}, {"layer": facts(module)}):
        kept, out = _kept_bytes(lambda: module(x), device)
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    return (kept - out.nbytes + trained * BYTES_IN_TRAINING) / MB


def _kept_bytes(forward: Callable[[], Any], device: str) -> tuple[int, Any]:
    """(bytes that were allocated and not freed, result)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        result = forward()
        return torch.cuda.memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = forward()
    events = record.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


def rounded(row: Figures) -> Figures:
    """Each figure with its column's decimals: the stars are those of what is shown."""
    return replace(
        row,
        **{column.field: round(getattr(row, column.field), column.decimals) for column in COLUMNS},
    )


def markdown(rows: Sequence[Figures]) -> str:
    """The table: each figure with its stars."""
    headings = ("type", *(column.heading for column in COLUMNS), *OPEN)
    lines = [headings, ("---",) * len(headings)]
    stars = {column: stars_of([getattr(row, column.field) for row in rows]) for column in COLUMNS}
    for number, row in enumerate(rows):
        cells = [
            f"{getattr(row, column.field):.{column.decimals}f} {stars[column][number]}"
            for column in COLUMNS
        ]
        lines.append((row.case, *cells, *["–"] * len(OPEN)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def stars_of(values: Sequence[float]) -> list[str]:
    """Five for the least, one for the most, and between by the place on a logarithmic scale.

    Where the most is within 3 % of the least, which is noise, all have five.
    """
    least, most = min(values), max(values)
    if most <= 1.03 * least:
        return ["★" * MOST_STARS] * len(values)
    places = [math.log(value / least) / math.log(most / least) for value in values]
    return ["★" * (MOST_STARS - round((MOST_STARS - 1) * place)) for place in places]


def write(table: str) -> None:
    """Put `table` between PAGE's marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
