"""What Train LoRA does, one phase a function: find the run, encode, train, write."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..lora_core.attach import attached
from ..lora_core.batches import BatchPlan
from ..lora_core.events import Saved
from ..lora_core.host import apply, encode, files, identity, trainee
from ..lora_core.host.denoiser import HostDenoiser, SizeConditioning
from ..lora_core.host.progress import NodeProgress
from ..lora_core.lora_file import LoraFile
from ..lora_core.lora_model import LoraModel
from ..lora_core.training import run as runs
from ..lora_core.training.examples import Examples
from ..lora_core.training.loop import Training
from ..lora_core.training.recompute import recomputed, repeated_blocks
from .training_adapters import begin_adapters, trained_layers
from .training_check import Job, Request, check, encoded_cache, model_facts
from .training_metadata import lora_metadata

PREPARED_SAMPLES = 1024  # conditionings kept ready, so that few datasets prepare one twice
OUT_OF_MEMORY = (
    "out of memory while training. Switch on gradient_checkpointing in Training Options: queueing "
    "again then goes on from the last step saved. Or lower the resolution, the batch size or the "
    "rank, which begins a new run."
)


@dataclass(frozen=True, kw_only=True)
class Result:
    lora: LoraModel
    losses: list[float]
    model: Any
    clip: Any
    path: Path
    steps: int
    summary: str

    def outputs(self) -> tuple[Any, ...]:
        """In the order of the node's outputs; skipped steps have no loss to plot."""
        loss_map = {"loss": [loss for loss in self.losses if loss == loss]}
        return (self.lora, loss_map, self.model, self.clip, str(self.path), self.steps)


def train(request: Request, progress: NodeProgress) -> Result:
    """Find the run that the request describes, and bring it to its end.

    Raises ValueError for input that does not fit, all problems at once and before any work, and
    whatever ends the training early, after the state and the LoRA so far are written.
    """
    job = check(request, progress.phase)
    models_used = [
        identity.model_identity(request.model),
        identity.clip_identity(request.clip),
        identity.vae_identity(request.vae),
    ]
    name = runs.run_id(
        job.config,
        f"{request.dataset.content_hash()} at {job.laid_out.resolutions_px}",
        "/".join(models_used),
        runs.start_hash(request.start_from),
    )
    folder = files.weave_folder() / "runs"
    start_over = request.config.resume == "start over"
    with runs.open_run(folder, name, steps=job.config.train.steps, start_over=start_over) as run:
        if start_over or not run.is_finished(job.config.train.steps):
            try:
                bring_to_end(job, run, progress)
            except Exception as error:
                if trainee.is_out_of_memory(error):
                    raise RuntimeError(OUT_OF_MEMORY) from error
                raise
        return finished(job, run)


def bring_to_end(job: Job, run: runs.Run, progress: NodeProgress) -> None:
    """Encode, train, and write the result; state and LoRA are kept however it ends."""
    options, request = job.config.options, job.request
    patcher = trainee.training_patcher(request.model, options.precision)
    clip = trainee.training_clip(request.clip) if options.text_encoder else None
    latents, conditionings = encoded(job, progress)
    with torch.inference_mode(False), ExitStack() as stack:
        live = stack.enter_context(trainee.trainee(patcher, clip))
        layers = trained_layers(patcher, clip)
        begin_adapters(job.adapters, job.new, layers.facts, options)
        stack.enter_context(attached(layers.modules, job.adapters, layers.facts))
        if options.gradient_checkpointing:
            blocks = repeated_blocks(patcher.model.diffusion_model)
            blocks += [] if clip is None else repeated_blocks(clip.patcher.model)
            stack.enter_context(recomputed(blocks))
        denoiser = HostDenoiser(patcher)
        training = Training(job.config, job.adapters, denoiser.device)
        if request.config.resume == "start over":
            run.forget()
        run.restore(training)
        run.begin(job.config)
        progress.text("\n".join([run.record.remark, *job.laid_out.problems]))
        caption_encoder = conditionings.__getitem__ if clip is None else live_encoder(clip, live)
        examples = make_examples(job, denoiser, latents, caption_encoder)
        run_steps(job, run, training, examples, denoiser, progress)


def run_steps(
    job: Job,
    run: runs.Run,
    training: Training,
    examples: Examples,
    denoiser: HostDenoiser,
    progress: NodeProgress,
) -> None:
    """The training itself. Whatever ends it, state and LoRA are written first."""
    status, message = "failed", ""
    try:
        for event in training.steps(examples, denoiser):
            run.add(event)
            progress.publish(event)
            if event.step % job.config.options.save_state_every == 0 and training.step:
                run.save(training)
        status = "finished"
    except progress.interrupted:
        status = "stopped"
        raise
    except Exception as error:
        message = str(error)
        raise
    finally:
        leave(job, run, training, status, message)


