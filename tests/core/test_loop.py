"""The training loop on a small real model: what it learns, skips, scales, yields and repeats."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_weave.lora_core.batches import BatchPlan
from lora_weave.lora_core.events import Saved, Started, Stepped
from lora_weave.lora_core.training.config import ResolvedConfig
from lora_weave.lora_core.training.examples import Batch, Examples, draw_batch, seed_of
from lora_weave.lora_core.training.loop import MAX_SKIPPED_IN_A_ROW, Training
from lora_weave.lora_core.training.objective import weighted_loss
from lora_weave.lora_core.training.optimizers import (
    LossScale,
    UnfusedAdamW,
    learning_rate_at,
    make_optimizer,
)

from .tiny import (
    KINDS,
    LATENT,
    NUM_IMAGES,
    WIDTH,
    TinyDenoiser,
    TinyRun,
    attached_to,
    column,
    layers_of,
    make_adapters,
    make_config,
    make_examples,
    make_model,
    make_run,
    same_bits,
)

every_kind = pytest.mark.parametrize("kind", KINDS)
fused_or_not = pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
NO_CLIPPING = {"max_grad_norm": 0.0}


def batch_of(run: TinyRun, index: int) -> Batch:
    return draw_batch(run.training.config, run.examples, run.denoiser, index)


def loss_on(run: TinyRun, batches: list[Batch]) -> float:
    with torch.no_grad(), attached_to(run.model, run.training.adapters):
        losses = [
            weighted_loss(run.denoiser.predict(b.x_t, b.sigma, b.conditioning), b.target, b.weight)
            for b in batches
        ]
    return sum(loss.item() for loss in losses)


def unfuse(run: TinyRun) -> TinyRun:
    """Take the steps as on a device whose fused kernel does not skip bad ones."""
    training = run.training
    training.optimizer = make_optimizer(training.config, training._groups(), fused=False)
    return run


def watch_gradients(run: TinyRun) -> list[list[Tensor]]:
    """The gradients that each optimizer step gets, as they come."""
    seen: list[list[Tensor]] = []
    run.training.optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in run.training.parameters])
    )
    return seen


# learning


@every_kind
def test_loss_on_fixed_noise_falls(kind: str) -> None:
    run = make_run(make_config(kind, steps=100, options={"loss_weighting": "none"}), kind)
    fixed = [batch_of(run, index) for index in range(10_000, 10_020)]
    before = loss_on(run, fixed)
    run.finish()
    assert loss_on(run, fixed) < 0.8 * before


@every_kind
def test_steps_equal_a_plain_loop_in_float64(kind: str) -> None:
    """Dense W + ΔW, the loss in x0's space, clipping and AdamW by hand; twelve steps."""
    options = {"loss_weighting": "min-snr" if kind != "flow" else "none", "max_grad_norm": 0.5}
    run = make_run(make_config(kind, steps=12, options=options), kind)
    config = run.training.config
    model = make_model().double()
    factors = [
        {n: p.detach().double().requires_grad_() for n, p in adapter.named_parameters()}
        for adapter in make_adapters(model).values()
    ]
    leaves = [leaf for named in factors for leaf in named.values()]
    state = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in leaves]
    for step in range(12):
        batch = batch_of(run, step)
        weights = dict(model.named_parameters())
        for path, named in zip(layers_of(model), factors, strict=True):  # alpha / rank is 1
            weight = weights[f"{path}.weight"]
            change = named["up"].flatten(1) @ named["down"].flatten(1)
            weights[f"{path}.weight"] = weight + change.reshape(weight.shape)
        x_t, sigma = batch.x_t.double(), batch.sigma.double()
        scale = 1.0 if kind == "flow" else (column(sigma, x_t) ** 2 + 1).rsqrt()
        inputs = (x_t * scale, sigma.log() / 4, torch.cat(batch.conditioning).double())
        prediction = torch.func.functional_call(model, weights, inputs)
        loss = textbook_loss(kind, run, step, x_t, sigma, prediction)
        grads = torch.autograd.grad(loss, leaves)
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        rate = learning_rate_at(config, step)
        for leaf, grad, (m, v) in zip(leaves, grads, state, strict=True):
            grad = grad * min(1.0, 0.5 / norm.item())
            adamw_by_hand(leaf, grad, m, v, step + 1, rate, config.options.weight_decay)
    run.finish()
    for found, expected in zip(run.training.parameters, leaves, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 1e-5  # observed: up to 6e-7


def textbook_loss(
    kind: str, run: TinyRun, index: int, x_t: Tensor, sigma: Tensor, prediction: Tensor
) -> Tensor:
    """min(SNR, 5) · mse(x0) for eps and v, mse(v) for flow; the noise is read off x_t."""
    items = run.examples.plan.batch(index)
    x0 = torch.cat([run.examples.latents[item] for item in items]).double()
    s = column(sigma, x_t)
    if kind == "flow":
        noise = (x_t - (1 - s) * x0) / s
        return (prediction - (noise - x0)).square().mean()
    if kind == "eps":
        x0_found = x_t - s * prediction
    else:  # x = x_t / √(σ²+1) = cos x0 + sin n, v = cos n - sin x0, x0 = cos x - sin v
        cos, sin = (1 + s**2).rsqrt(), s * (1 + s**2).rsqrt()
        x0_found = cos * (cos * x_t) - sin * prediction
    held = (1 / sigma**2).clamp(max=5.0)
    return (held * (x0_found - x0).square().mean(dim=(1, 2, 3))).mean()


def adamw_by_hand(
    parameter: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, rate: float, decay: float
) -> None:
    """https://arxiv.org/abs/1711.05101, algorithm 2, in place."""
    with torch.no_grad():
        m.mul_(0.9).add_(0.1 * grad)
        v.mul_(0.999).add_(0.001 * grad**2)
        m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
        parameter.sub_(rate * decay * parameter + rate * m_hat / (v_hat.sqrt() + 1e-8))


@fused_or_not
def test_optimizer_is_adamw_and_groups_have_their_share_of_the_rate(fused: bool) -> None:
    config = make_config(learning_rate=1e-2, options={"weight_decay": 0.1})
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    parameters = [nn.Parameter(value.clone()) for value in start]
    exact = [value.double() for value in start]
    state = [(torch.zeros_like(value), torch.zeros_like(value)) for value in exact]
    optimizer = make_optimizer(config, {1.0: parameters[:1], 0.1: parameters[1:]}, fused=fused)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 0.1]
    for step in range(1, 51):
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = rate
        grads = [torch.randn(5, 3, generator=generator) for _ in range(2)]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        for value, grad, (m, v), rate in zip(exact, grads, state, (1e-2, 1e-3), strict=True):
            adamw_by_hand(value, grad.double(), m, v, step, rate, decay=0.1)
    for parameter, value in zip(parameters, exact, strict=True):
        # observed: 3e-7
        torch.testing.assert_close(parameter.detach().double(), value, rtol=2e-6, atol=2e-6)


