"""LoRA files from the command line, without ComfyUI: only torch and safetensors are needed.

    python -m lora_core merge a.safetensors:0.7 b.safetensors:0.4 -o c.safetensors

Layers are those of the family that the files are made for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .adapters import Adapter
from .inspection import Inspection, inspect_file
from .key_map import KeyMap
from .lora_file import LoraFile
from .lora_naming import FORMATS
from .merge.combine import Merged, merge
from .merge.methods import METHODS
from .merge.provenance import merge_metadata, without_network
from .merge.rank_rule import RULES, RankRule
from .merge.resize import resize
from .stack import Entry

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_core",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    merging = commands.add_parser("merge", help="several LoRAs as one")
    merging.add_argument("loras", nargs="+", metavar="FILE[:STRENGTH]", help="strength 1 without")
    merging.add_argument("--method", choices=list(METHODS), default="sum")
    parameters = sorted({name for method in METHODS.values() for name in method.parameters})
    for name in parameters:
        merging.add_argument(f"--{name}", type=float, help="of the methods that have one")
    merging.add_argument("--seed", type=int, default=0, help="of the random methods")
    merging.set_defaults(run=_merge, parameters=parameters)
    resizing = commands.add_parser("resize", help="any type as plain LoRA of fewer directions")
    resizing.add_argument("lora", metavar="FILE")
    resizing.set_defaults(run=_resize)
    for command in (merging, resizing):
        rules = command.add_mutually_exclusive_group(required=command is resizing)
        for kind, text in RULES.items():
            rules.add_argument(f"--{kind}", type=float, help=text)
        command.add_argument("--largest-rank", type=int, help="the most of any layer")
    converting = commands.add_parser("convert", help="the same LoRA in another format or dtype")
    converting.add_argument("lora", metavar="FILE")
    converting.set_defaults(run=_convert)
    for command in (merging, resizing, converting):
        command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
        command.add_argument("--format", choices=FORMATS, default="kohya")
        command.add_argument("--dtype", choices=list(DTYPES), default="float16")
        command.add_argument("--overwrite", action="store_true", help="replace an older file")
    inspecting = commands.add_parser("inspect", help="what a file is, from its header")
    inspecting.add_argument("lora", metavar="FILE")
    inspecting.add_argument("--json", action="store_true")
    inspecting.set_defaults(run=_inspect)
    return parser


def _merge(options: argparse.Namespace) -> None:
    _check_output(options)
    named = [_with_strength(text) for text in options.loras]
    chosen = {name: getattr(options, name) for name in options.parameters}
    given = {name: value for name, value in chosen.items() if value is not None}
    method, rule = METHODS[options.method](**given), _rule(options)
    files = [LoraFile.read(path) for path, _ in named]
    keymap = _common_key_map(files)
    stack = [Entry(file.adapters, s, s) for file, (_, s) in zip(files, named, strict=True)]
    merged = merge(stack, rule, progress=_progress, method=method, seed=options.seed)
    parts = [(path.name, strength, strength) for path, strength in named]
    _save(options, merged.adapters, keymap, merge_metadata(parts, method, rule, options.seed))
    _tell(merged)


def _resize(options: argparse.Namespace) -> None:
    _check_output(options)
    rule = _rule(options)
    assert rule is not None, "argparse wants one"
    file = LoraFile.read(options.lora)
    resized = resize(file.adapters, rule, progress=_progress)
    _save(options, resized.adapters, _common_key_map([file]), without_network(file.metadata))
    _tell(resized)


def _convert(options: argparse.Namespace) -> None:
    _check_output(options)
    file = LoraFile.read(options.lora)
    _save(options, file.adapters, _common_key_map([file]), file.metadata)


def _inspect(options: argparse.Namespace) -> None:
    facts = _facts(inspect_file(options.lora))
    if options.json:
        print(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    for name, value in facts.items():
        counted = isinstance(value, dict)
        text = ", ".join(f"{key} ({count})" for key, count in value.items()) if counted else value
        print(f"{name.replace('_', ' '):10} {text}")


def _facts(found: Inspection) -> dict[str, Any]:
    return {
        "file": found.path.name,
        "family": found.family or "not known",
        "dialect": found.dialect or "no LoRA",
        "types": dict(found.types),
        "ranks": {str(rank): count for rank, count in sorted(found.ranks.items())},
        "dtypes": dict(found.dtypes),
        "blocks": " ".join(found.blocks),
        "size_mb": round(found.num_bytes / 1e6, 1),
    }


def _with_strength(text: str) -> tuple[Path, float]:
    """FILE:STRENGTH; a path may have a colon itself."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _rule(options: argparse.Namespace) -> RankRule | None:
    for kind in RULES:
        if (value := getattr(options, kind)) is not None:
            return RankRule(kind, value, options.largest_rank)
    return None


def _common_key_map(files: Sequence[LoraFile]) -> KeyMap:
    """The layers of the one model that all files are made for."""
    found = {file.keymap.label: file.keymap for file in files if file.keymap is not None}
    if len(found) > 1:
        named = "; ".join(f"{file.path and file.path.name}: {file.family}" for file in files)
        raise ValueError(f"the files are made for different models: {named}")
    return next(iter(found.values()))


def _check_output(options: argparse.Namespace) -> None:
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"{options.output} is there already; --overwrite replaces it")


def _save(
    options: argparse.Namespace,
    adapters: Mapping[str, Adapter],
    keymap: KeyMap,
    metadata: Mapping[str, str],
) -> None:
    file = LoraFile(dict(adapters), dict(metadata))
    file.save(options.output, keymap, format=options.format, dtype=DTYPES[options.dtype])
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}: {len(adapters)} layers, {size:.1f} MB")


def _tell(merged: Merged) -> None:
    if merged.kept:
        least = min(merged.kept, key=lambda path: merged.kept[path])
        mean = sum(merged.kept.values()) / len(merged.kept)
        print(f"kept of the changes' norm: {mean:.1%}; least {merged.kept[least]:.1%} ({least})")


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of} layers", end="\n" if done == of else "", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