def leave(job: Job, run: runs.Run, training: Training, status: str, message: str) -> None:
    """Write state and LoRA, then how the run ended: one that could not be written has not ended.

    Raises OSError where that fails, also in place of the user's interrupt: steps are lost then.
    """
    try:
        try:
            run.save(training)
            for event in training.take_untold():
                run.add(event)
        finally:  # the LoRA may find room where the state, three times its size, has found none
            if training.step:
                write_output(job, run, training)
    except OSError as error:
        ways = {"stopped": "was interrupted", "finished": "came to its end"}
        how = ways.get(status, f"failed ({message})")
        said = (
            f"the training {how} at step {training.step}, but not all could be written: {error}. "
            "What was written before is still there. Queueing the same graph again goes on from "
            f"step {run.record.step}."
        )
        with suppress(OSError):  # the same disk may have no room for that either
            run.end("failed", said)
        raise OSError(said) from error
    run.end(status, message)


def encoded(job: Job, progress: NodeProgress) -> tuple[list[Any], dict[str, list[Any]]]:
    """Latents of every image and conditioning of every caption, from the cache or made now.

    No conditioning where the text encoder is trained: it changes at every step.
    """
    dataset, cache = job.request.dataset, encoded_cache()
    latents = encode.encode_images(job.request.vae, dataset, job.laid_out, cache, progress.phase)
    conditionings: dict[str, list[Any]] = {}
    if not job.config.options.text_encoder:
        captions = [item.caption for item in dataset.items] + [""]
        conditionings = encode.encode_captions(job.request.clip, captions, cache, progress.phase)
    cache.trim()
    return latents, conditionings


def live_encoder(clip: Any, live: trainee.Trainee) -> Callable[[str], list[Any]]:
    """Captions by the text encoder under training; the host may unload the model on the way."""

    def conditioning(caption: str) -> list[Any]:
        result = encode.encode_caption(clip, caption)
        live.refresh()
        return result

    return conditioning


def make_examples(
    job: Job,
    denoiser: HostDenoiser,
    latents: list[Any],
    encode_one: Callable[[str], list[Any]],
) -> Examples:
    """What the loop draws its batches from; `encode_one` gives a caption's CONDITIONING."""
    dataset, config = job.request.dataset, job.config
    model_latents = [denoiser.latent_in(latent) for latent in latents]

    def prepared(sample: int, dropped: bool) -> Any:
        where = job.laid_out.placements[sample]
        size = SizeConditioning(where.original_px, where.crop_xy, where.bucket_px)
        caption = "" if dropped else dataset.items[job.laid_out.item_of[sample]].caption
        return denoiser.prepare(
            encode_one(caption), model_latents[sample], size, config.options.guidance
        )

    batches = BatchPlan(
        job.laid_out.bucket_of,
        job.laid_out.repeats,
        config.train.batch_size,
        config.train.training_seed,
    )
    if not config.options.text_encoder:
        prepared = lru_cache(PREPARED_SAMPLES)(prepared)
    return Examples(batches, model_latents, prepared)


def write_output(job: Job, run: runs.Run, training: Training) -> None:
    """Write the run's own copy of the LoRA, and the LoRA under its name."""
    metadata = lora_metadata(
        job.config, job.request, job.laid_out, model_facts(job.request.model), training, run.record
    )
    lora = LoraFile(training.adapters, metadata)
    lora.save(run.result_path, job.keymap)
    path = write_named(lora, job, run)
    run.add(Saved(step=training.step, path=str(path)))


def write_named(lora: LoraFile, job: Job, run: runs.Run) -> Path:
    """Write the LoRA under the name that was asked for, or the next free one."""
    path = runs.free_output_path(run, job.output)
    names = {"ss_output_name": path.stem, "modelspec.title": path.stem}
    lora.save(path, job.keymap, metadata=names)
    run.keep_output(path, job.output)
    return path


def finished(job: Job, run: runs.Run) -> Result:
    """The result of a finished run; written again if its file was deleted or has a new name."""
    lora = LoraFile.read(run.result_path, job.keymap)
    path = Path(run.record.output)
    if not (path.exists() and run.owns(path) and run.record.wanted == str(job.output)):
        path = write_named(lora, job, run)
    entry = apply.Entry(lora.adapters, 1.0, 1.0)
    model, clip = apply.apply(job.request.model, job.request.clip, [entry])
    losses = run.losses()
    skipped = sum(map(math.isnan, losses))
    remarks = [f"{path.name}: {run.record.step} steps.", run.record.remark]
    if skipped:
        remarks.append(f"{skipped} steps were skipped: their loss was not a number.")
    return Result(
        lora=LoraModel.from_file(lora, job.keymap, provenance=path.name),
        losses=losses,
        model=model,
        clip=clip,
        path=path,
        steps=run.record.step,
        summary="\n".join([" ".join(remarks), *job.laid_out.problems]),
    )