def test_text_encoder_has_its_own_learning_rate() -> None:
    config = make_config(
        learning_rate=1e-3, options={"text_encoder_learning_rate": 1e-5, "warmup": 0.0}
    )
    adapters = make_adapters(make_model())
    named = {("text_encoders." if p == "level" else "") + p: a for p, a in adapters.items()}
    training = Training(config, named, torch.device("cpu"))
    by_scale = {
        g["lr_scale"]: {id(p) for p in g["params"]} for g in training.optimizer.param_groups
    }
    text = {id(p) for p in adapters["level"].parameters()}
    assert sorted(by_scale) == [pytest.approx(1e-2), 1.0]
    assert by_scale[min(by_scale)] == text
    assert by_scale[1.0] == {id(p) for p in training.parameters} - text


def test_the_loop_uses_the_share_of_each_group() -> None:
    options = {"text_encoder_learning_rate": 1e-5, "schedule": "linear"}
    config = make_config(learning_rate=1e-3, steps=4, options=options)
    run = make_run(config)
    adapters = run.training.adapters
    named = {("text_encoders." if p == "level" else "") + p: a for p, a in adapters.items()}
    training = Training(config, named, torch.device("cpu"))
    used: list[list[float]] = []
    training.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups])
    )
    with attached_to(run.model, adapters):
        list(training.steps(run.examples, run.denoiser))
    shares = [group["lr_scale"] for group in training.optimizer.param_groups]
    assert sorted(shares) == [pytest.approx(1e-2), 1.0]
    expected = [learning_rate_at(config, step) for step in range(4)]
    assert used == [[rate * share for share in shares] for rate in expected]


