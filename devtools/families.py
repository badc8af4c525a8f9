"""Writes `lora_core/families/*.json` from the host's own models; see docs/families.md."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import family_models, inprocess
from .generated import command

if TYPE_CHECKING:
    from ..lora_core.families.lines import Line


def wanted() -> dict[Path, str]:
    """What each family's file should hold. The host must be in this process."""
    family_file = inprocess.pack_module("lora_core.families").family_file
    return {family_file(label): _text(content_of(label)) for label in family_models.FAMILIES}


def content_of(label: str) -> dict[str, Any]:
    """A family's file: lines that all variants have, those of each, and the text encoders'."""
    grouped = inprocess.pack_module("lora_core.families.lines").grouped
    lines, style = {}, ""
    for variant in family_models.FAMILIES[label].variants:
        network = model_network(label, variant)
        lines[variant], style = model_lines(network, label), network.style
    first, *others = lines.values()
    common = [line for line in first if all(line in other for other in others)]
    return {
        "style": style,
        "variants": {
            variant: grouped([line for line in own if line not in common])
            for variant, own in lines.items()
        },
        "common": grouped(common),
        "encoders": grouped(encoder_lines(encoder_network(label), label)),
    }


def model_network(label: str, variant: str) -> Any:
    """What the host knows of a variant's network.

    Flux's norms have a `weight`, as newer hosts call what 0.3.75 calls `scale`.
    """
    model = family_models.model(label, variant)
    for module in model.diffusion_model.modules():
        if "scale" in module._parameters:
            module.weight = module.scale
            del module.scale
    return inprocess.pack_module("lora_core.host.models").model_network(model)


def encoder_network(label: str) -> Any:
    """What the host knows of a family's text encoders."""
    models = inprocess.pack_module("lora_core.host.models")
    return models.encoder_network(family_models.encoders(label))


def model_lines(network: Any, label: str) -> list[Line]:
    """Lines of a diffusion model, with the names of the host's that no rule gives."""
    with_kohya = inprocess.pack_module("lora_core.families").with_kohya
    return _lines(network, _beyond_rules(network, with_kohya(replace(network, hosts={}), label)))


def encoder_lines(network: Any, label: str) -> list[Line]:
    """Lines of text encoders, with kohya's names where the host knows them."""
    key_map = inprocess.pack_module("lora_core.layer_names").key_map_of(label, [network])
    kohya = {key_map.at(path).kohya for path in network.shapes} & network.hosts.keys()
    kohya -= network.shapes.keys()
    beyond = _beyond_rules(network, replace(network, hosts={}))
    return _lines(network, beyond | {name: network.hosts[name] for name in sorted(kohya)})


def _beyond_rules(network: Any, ruled: Any) -> dict[str, Any]:
    by_rule = inprocess.pack_module("lora_core.layer_names").names_of(ruled).meanings
    named = network.hosts.items()
    return {
        name: meaning
        for name, meaning in named
        if by_rule.get(name) != meaning and name != meaning.path
    }


def _lines(network: Any, hosts: dict[str, Any]) -> list[Line]:
    table, others = _by_path(network.table.items()), _by_path(hosts.items())
    lines = []
    for path, shape in network.shapes.items():
        line: Line = {"at": path, "shape": list(shape)}
        if path in network.biases:
            line["bias"] = True
        if path in network.embeddings:
            line["embedding"] = True
        if path in table:
            line["table"] = table[path]
        if path in others:
            line["hosts"] = others[path]
        lines.append(line)
    return lines


def _by_path(names: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{path: {name: rows, "swapped" or "whole"}}; of one name of the whole layer, that alone."""
    found: dict[str, Any] = defaultdict(dict)
    for name, meaning in names:
        whole = "swapped" if meaning.swapped else "whole"
        found[meaning.path][name] = list(meaning.rows) if meaning.rows else whole
    for path, parts in found.items():
        # Some of the host's tables are made from sets, so their order is no order.
        ordered = sorted(parts.items(), key=_by_rows)
        alone = [name for name, part in ordered if part == "whole"] if len(parts) == 1 else []
        found[path] = alone[0] if alone else dict(ordered)
    return found


def _by_rows(named: tuple[str, Any]) -> tuple[list[int], str]:
    name, part = named
    return (part if isinstance(part, list) else []), name


def _text(content: dict[str, Any]) -> str:
    """JSON with a line of text for each line of a list."""

    def block(lines: list[Line], indent: str) -> str:
        inner = (",\n" + indent + "  ").join(json.dumps(line) for line in lines)
        return f"[\n{indent}  {inner}\n{indent}]" if lines else "[]"

    variants = ",\n".join(
        f"    {json.dumps(name)}: {block(lines, '    ')}"
        for name, lines in content["variants"].items()
    )
    parts = [
        f'"style": {json.dumps(content["style"])}',
        '"variants": {\n' + variants + "\n  }",
        f'"common": {block(content["common"], "  ")}',
        f'"encoders": {block(content["encoders"], "  ")}',
    ]
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(command("families", wanted))
