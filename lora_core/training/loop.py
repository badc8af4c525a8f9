"""The training loop. It reads top to bottom and knows no host, no disk and no browser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.dora import Decomposable
from ..events import Event, Started, Stepped
from .config import ResolvedConfig
from .dropout import dropout
from .examples import Examples, draw_batch
from .objective import Denoiser, weighted_loss
from .optimizers import FUSED_DEVICES, LossScale, learning_rate_at, make_optimizer
from .protection import Gradients

MAX_SKIPPED_IN_A_ROW = 20
TEXT_ENCODER_PREFIX = "text_encoders."


class Training:
    """The state of a run: adapters, optimizer and step. `steps()` takes it further.

    `step` counts optimizer steps that are done; the position in the data and all random numbers
    follow from it. `losses` holds the loss of each step done, NaN for a skipped one.
    """

    def __init__(
        self, config: ResolvedConfig, adapters: Mapping[str, Adapter], device: torch.device
    ) -> None:
        self.config = config
        self.adapters = dict(adapters)
        self.parameters = list(nn.ModuleList(adapters.values()).to(device).parameters())
        fused = device.type in FUSED_DEVICES
        self.optimizer = make_optimizer(config, self._groups(), fused=fused)
        self.loss_scale = LossScale(device, enabled=config.options.precision == "fp16")
        self.step = 0
        self.losses: list[float] = []
        self._unread: _StepNumbers | None = None
        self._untold: list[Stepped] = []

    def steps(self, examples: Examples, denoiser: Denoiser) -> Iterator[Event]:
        """Train from `step` to the config's last; yields Started, then a Stepped for each step.

        The caller has attached the adapters and owns the grad mode. The numbers of step n are
        read from the device while step n+1 is under way, so that no step waits for the host. A
        step whose loss or gradient is not finite is skipped on the device. Raises
        FloatingPointError after 20 of those in a row.
        """
        yield Started(
            step=self.step,
            total_steps=self.config.train.steps,
            num_layers=len(self.adapters),
            num_parameters=sum(parameter.numel() for parameter in self.parameters),
        )
        gradients = Gradients()
        while self.step < self.config.train.steps:
            learning_rate = learning_rate_at(self.config, self.step)
            loss = gradients.compute(lambda: self._accumulate(examples, denoiser), self._forget)
            norm, bad = self._update(loss, learning_rate)
            self.step += 1
            self.read()
            self._unread = _StepNumbers(self.step, learning_rate, _to_host(loss, norm, bad))
            yield from self._told()
        self.read()
        yield from self._told()

    def read(self) -> None:
        """Bring in the numbers of the last step, if they are still out; waits for the device.

        `steps` yields them, also when another caller (a save) has read them first.
        """
        if self._unread is None:
            return
        numbers, self._unread = self._unread, None
        loss, norm, bad = numbers.values()
        self.losses.append(math.nan if bad else loss)
        self._untold.append(
            Stepped(
                step=numbers.step,
                total_steps=self.config.train.steps,
                loss=loss,
                grad_norm=norm,
                learning_rate=numbers.learning_rate,
                skipped=bool(bad),
            )
        )

    def take_untold(self) -> list[Stepped]:
        """The events that were read and not yielded: a run that was interrupted has one."""
        untold, self._untold = self._untold, []
        return untold

    def _told(self) -> Iterator[Stepped]:
        """The events that were read and not yielded yet. Raises after too many bad steps."""
        while self._untold:
            yield self._untold.pop(0)
            self._stop_if_broken()

    def _stop_if_broken(self) -> None:
        latest = self.losses[-MAX_SKIPPED_IN_A_ROW:]
        if len(latest) == MAX_SKIPPED_IN_A_ROW and all(map(math.isnan, latest)):
            raise FloatingPointError(
                f"the loss was not a number for {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step "
                f"{len(self.losses)}. Those steps were skipped and changed nothing. Try precision "
                f"bf16 or fp32, or a learning rate below {self.config.train.learning_rate:g}."
            )

    def _groups(self) -> dict[float, list[nn.Parameter]]:
        """Parameters by their share of the learning rate: the text encoder has its own, and so
        has the factor that starts at zero (LoRA+, https://arxiv.org/abs/2402.12354)."""
        rate = self.config.options.text_encoder_learning_rate / self.config.train.learning_rate
        groups: dict[float, list[nn.Parameter]] = {}
        for path, adapter in self.adapters.items():
            scale = rate if path.startswith(TEXT_ENCODER_PREFIX) else 1.0
            last = {id(factor) for factor in adapter.last_factors()}
            for parameter in adapter.parameters():
                times = self.config.options.lora_plus_ratio if id(parameter) in last else 1.0
                groups.setdefault(scale * times, []).append(parameter)
        return groups

    def _accumulate(self, examples: Examples, denoiser: Denoiser) -> Tensor:
        """Forward and backward of one step's batches; the step's mean loss, on the device."""
        num_batches = self.config.options.accumulation_steps
        total = torch.zeros((), device=denoiser.device)
        for part in range(num_batches):
            index = self.step * num_batches + part
            batch = draw_batch(self.config, examples, denoiser, index)
            with dropout(self.config, self.adapters, index):
                prediction = denoiser.predict(batch.x_t, batch.sigma, batch.conditioning)
                loss = weighted_loss(prediction, batch.target, batch.weight) / num_batches
                (loss * self.loss_scale.scale).backward()
            total += loss.detach()
        return total

    def _update(self, loss: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip and apply the gradients; (their norm, 1 if the step was skipped), on the device."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not grads:
            raise RuntimeError("no adapter received a gradient: the model does not use its layers")
        scale = self.loss_scale.scale
        norm = torch.nn.utils.get_total_norm(grads) / scale
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        longest = self.config.options.max_grad_norm
        if longest > 0:
            scale = scale * ((norm + 1e-6) / longest).clamp(min=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self._forget()
        self._limit_norms()
        self.loss_scale.update(bad)
        return norm, bad

    def _limit_norms(self) -> None:
        if self.config.options.max_norm > 0:
            for adapter in self.adapters.values():
                for one in adapter.members():
                    if isinstance(one, Decomposable):
                        one.limit_norm(self.config.options.max_norm)

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _StepNumbers:
    """A step's loss, gradient norm and skip flag on their way to the host."""

    step: int
    learning_rate: float
    on_host: tuple[Tensor, torch.cuda.Event | None]

    def values(self) -> list[float]:
        numbers, arrived = self.on_host
        if arrived is not None:
            arrived.synchronize()
        return numbers.tolist()


def _to_host(*numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying scalars to the host; on CUDA into pinned memory, behind an event."""
    stacked = torch.stack(numbers)
    if stacked.device.type != "cuda":
        return stacked, None
    pinned = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
    pinned.copy_(stacked, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return pinned, arrived