# batches and gradients


@every_kind
def test_accumulation_equals_the_larger_batch(kind: str) -> None:
    options = {"accumulation_steps": 3, **NO_CLIPPING}
    run = make_run(make_config(kind, batch_size=1, steps=2, options=options), kind)
    single = make_run(make_config(kind, batch_size=1, steps=2, options=options), kind)
    seen = watch_gradients(run)
    first = run.finish()[0]
    parts = [batch_of(single, index) for index in range(3)]
    with attached_to(single.model, single.training.adapters):
        prediction = single.denoiser.predict(
            torch.cat([part.x_t for part in parts]),
            torch.cat([part.sigma for part in parts]),
            [caption for part in parts for caption in part.conditioning],
        )
    target = torch.cat([part.target for part in parts])
    loss = weighted_loss(prediction, target, torch.cat([part.weight for part in parts]))
    loss.backward()
    assert first.loss == pytest.approx(loss.item(), rel=1e-5)
    for found, parameter in zip(seen[0], single.training.parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_every_batch_is_trained_on_once() -> None:
    asked: list[int] = []

    class Plan(BatchPlan):
        def batch(self, micro_step: int) -> list[int]:
            asked.append(micro_step)
            return super().batch(micro_step)

    config = make_config(steps=4, options={"accumulation_steps": 3})
    make_run(config, plan=Plan([(512, 512)] * 3, [1] * 3, 2, 0)).finish()
    assert asked == list(range(12))


@pytest.mark.parametrize("longest", [0.0, 1e-2, 1000.0])
def test_clipping(longest: float) -> None:
    config = make_config(steps=1)
    free = make_run(make_config(steps=1, options=NO_CLIPPING))
    run = make_run(make_config(steps=1, options={"max_grad_norm": longest}))
    assert run.training.config.train == config.train
    expected = watch_gradients(free)
    norm = free.finish()[0].grad_norm
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected[0]]).norm().item())
    assert run.finish()[0].grad_norm == norm  # told as it was before clipping
    scale = min(1.0, longest / norm) if longest else 1.0
    for parameter, grad in zip(run.training.parameters, expected[0], strict=True):
        first_moment = run.training.optimizer.state[parameter]["exp_avg"]  # (1 - β1) · gradient
        torch.testing.assert_close(first_moment, 0.1 * grad * scale, rtol=1e-5, atol=1e-9)


def test_batches_of_several_sizes() -> None:
    """Buckets have latents of other sizes; a batch holds one of them only."""
    config = make_config(steps=8)
    sizes = [(512, 512), (512, 512), (768, 320)]
    latents = [torch.randn(LATENT), torch.randn(LATENT), torch.randn(1, 4, 4, 9)]
    plan = BatchPlan(sizes, [1, 2, 3], config.train.batch_size, config.train.training_seed)
    steps = make_run(config, plan=plan, latents=latents).finish()
    assert len(steps) == 8 and not any(step.skipped for step in steps)


def test_a_model_that_does_not_use_its_layers_is_told() -> None:
    class Deaf(TinyDenoiser):
        def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
            return x_t.clone().requires_grad_()

    with pytest.raises(RuntimeError, match="no adapter received a gradient"):
        make_run(make_config(), denoiser=Deaf).finish()


# steps that are skipped


class Poisoned(TinyDenoiser):
    """Goes wrong at the calls in `bad`: the loss is NaN, or with `hidden` only its gradient."""

    bad: frozenset[int] = frozenset()
    hidden = False
    calls = 0

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        prediction = super().predict(x_t, sigma, conditioning)
        self.calls += 1
        if self.calls not in self.bad:
            return prediction
        if self.hidden:  # the derivative of √ at 0 is infinite
            return prediction + (prediction - prediction.detach()).abs().sqrt()
        return prediction * math.nan


def poisoned_run(bad: Any, hidden: bool = False, **config: Any) -> TinyRun:
    kind = type("Poison", (Poisoned,), {"bad": frozenset(bad), "hidden": hidden})
    return make_run(make_config(**config), denoiser=kind)


