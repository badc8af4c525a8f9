"""The names that LoRA files give to a network's layers, in every dialect.

A module has the host's own name and mostly one of diffusers, which may mean only some rows of it.
A dialect is a prefix before one of the two, with "." or "_" between the words. All of it starts
from the network's module names, so nothing has to be guessed from a file's underscores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .block_names import diffusers, xlabs
from .key_map import SCALE, KeyMap, LayerKey
from .network import CLIP_PREFIX, UNET_PREFIX, Meaning, Named, Network

_DOTTED = (
    *("", "unet.", "transformer.", "diffusion_model.", "model.diffusion_model."),
    *("base_model.model.", "unet.base_model.model.", "transformer.base_model.model."),
    "base_model.model.diffusion_model.",
)
_UNDERSCORED = ("lora_unet_", "lycoris_", "lora_transformer_", "oft_unet_", "lora_unet__")

_ENCODERS = ("clip_l", "clip_h", "clip_g", "t5xxl", "llama")  # in diffusers' order
DIFFUSERS_KOHYA = ("SD1.5", "SD2")  # families whose layers kohya names as diffusers does
_KOHYA_PREFIXES = {  # kind of naming: prefixes of kohya's name among the host's, best first
    "diffusers": (
        *("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks"),
        *("lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding"),
    ),
    "single": ("lora_te_", "lora_te1_"),
    # The host knows Flux's T5 as lora_te2 (OneTrainer) and as lora_te3, which is kohya's.
    "numbered": ("lora_te3_", "lora_te2_", "lora_te1_"),
}


def key_map_of(family: str, networks: Iterable[Network]) -> KeyMap:
    """The names that LoRA files use for the layers of a model's networks.

    Which of them is kohya's: sd-scripts write diffusers block names for SD1.x and SD2.x, the
    original names for every other model, and text encoders as lora_te where there is one, lora_te1
    to 3 where there are more (sd-scripts networks/lora.py `create_modules`,
    sdxl_train_network.py).
    """
    layers: dict[str, LayerKey] = {}
    norms: dict[str, LayerKey] = {}
    parameters: dict[str, LayerKey] = {}
    embeddings: dict[str, LayerKey] = {}
    biases: set[str] = set()
    for network in networks:
        keys = _layer_keys(network, names_of(network), kohya_kind(network, family))
        layers |= {path: keys[path] for path in network.layers}
        norms |= {path: keys[path] for path in network.norms}
        parameters |= {path: keys[path] for path in network.parameters}
        embeddings |= {path: keys[path] for path in network.embeddings}
        biases |= network.biases
    return KeyMap(family, layers, norms, frozenset(biases), parameters, embeddings)


def kohya_kind(network: Network, family: str) -> str:
    """How kohya names the network's layers: "diffusers", "original", "single" or "numbered"."""
    if encoders := _encoders(network.layers):
        return "numbered" if len(encoders) > 1 else "single"
    return "diffusers" if family in DIFFUSERS_KOHYA else "original"


@dataclass
class Names:
    """{name: Meaning}, the first that comes for a name; one with two others is left out.

    `hosts` are the names that the host knows, too. `diffusers` are {layer path: the names that
    diffusers writes, which together make it whole}.
    """

    meanings: dict[str, Meaning] = field(default_factory=dict)
    hosts: set[str] = field(default_factory=set)
    diffusers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, names: Iterable[Named]) -> None:
        known, unclear = set(self.meanings), set()
        for name, meaning in names:
            if name not in known and self.meanings.setdefault(name, meaning) != meaning:
                unclear.add(name)
        for name in unclear:
            del self.meanings[name]

    def by_path(self) -> dict[str, dict[str, Meaning]]:
        """{layer path: {name: Meaning}}."""
        sorted_out: dict[str, dict[str, Meaning]] = defaultdict(dict)
        for name, meaning in self.meanings.items():
            sorted_out[meaning.path][name] = meaning
        return sorted_out


def names_of(network: Network) -> Names:
    """Every name of the network's layers and norms, the host's own first; those alone of its
    embeddings, which diffusers and PEFT change by other tensors (`lora_embedding_A`).
    """
    encoders = _encoders(network.shapes)
    return _encoder_names(network, encoders) if encoders else _model_names(network)


def _model_names(network: Network) -> Names:
    names = Names()
    own = [(path.removeprefix(UNET_PREFIX), Meaning(path)) for path in _named(network)]
    own += _of_other_hosts(own)
    theirs = [one for one in diffusers(network, own) if one[1].path not in network.parameters]
    names.add(network.hosts.items())
    names.hosts = set(names.meanings)
    names.add(_in_dialects(own))
    names.add(_in_dialects((dict(network.table) | dict(theirs)).items()))
    names.add(_old_processors(theirs))
    if network.style in ("flux", "flux2"):
        names.add(_in_dialects(xlabs(own, network.shapes)))
    is_unet = any(stem.startswith("input_blocks.") for stem, _ in own)
    prefix = "unet." if is_unet else "transformer."
    for stem, meaning in theirs:
        written = names.diffusers[meaning.path]
        if names.meanings.get(prefix + stem) == meaning and (meaning.rows or not written):
            written.append(prefix + stem)
    return names


