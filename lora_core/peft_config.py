"""Alphas and other settings that PEFT and diffusers keep outside a file's tensors.

A PEFT folder has them in adapter_config.json; a file of diffusers in its metadata, in the JSON
`lora_adapter_metadata`, whose names begin with the pipeline's part ("unet.lora_alpha"). A layer's
scale is alpha / r, or alpha / √r with rsLoRA, where patterns of names have an r or alpha of their
own (PEFT utils/other.py `get_pattern_key`, tuners/lora/layer.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from . import peft_kinds
from .name_patterns import PatternTable
from .recent import Stamp, stamp_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
MAX_CONFIG_BYTES = 4_000_000

# Initialisations that change the base's weights, so that the file alone is not the whole change.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that make something of the tensors that no type here does (PEFT tuners/lora/config.py).
_UNREADABLE = {
    "layer_replication": "makes another model of the base",
    "kasa_config": "cuts the base's weights and has numbers between A and B, which can't be read",
    "use_qalora": "pools the inputs of every layer, which can't be read here",
    "alora_invocation_tokens": "changes only tokens after those, which can't be done here",
}
_RANK_TENSORS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
_WRAPPER = "base_model.model."
_SCALED = ("LORA", "LOHA", "LOKR")  # the kinds of adapters that have an alpha
_TABLES = ("rank_pattern", "alpha_pattern")
_KNOWN = ("r", "lora_alpha", "alpha", "use_rslora", *_TABLES)


@dataclass(frozen=True)
class PeftConfig:
    """The settings of one adapter: of a folder, or of one part of a pipeline."""

    source: str
    settings: Mapping[str, object]

    @property
    def kind(self) -> str:
        """PEFT's name of the adapter's type; diffusers' files hold LoRAs."""
        return str(self.settings.get("peft_type") or _SCALED[0]).upper()

    def problems(self) -> list[str]:
        """What makes the change of every layer unknown."""
        if self.kind in (peft_kinds.IA3, peft_kinds.OFT):
            found = peft_kinds.problems(self.kind, self.settings)
            return [f"{self.source}: {problem}" for problem in found]
        if self.kind not in _SCALED:
            known = ", ".join((*_SCALED, peft_kinds.IA3, peft_kinds.OFT))
            return [f"{self.source}: peft_type is {self.kind[:80]!r}; {known} can be read"]
        found = [
            f"{self.source}: {name} is {json.dumps(value)[:80]}, expected a number above 0"
            for name, value in self._numbers()
            if not _is_number(value)
        ]
        tables = [name for name in _TABLES if not _is_table(self.settings.get(name) or {})]
        found += [f"{self.source}: {name} is not a table of names and numbers" for name in tables]
        if not tables:
            found += [
                f"{self.source}: {name}: {problem}"
                for name, table in self._patterns.items()
                for problem in table.problems
            ]
        start = self.settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
            found.append(
                f"{self.source}: init_lora_weights is {start!r}, which changes the base's weights,"
                " too; save it with PEFT's path_initial_model_for_weight_conversion first"
            )
        found += [
            f"{self.source}: {name} {why}"
            for name, why in _UNREADABLE.items()
            if self.settings.get(name) not in (None, False, [])  # {} is a setting of its own
        ]
        return found

    def _numbers(self) -> list[tuple[str, object]]:
        alpha = "lora_alpha" if "lora_alpha" in self.settings else "alpha"
        return [(name, self.settings.get(name)) for name in ("r", alpha)]

    @cached_property
    def _patterns(self) -> dict[str, PatternTable]:
        tables = {name: self.settings.get(name) or {} for name in _TABLES}
        return {name: PatternTable(it) for name, it in tables.items() if isinstance(it, dict)}

    def rank(self, name: str) -> float:
        """The rank of the layer that the base calls `name`."""
        return self._by_pattern("rank_pattern", name, self.settings["r"])

    def alpha(self, name: str, rank: int) -> float:
        """The alpha whose share of `rank`, the rank in the file, is PEFT's scale."""
        default = self.settings.get("lora_alpha", self.settings.get("alpha"))
        alpha, wanted = self._by_pattern("alpha_pattern", name, default), self.rank(name)
        if self.settings.get("use_rslora"):
            return alpha * rank / math.sqrt(wanted)
        return alpha if rank == wanted else alpha * rank / wanted

    def _by_pattern(self, table_name: str, name: str, default: object) -> float:
        assert isinstance(default, (int, float))
        return float(self._patterns[table_name].get(name, default))