@fused_or_not
@pytest.mark.parametrize("hidden", [False, True], ids=["loss", "gradient-only"])
def test_a_step_that_is_not_finite_changes_nothing(hidden: bool, fused: bool) -> None:
    run = poisoned_run({1, 4}, hidden, steps=6)
    run = run if fused else unfuse(run)
    before, kept = [], []
    for event in run.events():
        kept.append((event, run.parameters(), run.optimizer_state(), run.training.step))
        before.append(run.training.step)
    # an event of step n comes when step n + 1 is done, the last two together
    after = {step: (parameters, state) for _, parameters, state, step in kept}
    steps = [event for event, *_ in kept if isinstance(event, Stepped)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.skipped for event in steps] == [True, False, False, True, False, False]
    assert [math.isnan(loss) for loss in run.training.losses] == [e.skipped for e in steps]
    assert same_bits(after[3][0], after[4][0]) and same_bits(after[3][1], after[4][1])
    assert not same_bits(after[4][0], after[5][0])
    assert all(torch.isfinite(parameter).all() for parameter in run.parameters())
    counts = {v.item() for n, v in run.optimizer_state().items() if n.endswith(".step")}
    assert counts == {4.0}  # of six, two were not taken


@fused_or_not
def test_a_first_step_that_is_not_finite_changes_nothing(fused: bool) -> None:
    run = poisoned_run({1}, steps=1)
    run = run if fused else unfuse(run)
    start = run.parameters()
    assert [event.skipped for event in run.finish()] == [True]
    assert same_bits(run.parameters(), start)


@pytest.mark.parametrize("longest", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_unfused_steps_are_the_fused_ones(longest: float, precision: str) -> None:
    """With skipped steps, clipped ones and a loss scale of 8192."""
    options = {"max_grad_norm": longest, "precision": precision, "weight_decay": 0.1}
    fused = poisoned_run({1, 5}, steps=12, options=options)
    other = unfuse(poisoned_run({1, 5}, steps=12, options=options))
    expected, found = fused.finish(), other.finish()
    assert [event.skipped for event in expected] == [step in (1, 5) for step in range(1, 13)]
    assert [event.skipped for event in found] == [event.skipped for event in expected]
    assert sum(event.grad_norm > 0.1 for event in expected) > 5
    assert other.training.loss_scale.scale == fused.training.loss_scale.scale
    state, expected_state = other.optimizer_state(), fused.optimizer_state()
    assert state.keys() == expected_state.keys()
    pairs = [(state[name], value) for name, value in expected_state.items()]
    pairs += zip(other.parameters(), fused.parameters(), strict=True)
    for value, exact in pairs:
        assert (value - exact).norm() <= 2e-6 * exact.norm()  # observed: up to 3e-7


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_devices_whose_kernel_skips_steps_use_it(device: str) -> None:
    training = Training(make_config(), make_adapters(make_model()), torch.device(device))
    assert isinstance(training.optimizer, UnfusedAdamW) == (device == "meta")
    assert training.optimizer.defaults.get("fused", False) == (device == "cpu")


def test_raises_after_twenty_bad_steps_in_a_row() -> None:
    run = poisoned_run(range(3, 99), steps=60)
    steps, after_two = [], []
    with pytest.raises(FloatingPointError) as error:
        for event in run.events():
            steps += [event] if isinstance(event, Stepped) else []
            after_two += [run.parameters()] if run.training.step == 2 else []
    assert [event.skipped for event in steps] == [False] * 2 + [True] * MAX_SKIPPED_IN_A_ROW
    assert same_bits(run.parameters(), after_two[0])
    text = str(error.value)
    assert "20 steps in a row, up to step 22" in text and "0.005" in text


def test_nineteen_bad_steps_in_a_row_are_borne() -> None:
    run = poisoned_run(set(range(1, 42)) - {20, 40}, steps=41)
    assert sum(event.skipped for event in run.finish()) == 39


# fp16


class Half(TinyDenoiser):
    """Predicts in float16, far off the target: the scaled gradient overflows at first."""

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        return super().predict(x_t, sigma, conditioning).half() + 20_000.0


def test_loss_scale_changes_no_bit() -> None:
    """It is a power of two: only an overflow could tell."""
    plain, scaled = make_run(make_config()), make_run(make_config(options={"precision": "fp16"}))
    assert scaled.training.loss_scale.scale == 8192 and plain.training.loss_scale.scale == 1
    assert [e.loss for e in plain.finish()] == [e.loss for e in scaled.finish()]
    assert same_bits(plain.parameters(), scaled.parameters())


def test_loss_scale_halves_on_overflow_and_recovers() -> None:
    options = {"precision": "fp16", "loss_weighting": "none"}
    run = make_run(make_config(steps=12, batch_size=3, options=options), denoiser=Half)
    skipped = [event.skipped for event in run.finish()]
    num = sum(skipped)
    assert 0 < num < 12 and skipped == [True] * num + [False] * (12 - num)
    assert run.training.loss_scale.scale == 8192 / 2**num
    assert run.training.loss_scale.good_steps == 12 - num


def test_loss_scale_doubles_after_enough_good_steps() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True)
    good, bad = torch.zeros(()), torch.ones(())
    for _ in range(LossScale.GROWTH_STEPS - 1):
        scale.update(good)
    assert scale.scale == 8192
    scale.update(bad)
    assert scale.scale == 4096
    for _ in range(LossScale.GROWTH_STEPS - 1):
        scale.update(good)
    assert scale.scale == 4096
    scale.update(good)
    assert scale.scale == 8192 and scale.good_steps == 0
    disabled = LossScale(torch.device("cpu"), enabled=False)
    disabled.update(bad)
    assert disabled.scale == 1


