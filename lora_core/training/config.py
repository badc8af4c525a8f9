"""What a training run is told: every setting with its range and help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..adapters import ADAPTERS
from ..settings import Checked, setting
from ..targets import PRESETS

RESUME = ("continue", "start over")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """The settings of the training node itself."""

    algorithm: str = setting(
        "lora",
        "Type of adapter to train. " + " ".join(f"{n}: {t.help}" for n, t in ADAPTERS.items()),
        choices=tuple(ADAPTERS),
    )
    rank: int = setting(
        0,
        "Size of the LoRA: more rank learns more detail and makes a bigger file. "
        "0 = automatic (16). oft and boft: the size of their blocks, as near as a layer allows. "
        "full and ia3 have none.",
        minimum=0,
        maximum=1024,
    )
    alpha: float = setting(
        0.0,
        "The change is scaled by alpha / rank. 0 = automatic: equal to the rank, a scale of 1. "
        "full, ia3, oft and boft are not scaled.",
        minimum=0.0,
        maximum=4096.0,
        step=0.5,
    )
    steps: int = setting(
        0,
        "Optimizer steps in all. 0 = automatic: about 100 passes over every image, within the "
        "limits of the model's family. Raise it on a finished run to train that run further.",
        minimum=0,
        maximum=1_000_000,
    )
    learning_rate: float = setting(
        0.0,
        "Size of a step. 0 = automatic by the model's family (2e-4 for SD1.5, 1e-4 for others).",
        minimum=0.0,
        maximum=10.0,
        step=0.00001,
    )
    batch_size: int = setting(
        0,
        "Images a step. 0 = automatic by the model's family (2 for SD1.5, 1 for others).",
        minimum=0,
        maximum=1024,
    )
    training_seed: int = setting(
        42,
        "Seed of everything random: initial weights, order of images, noise, dropout. "
        "The same seed and inputs give the same LoRA.",
        minimum=0,
        maximum=2**53 - 1,
    )
    output_name: str = setting(
        "my_lora", "Name of the LoRA file under output/loras, where every LoRA loader finds it."
    )
    resume: str = setting(
        "continue",
        "continue: the same inputs find their run, finished (its result at once) or unfinished "
        "(goes on where it stopped). start over: forget that run and train anew.",
        choices=RESUME,
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Checked):
    """The settings of the Training Options node; the defaults suit most runs."""

    optimizer: str = setting("AdamW", "Update rule of the adapter's weights.", choices=("AdamW",))
    weight_decay: float = setting(
        0.01,
        "Share of the learning rate by which weights shrink.",
        minimum=0.0,
        maximum=1.0,
        step=0.001,
    )
    schedule: str = setting(
        "auto",
        "Course of the learning rate after warm-up. auto: cosine for SD1.x and SDXL, "
        "constant for flow models.",
        choices=("auto", "constant", "cosine", "linear"),
    )
    warmup: float = setting(
        0.05,
        "Share of the steps over which the learning rate rises from zero.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    final_learning_rate: float = setting(
        0.1,
        "What a falling schedule ends at, as a share of the learning rate.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    accumulation_steps: int = setting(
        1,
        "Batches whose gradients are averaged for one step: a larger batch in the same memory.",
        minimum=1,
        maximum=1024,
    )
    max_grad_norm: float = setting(
        1.0,
        "Gradients longer than this are scaled down to it. 0 = never.",
        minimum=0.0,
        maximum=1000.0,
        step=0.1,
    )
    loss_weighting: str = setting(
        "auto",
        "Weight of each noise level. min-snr evens them out for eps and v models; "
        "auto uses it there and nothing for flow models and zero-terminal-SNR models.",
        choices=("auto", "none", "min-snr"),
    )
    min_snr_gamma: float = setting(
        5.0,
        "Signal-to-noise ratio from which min-snr holds back the low-noise steps.",
        minimum=0.01,
        maximum=1000.0,
        step=0.1,
    )
    timestep_sampling: str = setting(
        "auto",
        "How noise levels are drawn. auto: uniform for eps and v models, logit-normal for flow.",
        choices=("auto", "uniform", "logit-normal"),
    )
    timestep_shift: float = setting(
        0.0,
        "Flow models: moves the noise levels up (over 1) or down. 0 = by image size (Chroma: 1).",
        minimum=0.0,
        maximum=100.0,
        step=0.05,
    )
    caption_dropout: float = setting(
        0.05,
        "Share of the images that are trained with an empty caption.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    guidance: float = setting(
        -1.0,
        "Guidance value told to guidance-distilled models such as Flux while training. "
        "-1 = automatic by the model's family (1, for Chroma 0).",
        minimum=-1.0,
        maximum=100.0,
        step=0.1,
    )
    targets: str = setting(
        "attention + feed-forward", "Which layers get an adapter.", choices=PRESETS
    )
    include: str = setting(
        "",
        "Only layers whose path matches one of these patterns, separated by commas; "
        "* and ? stand for any text. Example: attn2, output_blocks.*",
    )
    exclude: str = setting("", "No layers whose path matches one of these patterns.")
    text_encoder: bool = setting(
        False,
        "Train the text encoder as well, with its own learning rate. Captions are then encoded "
        "anew at every step, which takes longer.",
    )
    text_encoder_learning_rate: float = setting(
        0.0,
        "Learning rate of the text encoder's layers. 0 = automatic (1e-5).",
        minimum=0.0,
        maximum=10.0,
        step=0.00001,
    )
    precision: str = setting(
        "auto",
        "What the model computes in. auto: what it was loaded for. "
        "Adapter weights are always fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = setting(
        False,
        "Compute each block again in the backward pass rather than keep its activations: "
        "much less memory, about a third slower.",
    )
    save_state_every: int = setting(
        100,
        "Steps between saves of the run's state, from which it goes on after a crash.",
        minimum=1,
        maximum=1_000_000,
    )
    dora: bool = setting(
        False,
        "Train the magnitude of each row of a weight apart from its direction (DoRA; lora, loha "
        "and lokr). Learns closer to full fine-tuning, a little slower.",
    )
    rslora: bool = setting(
        False,
        "Scale by alpha / √rank instead of alpha / rank, so that high ranks learn as fast as low "
        "ones (lora, loha, lokr and glora). Written into the file's alpha.",
    )
    initialisation: str = setting(
        "default",
        "pissa: a lora begins at the weight's own strongest directions and learns faster; its file "
        "has twice the rank. For lora only, without dora, tucker, max_norm and rank_dropout.",
        choices=("default", "pissa"),
    )
    tucker: bool = setting(
        False, "Convolutions as a small core and two 1x1 ones (lora, loha, lokr): smaller files."
    )
    lokr_factor: int = setting(
        -1,
        "Size of lokr's first block: a small one makes larger files that learn more. -1 = as near "
        "to a square as can be.",
        minimum=-1,
        maximum=4096,
    )
    decompose_both: bool = setting(
        False, "lokr: the first block as a product of two factors, too, where it is large enough."
    )
    lora_plus_ratio: float = setting(
        1.0,
        "Learning rate of the factor that starts at zero, as a multiple of the other's (LoRA+, "
        "whose paper takes 16; lora, loha and lokr). 1 = the same.",
        minimum=0.01,
        maximum=256.0,
        step=0.5,
    )
    rank_dropout: float = setting(
        0.0,
        "Share of the ranks that are left out at each step, against overfitting (lora, loha and "
        "lokr).",
        minimum=0.0,
        maximum=0.99,
        step=0.01,
    )
    module_dropout: float = setting(
        0.0,
        "Share of the layers whose adapter is left out at each step, against overfitting.",
        minimum=0.0,
        maximum=0.99,
        step=0.01,
    )
    max_norm: float = setting(
        0.0,
        "A layer's change is scaled down to this norm after each step, which keeps a LoRA from "
        "burning in (lora, loha and lokr). 0 = no limit; 1 is common.",
        minimum=0.0,
        maximum=1000.0,
        step=0.1,
    )
    norms: bool = setting(
        False,
        "Train the norms, too, with any type of adapter: weight and bias of those in the blocks of "
        "the chosen layers. include and exclude hold for them as well: with include, name them "
        "there (attn2, norm2).",
    )


# What does not tell a run from another one: how long, how it is saved, its name, its memory.
NOT_IDENTITY = frozenset(
    {"steps", "output_name", "resume", "save_state_every", "gradient_checkpointing"}
)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A TrainConfig and TrainOptions with every "automatic" replaced by its value."""

    train: TrainConfig
    options: TrainOptions

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same one, by name."""
        merged = dataclasses.asdict(self.train) | dataclasses.asdict(self.options)
        return {name: value for name, value in merged.items() if name not in NOT_IDENTITY}

    def to_json(self) -> dict[str, Any]:
        return {
            "train": dataclasses.asdict(self.train),
            "options": dataclasses.asdict(self.options),
        }