def find_files(path: Path) -> tuple[Path, dict[str, str]]:
    """The tensors' file of a LoRA file or PEFT folder, and {CONFIG: its text} where it has one.

    Raises ValueError for a folder without its files, and for tensors whose configuration is gone.
    """
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            pickled = (path / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is a pickle, which can run code and is refused"
            raise ValueError(
                f"{path.name}: the folder has no {WEIGHTS}" + (hint if pickled else "")
            )
        path = path / WEIGHTS
    if path.name != WEIGHTS:
        return path, {}
    config = path.with_name(CONFIG)
    if not config.is_file():
        raise ValueError(
            f"{path.parent.name}/{WEIGHTS}: {CONFIG}, which has its alpha, is not beside it"
        )
    if os.path.getsize(config) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.parent.name}/{CONFIG}: more than {MAX_CONFIG_BYTES} bytes")
    return path, {CONFIG: config.read_text("utf-8", errors="replace")}


def stamps_of(path: Path) -> tuple[Stamp, ...]:
    """What tells a LoRA file or PEFT folder from its earlier self: those of all files in it that
    are read.
    """
    tensors = path / WEIGHTS if path.is_dir() else path
    config = tensors.with_name(CONFIG)
    is_read = tensors.name == WEIGHTS and config.is_file()
    return tuple(stamp_of(file) for file in ([tensors, config] if is_read else [tensors]))


@dataclass
class ConfigTensors:
    """What a configuration says of modules: tensors to add, problems, and modules it leaves open.

    `tensors` are {`<module>.alpha`: so that alpha over the rank in the file is PEFT's scale}. PEFT
    scales a LoKr of two whole blocks, too, which no alpha does: its first block is given anew.
    For types without alpha they are those of `peft_kinds`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
    ) -> ConfigTensors:
        """For each of {module name: {adapter's tensor name: tensor}} that has no alpha."""
        result = cls()
        scaled = {name: found for name, found in modules.items() if found.keys() - {"alpha"}}
        scaled = {name: found for name, found in scaled.items() if "alpha" not in found}
        if not scaled or not {CONFIG, METADATA} & metadata.keys():
            return result
        try:
            configs = _configs(metadata)
            result.problems = [text for it in configs.values() for text in it.problems()]
        except ValueError as error:
            result.problems = [str(error)]
        if result.problems:
            result.unknown = set(scaled)
            return result
        without = []
        for module, found in scaled.items():
            component = module.partition(".")[0]
            config = configs.get(component) or configs.get("")
            if config is not None:
                name = module.removeprefix(f"{component}.") if component in configs else module
                result._add(module, found, config, name.removeprefix(_WRAPPER))
            elif _has_scale(found):
                without.append(module)
        if configs and without:
            result.unknown |= set(without)
            result.problems.append(
                f"its metadata {METADATA} has the alpha of {', '.join(sorted(configs))}, but none"
                f" of layers ({len(without)}) such as {without[0]}"
            )
        return result

    def _add(self, module: str, found: Mapping[str, Tensor], config: PeftConfig, name: str) -> None:
        if config.kind not in _SCALED:
            added = peft_kinds.added_tensors(config.kind, config.settings, name, found)
            self.tensors |= {f"{module}.{key}": tensor for key, tensor in added.items()}
            return
        tensor = next((found[key] for key in _RANK_TENSORS if key in found), None)
        if {"lokr_w1", "lokr_w2"} <= found.keys():
            scale = config.alpha(name, 1)
            self.tensors |= {f"{module}.lokr_w1": found["lokr_w1"] * scale} if scale != 1 else {}
        elif tensor is not None and tensor.ndim:
            rank, wanted = tensor.shape[0], config.rank(name)
            if "lora_down.weight" in found and rank != wanted:
                self.problems.append(f"{module} has rank {rank}, {config.source} says {wanted:g}")
                self.unknown.add(module)
            else:
                alpha = torch.tensor(config.alpha(name, rank), dtype=torch.float32)
                self.tensors[f"{module}.alpha"] = alpha


def _configs(metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """{part of the pipeline, or "" for a folder: settings}. ValueError for unreadable ones."""
    if CONFIG in metadata:
        return {"": PeftConfig(CONFIG, _parsed(CONFIG, metadata[CONFIG]))}
    parts: dict[str, dict[str, object]] = {}
    for key, value in _parsed(f"its metadata {METADATA}", metadata[METADATA]).items():
        component, dot, name = key.rpartition(".")
        if name in (*_KNOWN, "init_lora_weights", *_UNREADABLE):
            parts.setdefault(component, {})[name] = value
    return {part: PeftConfig(f"{METADATA} of {part}", it) for part, it in parts.items()}


def _has_scale(found: Mapping[str, Tensor]) -> bool:
    """Whether these tensors of a module are of a type whose change alpha scales."""
    return not found.keys().isdisjoint(_RANK_TENSORS) or {"lokr_w1", "lokr_w2"} <= found.keys()


def _parsed(source: str, text: str) -> dict[str, object]:
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"{source}, which has its alpha, has more than {MAX_CONFIG_BYTES} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}, which has its alpha, is not valid JSON") from error
    if not isinstance(document, dict):
        raise ValueError(f"{source}, which has its alpha, is not a JSON object")
    return document


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and 0 < value < 1e9  # type: ignore[operator]


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())