# learning rate


def rates(steps: int, **options: Any) -> list[float]:
    config = make_config(steps=steps, learning_rate=1.0, options=options)
    return [learning_rate_at(config, step) for step in range(steps)]


def test_warm_up_rises_in_equal_steps() -> None:
    found = rates(400, schedule="constant", warmup=0.05)
    assert found[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert found[20:] == [1.0] * 380


def test_warm_up_takes_ten_steps_at_least_and_half_of_them_at_most() -> None:
    assert rates(100, schedule="constant", warmup=0.01)[9:11] == [pytest.approx(10 / 11), 1.0]
    assert rates(6, schedule="constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(1, schedule="cosine") == [1.0]
    assert rates(8, schedule="constant", warmup=0.0) == [1.0] * 8


def test_cosine_and_linear_fall_to_their_end() -> None:
    # 21 steps without warm-up: quarter, half and end are steps 5, 10 and 20
    cosine = rates(21, schedule="cosine", warmup=0.0, final_learning_rate=0.1)
    linear = rates(21, schedule="linear", warmup=0.0, final_learning_rate=0.1)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert [cosine[i] for i in (0, 5, 10, 20)] == pytest.approx([1.0, quarter, 0.55, 0.1])
    assert [linear[i] for i in (0, 5, 10, 20)] == pytest.approx([1.0, 0.775, 0.55, 0.1])
    warmed = rates(40, schedule="cosine", warmup=0.05, final_learning_rate=0.0)
    assert (
        warmed[10] == 1.0
        and warmed[-1] == pytest.approx(0.0)
        and warmed[10:] == sorted(warmed[10:], reverse=True)
    )


def test_the_loop_uses_the_schedule() -> None:
    run = make_run(make_config(steps=12, options={"schedule": "linear"}))
    expected = [learning_rate_at(run.training.config, step) for step in range(12)]
    used: list[float] = []
    run.training.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    assert [event.learning_rate for event in run.finish()] == expected == used


# captions


def dropped_at(config: ResolvedConfig, num_batches: int) -> tuple[list[bool], list[Tensor]]:
    """Which captions are dropped, and the noisy latents beside them."""
    asked: list[bool] = []

    def conditioning(item: int, dropped: bool) -> Tensor:
        asked.append(dropped)
        return torch.zeros(1, WIDTH)

    examples = make_examples(config, conditioning=conditioning)
    denoiser = TinyDenoiser("eps", make_model())
    batches = [draw_batch(config, examples, denoiser, index) for index in range(num_batches)]
    return asked, [batch.x_t for batch in batches]


def test_caption_dropout_share() -> None:
    config = make_config(options={"caption_dropout": 0.3})
    asked, _ = dropped_at(config, 600)
    share = sum(asked) / len(asked)
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(asked))
    assert asked == dropped_at(config, 600)[0]
    other, _ = dropped_at(make_config(training_seed=1, options={"caption_dropout": 0.3}), 600)
    assert asked != other


def test_caption_dropout_leaves_the_noise_as_it_is() -> None:
    never, noisy = dropped_at(make_config(options={"caption_dropout": 0.0}), 20)
    always, same = dropped_at(make_config(options={"caption_dropout": 1.0}), 20)
    assert not any(never) and all(always)
    assert same_bits(noisy, same)


# randomness


@every_kind
def test_same_seed_same_bits(kind: str) -> None:
    runs = [make_run(make_config(kind, training_seed=seed), kind) for seed in (3, 3, 4)]
    torch.manual_seed(99)  # nothing may come from the global generator
    before = torch.get_rng_state()
    losses = [[event.loss for event in run.finish()] for run in runs]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert same_bits(runs[0].parameters(), runs[1].parameters())
    assert not same_bits(runs[0].parameters(), runs[2].parameters())


def test_batches_follow_from_their_index() -> None:
    run = make_run(make_config())
    late, early = batch_of(run, 7), batch_of(run, 2)
    assert torch.equal(batch_of(run, 7).x_t, late.x_t)
    assert not torch.equal(early.x_t[:1], late.x_t[:1])
    assert len({seed_of(0, p, i) for p in ("a", "b") for i in range(50)}) == 100
    assert all(0 <= seed_of(s, "a", 0) < 2**63 for s in range(100))


def test_every_image_is_seen_equally_often() -> None:
    config = make_config()
    plan = make_examples(config).plan
    seen = [item for index in range(10) for item in plan.batch(index)]  # 5 epochs of 2 + 1
    assert sorted(seen) == sorted(list(range(NUM_IMAGES)) * 5)


# events


def test_events_come_once_a_step_in_order() -> None:
    run = make_run(make_config(steps=4))
    started, *steps = run.events()
    num = sum(parameter.numel() for parameter in run.training.parameters)
    assert started == Started(step=0, total_steps=4, num_layers=5, num_parameters=num)
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert all(event.total_steps == 4 for event in steps)
    assert [event.loss for event in steps] == run.training.losses


def test_a_finished_run_takes_no_more_steps() -> None:
    run = make_run(make_config(steps=2))
    run.finish()
    after = run.parameters()
    assert run.finish() == [] and same_bits(run.parameters(), after)


@pytest.mark.parametrize(
    "event",
    [
        Started(step=0, total_steps=4, num_layers=5, num_parameters=6),
        Stepped(
            step=1,
            total_steps=4,
            loss=math.nan,
            grad_norm=math.inf,
            learning_rate=1e-4,
            skipped=True,
        ),
        Saved(step=1, path="state.safetensors"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_are_json_that_a_browser_can_read(event: Any) -> None:
    data = json.loads(json.dumps(event.to_json(), allow_nan=False))
    assert data["event"] == type(event).__name__.lower() and data["step"] == event.step
    if isinstance(event, Stepped):
        assert data["loss"] is None and data["grad_norm"] is None and data["skipped"] is True


def test_examples_are_what_the_denoiser_gets() -> None:
    """Items, captions and noise levels of a batch belong to one another."""
    config = make_config("flow", options={"caption_dropout": 0.0})
    examples: Examples = make_examples(config)
    denoiser = TinyDenoiser("flow", make_model())
    batch = draw_batch(config, examples, denoiser, 0)
    items = examples.plan.batch(0)
    assert batch.sigma.shape == (len(items),) and len(set(batch.sigma.tolist())) == len(items)
    for row, item in enumerate(items):
        assert torch.equal(batch.conditioning[row], examples.conditioning(item, False))
        s = batch.sigma[row]
        x0 = examples.latents[item][0]
        noise = batch.target[row] + x0  # flow: target = noise - x0
        torch.testing.assert_close(batch.x_t[row], (1 - s) * x0 + s * noise)
