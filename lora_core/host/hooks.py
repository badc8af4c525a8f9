"""A stack as the host's hooks: LoRAs on parts of the conditioning and of the sampling range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from comfy.hooks import EnumWeightTarget, HookGroup, HookKeyframe, HookKeyframeGroup, WeightHook

from ..key_map import MODEL, MODULATION, TEXT_ENCODER
from ..schedule import Schedule, keyframes
from ..stack import StackEntry
from .apply import stacked_patches
from .models import CLIP_PREFIX, UNET_PREFIX, shared_key_map


def stack_hooks(
    stack: Sequence[StackEntry], schedule: Schedule | None, before: HookGroup | None
) -> HookGroup:
    """One WeightHook for each entry, in the stack's order, after those of `before`.

    An entry's own schedule is multiplied by `schedule`; together they become keyframes, one for
    each fiftieth of the sampling range.
    """
    group = HookGroup() if before is None else before.clone()
    for entry in stack:
        hook = StackHook(entry)
        both = [one for one in (entry.schedule, schedule) if one is not None]
        if both:
            hook.hook_keyframe = keyframe_group(*both)
        group.add(hook)
    return group


def keyframe_group(*schedules: Schedule) -> HookKeyframeGroup:
    """The host's keyframes; the first one counts for one step at least, as core's nodes do it."""
    group = HookKeyframeGroup()
    for number, (start, factor) in enumerate(keyframes(schedules)):
        steps = 1 if number == 0 else 0
        group.add(HookKeyframe(strength=factor, start_percent=start, guarantee_steps=steps))
    return group


class StackHook(WeightHook):
    """The host's hook with our adapters: the host would read the file by its own key map.

    The file is read when the sampler brings the model, whose layers are known then.
    """

    def __init__(self, entry: StackEntry | None = None) -> None:
        super().__init__(*((1.0, 1.0) if entry is None else (entry.model, entry.clip)))
        self.entry = entry

    def clone(self) -> StackHook:
        other: StackHook = super().clone()
        other.entry = self.entry
        return other

    def add_hook_patches(
        self, model: Any, model_options: Any, target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Called by the host for the patcher of a MODEL or a CLIP.

        Raises ValueError for a file that does not fit, or a model that hooks can't patch.
        """
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        assert self.entry is not None, "a hook is made with its entry"
        is_clip = target_dict.get("target") == EnumWeightTarget.Clip
        patches = {}
        if (TEXT_ENCODER if is_clip else MODEL) in self.entry.parts:
            given = (None, _Clip(model)) if is_clip else (model, None)
            read = self.entry.read(shared_key_map(*given)).at(1.0, 1.0)
            patches = stacked_patches([read], CLIP_PREFIX if is_clip else UNET_PREFIX)
            if any(key.endswith(MODULATION) for key in patches):
                raise ValueError(
                    f"{self.entry.label}: hooks can't change the modulations that it changes; "
                    "apply it by LoRA Stack"
                )
            refuse_unpatchable(model, patches, self.entry.label)
        strength = self._strength_clip if is_clip else self._strength_model
        model.add_hook_patches(hook=self, patches=patches, strength_patch=strength)
        registered.add(self)
        return True


@dataclass(frozen=True)
class _Clip:
    """What the key map needs of a CLIP, of which the host gives hooks the patcher alone."""

    patcher: Any

    @property
    def cond_stage_model(self) -> Any:
        return self.patcher.model


def refuse_unpatchable(patcher: Any, keys: Iterable[str], label: str) -> None:
    """Raises ValueError for models whose weights, `keys`, the host's hooks can't change in place.

    Those in scaled fp8 are right once only: the weight that the host keeps for the next time has
    the scale in it, and is put back as one without (comfy/model_patcher.py
    `patch_cached_hook_weights`).
    """
    is_dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    owners = [patcher.model.get_submodule(key.rpartition(".")[0]) for key in keys]
    quantised = any(getattr(one, "scale_weight", None) is not None for one in owners) or any(
        hasattr(weight, "_qdata") or type(weight).__name__ == "GGMLTensor"
        for weight in patcher.model.parameters()
    )
    if is_dynamic or quantised:
        kind = "quantised" if quantised else "loaded under dynamic VRAM"
        raise ValueError(
            f"{label}: hooks can't change the weights of a model that is {kind}; "
            "give the row its schedule in LoRA Stack and use its mode live"
        )
