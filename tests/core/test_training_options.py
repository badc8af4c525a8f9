"""LoRA+, dropout, the norm limit and PiSSA in the training loop, on a real small model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, Bias
from lora_weave.lora_core.adapters.dora import Decomposable
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.adapters.pieces import Pieces
from lora_weave.lora_core.events import Stepped
from lora_weave.lora_core.training.dropout import dropout
from lora_weave.lora_core.training.loop import Training

from .layer_kinds import KINDS, make_input, make_layer, run, with_weight
from .tiny import TinyDenoiser as Denoiser
from .tiny import TinyRun, make_adapters, make_config, make_examples, make_model, make_run

Close = Callable[..., None]


def run_of(name: str, **options: object) -> TinyRun:
    config = make_config(options=options, steps=60)
    model = make_model()
    training = Training(config, make_adapters(model, name), torch.device("cpu"))
    return TinyRun(training, make_examples(config), Denoiser("eps", model), model)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_type_learns(name: str) -> None:
    steps = run_of(name).finish()
    losses = [step.loss for step in steps if isinstance(step, Stepped)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_lora_plus_moves_the_up_factor_by_its_ratio() -> None:
    """The first step of Adam is one learning rate long for every number with a gradient."""
    config = make_config(options={"lora_plus_ratio": 8.0, "warmup": 0.0, "weight_decay": 0.0})
    tiny = make_run(config)
    before = {path: (a.up.clone(), a.down.clone()) for path, a in adapters_of(tiny).items()}
    events = tiny.events()
    next(event for event in events if isinstance(event, Stepped))
    rate = config.train.learning_rate
    # up and its gradient are zero at the first step for down, so that two steps were taken.
    for path, adapter in adapters_of(tiny).items():
        up = (adapter.up - before[path][0]).abs().max().item()
        down = (adapter.down - before[path][1]).abs().max().item()
        assert 7.9 * rate < up < 16.1 * rate
        assert down < 2.1 * rate


def adapters_of(tiny: TinyRun) -> dict[str, LoRA]:
    return {path: a for path, a in tiny.training.adapters.items() if isinstance(a, LoRA)}


def in_pieces(model: torch.nn.Module) -> dict[str, Adapter]:
    """LoRAs of the first and the last rows of each layer, as files of split layers give them."""
    made: dict[str, Adapter] = {}
    for path, adapter in make_adapters(model).items():
        rows, rest = adapter.shape[0], adapter.shape[1:]
        third = max(rows // 3, 1)
        sizes = {0: third, rows - third: third}
        made[path] = Pieces(
            {start: LoRA.create((size, *rest), 2, 2.0) for start, size in sizes.items()},
            adapter.shape,
        )
    return made


def test_pieces_learn_on_their_rows_within_the_limit_of_each() -> None:
    config = make_config(options={"max_norm": 0.05, "rank_dropout": 0.3}, steps=60)
    model = make_model()
    training = Training(config, in_pieces(model), torch.device("cpu"))
    steps = TinyRun(training, make_examples(config), Denoiser("eps", model), model).finish()
    losses = [step.loss for step in steps if isinstance(step, Stepped)]
    assert sum(losses[-10:]) < sum(losses[:10])
    norms = []
    for adapter in training.adapters.values():
        change = adapter.delta(torch.empty(adapter.shape)).detach()
        assert isinstance(adapter, Pieces)
        norms += [change[place].norm() for place in adapter.places]
        assert not change[adapter.places[0].stop : adapter.places[1].start].any()
    assert 0.049 < max(norms) < 0.05 * 1.001


def test_norms_stay_within_the_limit() -> None:
    free, limited = run_of("lora"), run_of("lora", max_norm=0.05)
    free.finish()
    limited.finish()
    norms = [a.delta(torch.empty(a.shape)).norm().item() for a in free.training.adapters.values()]
    assert max(norms) > 0.1
    for adapter in limited.training.adapters.values():
        assert adapter.delta(torch.empty(adapter.shape)).norm() < 0.05 * 1.001


# --- dropout


def drawn(index: int, seed: int = 42, **options: float) -> tuple[list[bool], list[Tensor | None]]:
    config = make_config(options=options, training_seed=seed)
    made = make_adapters(make_model())
    adapters = list(made.values())
    with dropout(config, made, index):
        found = [a.is_dropped for a in adapters], [a.rank_mask for a in adapters]
    assert not any(a.is_dropped or a.rank_mask is not None for a in adapters)
    return found


def test_dropout_follows_from_seed_and_index() -> None:
    first, again = (drawn(3, rank_dropout=0.5, module_dropout=0.5) for _ in range(2))
    other = drawn(4, rank_dropout=0.5, module_dropout=0.5)
    assert first[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    masks = zip(first[1], other[1], strict=True)
    assert first[0] != other[0] or any(not torch.equal(a, b) for a, b in masks)


def test_share_and_size_of_what_is_dropped() -> None:
    masks = torch.cat([mask for index in range(200) for mask in drawn(index, rank_dropout=0.3)[1]])
    assert masks.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    share = (masks == 0).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(masks)) ** 0.5
    dropped = [
        is_dropped for index in range(200) for is_dropped in drawn(index, module_dropout=0.3)[0]
    ]
    assert abs(sum(dropped) / len(dropped) - 0.3) < 4 * (0.3 * 0.7 / len(dropped)) ** 0.5


def test_one_adapter_stays_at_least() -> None:
    for index in range(50):
        assert not all(drawn(index, module_dropout=0.99)[0])


def test_a_bias_is_left_out_with_its_layer() -> None:
    made = make_adapters(make_model(), "full")
    made |= {f"{path}.bias": Bias.create(adapter.shape[:1]) for path, adapter in made.items()}
    seen = set()
    for index in range(50):
        with dropout(make_config(options={"module_dropout": 0.5}), made, index):
            for path in list(made)[: len(made) // 2]:
                assert made[path].is_dropped == made[f"{path}.bias"].is_dropped
                seen.add(made[path].is_dropped)
    assert seen == {True, False}


@pytest.mark.parametrize("options", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}], ids=str)
def test_training_with_dropout_is_repeatable_and_another_one(options: dict[str, float]) -> None:
    first, again, without = run_of("lora", **options), run_of("lora", **options), run_of("lora")
    for tiny in (first, again, without):
        tiny.finish()
    same = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    other = zip(first.parameters(), without.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in other)


# --- PiSSA


def pissa(kind: str, rank: int = 2) -> LoRA:
    weight = make_layer(kind).weight
    lora = LoRA.create(tuple(weight.shape), rank, 1.5, generator=torch.Generator().manual_seed(0))
    lora.begin_at_principal(weight)
    return lora


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_begins_at_the_strongest_directions_and_changes_nothing(kind: str) -> None:
    lora, weight = pissa(kind), make_layer(kind).weight
    assert torch.equal(lora.delta(weight), torch.zeros_like(weight))
    x = make_input(kind)
    assert torch.equal(run(make_layer(kind), lora, x), make_layer(kind)(x))
    wide = weight.double().flatten(1)
    started = lora.scale * lora.up.double().flatten(1) @ lora.down.double().flatten(1)
    optimum = torch.linalg.svdvals(wide)[2:].norm()  # what the best two directions leave
    assert (wide - started).norm() <= 1.001 * optimum + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_trains_the_difference_to_where_it_began(kind: str, assert_close: Close) -> None:
    lora, layer = pissa(kind), make_layer(kind)
    before = lora.up.detach().double().flatten(1) @ lora.down.detach().double().flatten(1)
    with torch.no_grad():
        lora.up.add_(0.3 * torch.randn(lora.up.shape, generator=torch.Generator().manual_seed(1)))
        lora.down.mul_(1.2)
    after = lora.up.double().flatten(1) @ lora.down.double().flatten(1)
    expected = (lora.scale * (after - before)).reshape(layer.weight.shape)
    assert_close(lora.delta(layer.weight), expected)
    x = make_input(kind)
    assert_close(run(layer, lora, x), with_weight(layer, expected, x).detach())
    again = LoRA.from_tensors(lora.tensors(), lora.shape)
    assert again.rank == lora.rank == 4
    assert_close(again.delta(layer.weight), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_gradcheck(kind: str) -> None:
    layer, lora = make_layer(kind, torch.float64), pissa(kind).double()
    lora.up.data.mul_(1.1)
    inputs = (make_input(kind, torch.float64).requires_grad_(), *lora.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: run(layer, lora, x), inputs, fast_mode=True)


def test_pissa_in_half_precision_keeps_a_small_change() -> None:
    """up · down - B0 · A0 in float16 would lose it among the weight's own size."""
    lora = pissa("linear")
    with torch.no_grad():
        lora.up.add_(1e-4 * torch.randn(lora.up.shape, generator=torch.Generator().manual_seed(1)))
    exact = lora.delta(torch.empty(lora.shape)).detach()
    halved = {name: t.half().float() for name, t in lora.tensors().items()}
    found = LoRA.from_tensors(halved, lora.shape).delta(torch.empty(lora.shape))
    assert (found - exact).norm() < 2e-3 * exact.norm()


def test_every_decomposable_type_is_known_by_its_options() -> None:
    named: list[type[Adapter]] = [cls for cls in ADAPTERS.values() if issubclass(cls, Decomposable)]
    assert {cls.name for cls in named} == {"lora", "loha", "lokr"}
