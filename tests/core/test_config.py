"""Settings carry their facts, are checked at once, and become numbers by the model's family."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.settings import Checked, problems_of, setting
from lora_weave.lora_core.targets import PRESETS
from lora_weave.lora_core.training.config import (
    NOT_IDENTITY,
    ResolvedConfig,
    TrainConfig,
    TrainOptions,
)
from lora_weave.lora_core.training.defaults import ModelFacts, family_defaults, resolve

CONFIGS = [TrainConfig, TrainOptions]
FIELDS = [(config, field) for config in CONFIGS for field in dataclasses.fields(config)]
SD15 = ModelFacts(family="SD1.5", is_flow=False, max_sigma=14.6)
SDXL = ModelFacts(family="SDXL", is_flow=False, max_sigma=14.6)
FLUX = ModelFacts(family="Flux", is_flow=True, max_sigma=1.0)
every_field = pytest.mark.parametrize(
    ("config", "field"), FIELDS, ids=[f"{c.__name__}.{f.name}" for c, f in FIELDS]
)


# settings


@every_field
def test_every_field_has_help_and_a_range(config: type, field: dataclasses.Field[Any]) -> None:
    facts = field.metadata
    assert facts["help"].endswith(".") or facts["help"].endswith(", output_blocks.*")
    if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
        assert facts["minimum"] <= field.default <= facts["maximum"]
    if facts["choices"]:
        assert field.default in facts["choices"]


@every_field
def test_values_at_the_limits_pass_and_beyond_fail(
    config: type, field: dataclasses.Field[Any]
) -> None:
    facts = field.metadata
    if facts["minimum"] is not None:
        below, above = facts["minimum"] - 1, facts["maximum"] + 1
        config(**{field.name: facts["minimum"]})
        config(**{field.name: facts["maximum"]})
        for value in (below, above, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{field.name} is {value}, expected "):
                config(**{field.name: value})
    for choice in facts["choices"]:
        config(**{field.name: choice})
    if facts["choices"]:
        with pytest.raises(ValueError, match=f"{field.name} is 'sideways', known are "):
            config(**{field.name: "sideways"})


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        TrainOptions(optimizer="SGD", warmup=2.0, min_snr_gamma=math.nan)
    lines = str(error.value).splitlines()
    assert lines == [
        "settings out of range:",
        "optimizer is 'SGD', known are AdamW",
        "warmup is 2.0, expected 0.0 to 1.0",
        "min_snr_gamma is nan, expected a finite number",
    ]


def test_own_configs_work_the_same() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Checked):
        size: int = setting(4, "Size of it.", minimum=1, maximum=8, step=2)
        plain: str = "no setting"
        switch: bool = setting(True, "Whether.", minimum=2, maximum=3)

    assert problems_of(Config()) == []
    facts = dataclasses.fields(Config)[0].metadata
    assert (facts["step"], facts["help"]) == (2, "Size of it.")
    with pytest.raises(ValueError, match="size is 9, expected 1 to 8"):
        Config(size=9)


def test_a_limit_on_one_side_is_told_as_one() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        least: float = setting(0.0, "A size.", minimum=1.5)
        most: int = setting(9, "A count.", maximum=8)

    assert problems_of(Config()) == [
        "least is 0.0, expected at least 1.5",
        "most is 9, expected at most 8",
    ]


def test_choices_are_the_registries() -> None:
    choices = {f.name: f.metadata["choices"] for _, f in FIELDS}
    assert choices["algorithm"] == tuple(ADAPTERS)
    assert choices["targets"] == PRESETS


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().rank = 4  # type: ignore[misc]


# automatic values


def resolved(model: ModelFacts, num_images: int = 10, **options: Any) -> ResolvedConfig:
    return resolve(TrainConfig(), TrainOptions(**options), model, num_images)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (SD15, (16, 16.0, 2e-4, 2, "cosine", "min-snr", "uniform")),
        (SDXL, (16, 16.0, 1e-4, 1, "cosine", "min-snr", "uniform")),
        (FLUX, (16, 16.0, 1e-4, 1, "constant", "none", "logit-normal")),
        # zero-terminal SNR (the host's sigma of it): min-SNR is 0/0 at the last step
        (
            dataclasses.replace(SDXL, max_sigma=4518.0),
            (16, 16.0, 1e-4, 1, "cosine", "none", "uniform"),
        ),
    ],
    ids=["sd15", "sdxl", "flux", "zsnr"],
)
def test_automatic_values(model: ModelFacts, expected: tuple[Any, ...]) -> None:
    config = resolved(model)
    train, options = config.train, config.options
    assert expected == (
        train.rank,
        train.alpha,
        train.learning_rate,
        train.batch_size,
        options.schedule,
        options.loss_weighting,
        options.timestep_sampling,
    )


@pytest.mark.parametrize(
    ("model", "num_images", "steps"),
    [
        (SD15, 1, 300),  # at least
        (SD15, 10, 500),  # 100 passes, two images a step
        (SD15, 1000, 3000),  # at most
        (SDXL, 1, 500),
        (SDXL, 12, 1200),
        (FLUX, 5, 800),
        (FLUX, 20, 2000),
        (ModelFacts(family="Qwen-Image", is_flow=True, max_sigma=1.0), 5, 1000),
        (ModelFacts(family="Z-Image", is_flow=True, max_sigma=1.0), 5, 1000),
    ],
)
def test_automatic_steps(model: ModelFacts, num_images: int, steps: int) -> None:
    assert resolved(model, num_images).train.steps == steps


def test_automatic_steps_count_accumulated_images() -> None:
    assert resolved(FLUX, 20, accumulation_steps=2).train.steps == 1000


def test_values_that_were_set_stay() -> None:
    train = TrainConfig(
        rank=8, alpha=4.0, steps=7, learning_rate=1e-3, batch_size=3, training_seed=5
    )
    options = TrainOptions(
        schedule="linear",
        loss_weighting="none",
        timestep_sampling="uniform",
        guidance=3.5,
        text_encoder_learning_rate=3e-5,
        precision="bf16",
    )
    assert resolve(train, options, FLUX, 10) == ResolvedConfig(train=train, options=options)


def test_automatic_alpha_is_the_rank_that_was_set() -> None:
    assert resolve(TrainConfig(rank=64), TrainOptions(), SDXL, 1).train.alpha == 64.0


def test_automatic_guidance() -> None:
    chroma = ModelFacts(family="Chroma", is_flow=True, max_sigma=1.0)
    assert resolved(FLUX).options.guidance == 1.0
    assert resolved(chroma).options.guidance == 0.0
    assert resolved(chroma, guidance=3.5).options.guidance == 3.5


def test_automatic_timestep_shift() -> None:
    chroma = ModelFacts(family="Chroma", is_flow=True, max_sigma=1.0)
    assert resolved(FLUX).options.timestep_shift == 0.0  # by the image size
    assert resolved(chroma).options.timestep_shift == 1.0
    assert resolved(chroma, timestep_shift=3.0).options.timestep_shift == 3.0


def test_automatic_learning_rate_of_the_text_encoder() -> None:
    assert resolved(SD15).options.text_encoder_learning_rate == 1e-5


def test_unknown_families_get_the_defaults_of_flow_models() -> None:
    assert family_defaults("Tomorrow") == family_defaults("Flux")


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("SD1.5", (512,)),
        ("SDXL", (1024,)),
        ("SD3", (512, 768)),
        ("Chroma", (512, 768)),
        ("Z-Image", (768, 1024)),
    ],
)
def test_automatic_resolutions(family: str, sizes: tuple[int, ...]) -> None:
    assert family_defaults(family).resolutions_px == sizes


def test_nothing_is_automatic_after_resolving() -> None:
    config = resolved(SD15)
    values = dataclasses.asdict(config.train)
    assert all(values[name] for name in ("rank", "alpha", "steps", "learning_rate", "batch_size"))
    left = {n for n, value in dataclasses.asdict(config.options).items() if value == "auto"}
    assert left <= {"precision"}  # which means: as the model was loaded


# identity


def test_identity_ignores_how_long_and_where_to() -> None:
    one = resolve(TrainConfig(), TrainOptions(), SD15, 1)
    other = ResolvedConfig(
        train=dataclasses.replace(one.train, steps=99, output_name="b", resume="start over"),
        options=dataclasses.replace(one.options, save_state_every=1),
    )
    assert one.identity() == other.identity()
    assert not one.identity().keys() & NOT_IDENTITY


@every_field
def test_identity_has_every_other_setting(config: type, field: dataclasses.Field[Any]) -> None:
    identity = resolved(SD15).identity()
    assert (field.name in identity) == (field.name not in NOT_IDENTITY)


def test_to_json_is_complete() -> None:
    config = resolved(FLUX)
    data = config.to_json()
    again = ResolvedConfig(
        train=TrainConfig(**data["train"]), options=TrainOptions(**data["options"])
    )
    assert again == config