def _named(network: Network) -> Iterator[str]:
    """The paths that have names beside the host's."""
    return (path for path in network.shapes if path not in network.embeddings)


def _of_other_hosts(own: Sequence[Named]) -> list[Named]:
    """Names of Flux's norms as hosts write them that call the weight "scale" (0.3.75), or don't."""
    return [
        (stem.removesuffix(SCALE) if stem.endswith(SCALE) else stem + SCALE, meaning)
        for stem, meaning in own
        if stem.removesuffix(SCALE).endswith(("norm.query_norm", "norm.key_norm"))
    ]


def _encoder_names(network: Network, encoders: list[str]) -> Names:
    names = Names()
    names.add(network.hosts.items())
    names.hosts = set(names.meanings)
    ours = []
    for path in _named(network):
        encoder = path.split(".")[1]
        module = path.partition(".transformer.")[2]
        number = encoders.index(encoder) + 1
        if not module:
            continue
        for prefix, joint in _encoder_prefixes(encoder, number, len(encoders)):
            for stem in (module, module.removeprefix("text_model."), module.removeprefix("model.")):
                ours.append((prefix + stem.replace(".", joint), Meaning(path)))
        component = "text_encoder" if number == 1 else f"text_encoder_{number}"
        names.diffusers[path].append(f"{component}.{module}")
        ours += [(f"{component}.{old}", Meaning(path)) for old in _old_projections(module)]
    names.add(dict.fromkeys(ours))
    return names


def _old_projections(module: str) -> Iterator[str]:
    """diffusers before PEFT: self_attn.to_q for q_proj (utils/state_dict_utils.py)."""
    attention, _, projection = module.rpartition(".")
    if attention.endswith(".self_attn") and projection.endswith("_proj"):
        yield f"{attention}.to_{projection.removesuffix('_proj')}"


def _encoders(paths: Iterable[str]) -> list[str]:
    """The text encoders that have layers here, in diffusers' order."""
    found = {path.split(".")[1] for path in paths if path.startswith(CLIP_PREFIX)}
    return sorted(found, key=lambda name: (name not in _ENCODERS, _order(name)))


def _order(encoder: str) -> int:
    return _ENCODERS.index(encoder) if encoder in _ENCODERS else 0


def _encoder_prefixes(encoder: str, number: int, total: int) -> Iterator[tuple[str, str]]:
    """(prefix, what joins the words) of a text encoder's names; kohya's T5 is always the third."""
    numbers = {str(number), "3"} if encoder == "t5xxl" and total > 1 else {str(number)}
    for kind in ("lora", "lycoris", "oft"):
        for digit in sorted(numbers) + ([""] if number == 1 else []):
            yield f"{kind}_te{digit}_", "_"
    component = "text_encoder" if number == 1 else f"text_encoder_{number}"
    yield f"{component}.", "."
    yield f"{component}.base_model.model.", "."
    if total == 1:
        yield "base_model.model.", "."


def _in_dialects(stems: Iterable[Named]) -> Iterator[Named]:
    """Each name with every prefix, joined by "." and by "_"."""
    for stem, meaning in stems:
        flat = stem.replace(".", "_")
        for prefix in _DOTTED:
            yield prefix + stem, meaning
        for prefix in _UNDERSCORED:
            yield prefix + flat, meaning


def _old_processors(stems: Iterable[Named]) -> Iterator[Named]:
    """diffusers before PEFT: attn1.processor.to_q, and to_out without its number."""
    for stem, meaning in stems:
        old = stem.replace(".to_", ".processor.to_")
        if old != stem:
            for prefix in ("", "unet."):
                yield prefix + old.replace(".to_out.0", ".to_out"), meaning


def _layer_keys(network: Network, names: Names, kind: str) -> dict[str, LayerKey]:
    meanings = names.by_path()
    keys = {}
    for path, shape in network.shapes.items():
        named = meanings.get(path, {})
        whole = [name for name, meaning in named.items() if meaning == Meaning(path)]
        kohya = _kohya_name(path, [name for name in whole if name in names.hosts], kind)
        keys[path] = LayerKey(
            path=path,
            shape=shape,
            kohya=kohya,
            aliases=tuple(sorted(name for name in whole if name not in (path, kohya))),
            slices={name: meaning.rows for name, meaning in named.items() if meaning.rows},
            swapped=tuple(sorted(name for name, meaning in named.items() if meaning.swapped)),
            diffusers=tuple(names.diffusers.get(path, ())),
        )
    return keys


def _kohya_name(path: str, names: Collection[str], kind: str) -> str:
    """kohya's name among those that the host knows, so that it reads our files; else the path."""
    for prefix in _KOHYA_PREFIXES.get(kind, ()):
        for name in names:
            if name.startswith(prefix):
                return name
    original = "lora_" + path.replace("diffusion_model.", "unet_", 1).replace(".", "_")
    return original if original in names else path
