"""What a merged file's metadata says of how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .methods import Method
from .rank_rule import RankRule

MERGED_FROM = "lora_weave.merged_from"
MERGE_METHOD = "lora_weave.merge_method"


def merge_metadata(
    parts: Sequence[tuple[str, float, float]], method: Method, rule: RankRule | None, seed: int
) -> dict[str, str]:
    """Of parts (name, strength of the model, of the text encoder), as JSON texts."""
    sources = [{"name": name, "model": model, "clip": clip} for name, model, clip in parts]
    how: dict[str, object] = {"method": method.name, **method.given, "seed": seed}
    if rule is not None:
        how |= {rule.kind: rule.value, "largest_rank": rule.largest}
    return {
        MERGED_FROM: json.dumps(sources, ensure_ascii=False),
        MERGE_METHOD: json.dumps({key: value for key, value in how.items() if value is not None}),
    }


def without_network(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata but for what it says of ranks, alphas and types, which are others now."""
    return {key: text for key, text in metadata.items() if not key.startswith("ss_network_")}
