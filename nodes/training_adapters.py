"""The adapters of a training: those it starts from, and new ones of the chosen type."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..lora_core import targets
from ..lora_core.adapters import ADAPTERS, Adapter, Bias, Layer, adapter_type
from ..lora_core.adapters.create_options import CreateOptions
from ..lora_core.adapters.dora import Decomposable
from ..lora_core.adapters.full import Full
from ..lora_core.adapters.lokr import LoKr
from ..lora_core.adapters.lora import LoRA
from ..lora_core.host import models, norms
from ..lora_core.key_map import BIAS, KeyMap
from ..lora_core.lora_model import LoraModel
from ..lora_core.training.config import ResolvedConfig, TrainOptions
from ..lora_core.training.examples import seed_of

if TYPE_CHECKING:
    from .training_check import Request


def make_adapters(
    request: Request, config: ResolvedConfig, keymap: KeyMap
) -> tuple[dict[str, Adapter], frozenset[str]]:
    """Adapters by layer path, those to start from and new ones, and the paths of the new ones.

    Raises ValueError for a choice of layers, options or a LoRA to start from that do not fit.
    """
    shapes = chosen_layers(request, config)
    start = adapters_to_start_from(request, keymap)
    new = new_adapters(config, {path: shapes[path] for path in shapes if path not in start})
    return dict(sorted((start | new).items())), frozenset(new)


def chosen_layers(request: Request, config: ResolvedConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the layers and norms that targets, include and exclude choose.

    With the biases of the norms, and those of the layers where the type trains them.
    """
    options = config.options
    trained_clip = request.clip if options.text_encoder else None
    facts = trained_layers(request.model, trained_clip).facts
    layers = {path: layer.shape for path, layer in facts.items() if len(layer.shape) > 1}
    all_norms = [path for path, layer in facts.items() if layer.normalized is not None]
    chosen = targets.select(
        targets.shapes(layers),
        options.targets,
        options.include,
        options.exclude,
        all_norms if options.norms else None,
    )
    if trained_clip is not None and not any(map(models.is_text_encoder, chosen)):
        raise ValueError(
            f"text_encoder is on, but none of its layers is chosen by targets {options.targets!r}, "
            f"include {options.include!r} and exclude {options.exclude!r}"
        )
    with_bias = adapter_type(config.train.algorithm).trains_bias
    biased = [path + BIAS for path in chosen if with_bias or path not in layers]
    chosen += [path for path in biased if path in facts]
    return {path: facts[path].shape for path in chosen}


def adapters_to_start_from(request: Request, keymap: KeyMap) -> dict[str, Adapter]:
    """Those of `start_from`, checked against the model."""
    if not request.start_from:
        return {}
    start = LoraModel.of(request.start_from).to_file(keymap)
    if start.left_out:
        raise ValueError(
            f"start_from also changes the text encoder ({len(start.left_out)} tensors): switch "
            "on text_encoder in Training Options, so that they are trained further"
        )
    known = trained_layers(request.model, request.clip).facts
    others = sorted(path for path in start.adapters if path not in known)
    if others:
        raise ValueError(
            "start_from changes norms, embeddings or parameters that can't be trained "
            f"({len(others)}): {', '.join(others[:4])}"
        )
    return dict(start.adapters)


def new_adapters(
    config: ResolvedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Adapter]:
    """An adapter of the chosen type for each layer; norms and biases get the change itself.

    ValueError naming all that can't hold one.
    """
    settings, options = config.train, config.options
    chosen_type = adapter_type(settings.algorithm)
    alpha = settings.alpha * (math.sqrt(settings.rank) if options.rslora else 1.0)
    choices = CreateOptions(
        tucker=options.tucker, factor=options.lokr_factor, decompose_both=options.decompose_both
    )
    made: dict[str, Adapter] = {}
    problems = unfit_options(config)
    with torch.inference_mode(False):
        for path, shape in shapes.items():
            seed = seed_of(settings.training_seed, f"init {path}", 0)
            generator = torch.Generator().manual_seed(seed)
            kind = chosen_type if len(shape) > 1 else Bias if path.endswith(BIAS) else Full
            try:
                made[path] = kind.create(
                    shape, settings.rank, alpha, options=choices, generator=generator
                )
            except ValueError as error:
                problems.append(f"{path}: {error}")
    if problems:
        raise ValueError("; ".join(problems[:8]) + (" ..." if len(problems) > 8 else ""))
    return made


def unfit_options(config: ResolvedConfig) -> list[str]:
    """Options that the chosen type of adapter does not know."""
    options, algorithm = config.options, config.train.algorithm
    kind = adapter_type(algorithm)
    of_lora = "lora" if not issubclass(kind, LoRA) else ""
    of_lokr = "" if issubclass(kind, LoKr) else "lokr"
    of_any = "" if issubclass(kind, Decomposable) else "lora, loha and lokr"
    scaled = [name for name, one in ADAPTERS.items() if one.has_alpha and one.alpha_scales]
    of_scaled = "" if algorithm in scaled else f"{', '.join(scaled[:-1])} and {scaled[-1]}"
    needs = {
        "dora": (options.dora, of_any),
        "max_norm": (options.max_norm > 0, of_any),
        "rank_dropout": (options.rank_dropout > 0, of_any),
        "lora_plus_ratio": (options.lora_plus_ratio != 1, of_any),
        "rslora": (options.rslora, of_scaled),
        "tucker": (options.tucker, of_any),
        "lokr_factor": (options.lokr_factor != -1, of_lokr),
        "decompose_both": (options.decompose_both, of_lokr),
        "initialisation pissa": (options.initialisation == "pissa", of_lora),
    }
    problems = [
        f"{name} works with {types} only, the algorithm is {algorithm}"
        for name, (is_on, types) in needs.items()
        if is_on and types
    ]
    if options.initialisation == "pissa":
        clashes = {
            "dora": options.dora,
            "tucker": options.tucker,
            "max_norm": options.max_norm > 0,
            "rank_dropout": options.rank_dropout > 0,
        }
        clashing = [name for name, is_on in clashes.items() if is_on]
        problems += [f"initialisation pissa does not go with {name}" for name in clashing]
    return problems


def begin_adapters(
    adapters: Mapping[str, Adapter],
    new: Iterable[str],
    facts: Mapping[str, Layer],
    options: TrainOptions,
) -> None:
    """Let the new ones begin where they need their layer's weight, once the model is loaded."""
    for path in sorted(new):
        adapter = adapters[path]
        if options.dora and isinstance(adapter, Decomposable):
            adapter.decompose(facts[path].weight())
        if options.initialisation == "pissa" and isinstance(adapter, LoRA):
            adapter.begin_at_principal(facts[path].weight())


def trained_layers(patcher: Any, clip: Any) -> models.ModelLayers:
    """What can get an adapter: layers, norms and their biases, of the CLIP, too, if it is given."""
    found = models.unet_layers(patcher) | norms.unet_norms(patcher)
    if clip is not None:
        found = found | models.clip_layers(clip) | norms.clip_norms(clip)
    return found | found.biases()
