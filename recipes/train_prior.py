"""Train the prior on what recipes/encode.py cached: an autoregressive Transformer over tokens, or over a continuous latent a
Diffusion Transformer or a Gaussian mixture (`prior.family`).

    accelerate launch recipes/train_prior.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train_prior.py --config recipes/configs/digits-kl.yaml
    torchrun --standalone --nproc_per_node 2 recipes/train_prior.py prior.train_batch_size=32

Runs on a CPU as it stands; on GPUs add `--mixed_precision bf16` to `accelerate launch`. Held-out bits a token (Diffusion
Transformer: the flow-matching loss) are measured every `validation_steps`; with `prior.early_stopping` the weights with the
fewest are delivered. Bits an image of a continuous latent are measured once, at the end. A mixture is fitted at once, by one
process.
Writes <output_dir>/prior: model.safetensors and config.json, checkpoint-*/, logs/.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from dae.cards import prior_card
from dae.cli import main
from dae.config import Config
from dae.data import TrainLoader, load_data, summarize
from dae.data.cache import EncodingCache, Fingerprint, transform_fingerprint
from dae.distributed import failing_together, run_on_first_process
from dae.files import announce
from dae.hub import PretrainedModel, fingerprint, load_weights, prepare_repository, require_model
from dae.lock import writes
from dae.models import Autoencoder, choose_kernels
from dae.training import EMA, Run, TrainingState, build_optimizer, build_scheduler, make_accelerator
from dae.training.initialization import load_prior
from dae.training.loop import global_mean, progress_bar, refuse_non_finite, seed_for, synchronize_gradients, validation_images
from dae.training.pictures import sample_sheet
from dae.training.priors import FAMILIES, Family, fit_mixture, prior_family, require_guidance
from dae.training.rehearsal import sampled_classes


@writes("prior")
def train(config: Config) -> Path:
    """Train, save, and return the folder of the trained prior."""
    family = FAMILIES[prior_family(config)]
    require_guidance(config)
    run = Run(config, "prior", without_influence=("method", "autoencoder.", "auxiliary_decoder.", "stage1.", "stage2."))
    accelerator = make_accelerator(config, run.folder / "logs")
    settings, output = config.prior, Path(config.output_dir)
    with failing_together():
        data = load_data(config.data, config.seed)
        tokenizer = fingerprint(require_model(output / "autoencoder", "train_dae"))
        expected = Fingerprint(tokenizer, data.fingerprint, transform_fingerprint(config))
        cache = family.cache.load(output / family.cache.folder, expected)
        torch.manual_seed(seed_for(config.seed, "prior"))
        prior = family.build(settings, cache).to(accelerator.device)
        if settings.init_from:
            load_prior(prior, settings.init_from)
        choose_kernels(prior, config.kernels)
        classes = sampled_classes(config, data.class_names, data.labels)
        summary = summarize(data) if accelerator.is_main_process else None
        description = data.describe() | {"table": summary and summary.table()}

    repository = f"{config.hub_model_id}-prior"
    if config.push_to_hub:
        run_on_first_process(lambda: prepare_repository(repository))

    def card(step: int) -> str:
        """With what was measured of the weights of this step."""
        rows = [row for row in run.history() if row["step"] <= step or row["split"] == "delivered"]
        return prior_card(config, type(prior), data.describe(), rows, summary.lines())

    if family.loss is None:
        fit(config, family, prior, cache, accelerator, run, description, card)
    else:
        train_by_steps(config, family, prior, cache, accelerator, run, description, card, classes)
    run_on_first_process(lambda: announce(run.folder, run.outputs()))
    if config.push_to_hub:
        accelerator.print(run_on_first_process(lambda: prior.push_to_hub(repository, folder=run.folder)))
    accelerator.end_training()
    return run.folder


def train_by_steps(
    config: Config,
    family: Family,
    prior: PretrainedModel,
    cache: EncodingCache,
    accelerator: Accelerator,
    run: Run,
    data: dict,
    card: Callable[[int], str],
    classes: list[int],
) -> None:
    settings, device = config.prior, accelerator.device
    prior.gradient_checkpointing = settings.gradient_checkpointing
    loader = TrainLoader(cache.train, settings.train_batch_size, seed=seed_for(config.seed, "prior", "order"))
    resumed = run.open(accelerator, dataclasses.asdict(cache.fingerprint), data=data)

    ema = EMA(prior, settings.ema_decay) if settings.use_ema else None
    optimizer = build_optimizer(prior, settings)
    scheduler = build_scheduler(optimizer, settings)
    model, optimizer = accelerator.prepare(torch.compile(prior) if config.compile else prior, optimizer)
    parts = TrainingState({"model": prior}, {"optimizer": optimizer}, scheduler, loader, ema, accelerator.scaler)
    start = parts.restore(resumed)
    autoencoder = None
    with failing_together():
        if run.shows_images():
            autoencoder = Autoencoder.from_pretrained(run.folder.parent / "autoencoder", device=device)
            choose_kernels(autoencoder, config.kernels)
    # The best weights so far are in every checkpoint: whatever becomes of the file, resuming can deliver them.
    best, best_tensors = (resumed.state.get("best"), resumed.tensors.get("best")) if resumed else (None, None)

    heldout = cache.validation.spread(validation_images(config, settings))

    def save_best() -> None:
        prior.save_pretrained(run.folder, card=card(best["step"]))

    batches = iter(loader)
    accumulation = settings.gradient_accumulation_steps
    bar = progress_bar(settings.max_train_steps, start, "prior")
    for step in range(start, settings.max_train_steps):
        prior.train()
        for micro in range(accumulation):
            torch.manual_seed(seed_for(config.seed, "prior", step, micro))  # the only source of this micro-step's randomness
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
            with synchronize_gradients(accelerator, model, when=micro == accumulation - 1):
                loss = family.loss(model, prior, batch)
                accelerator.backward(loss / accumulation)
            parts.losses.append(loss.detach())

        if settings.max_grad_norm > 0:
            accelerator.clip_grad_norm_(prior.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if ema:
            ema.update(prior)

        done, last = step + 1, step + 1 == settings.max_train_steps
        bar.update()
        if done % config.logging_steps == 0 or last:
            values = {"loss": global_mean(parts.losses), "lr": scheduler.get_last_lr()[0]}
            parts.losses.clear()
            refuse_non_finite(values["loss"], "prior", done)
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            run.record(accelerator, done, values, stage="prior", split="train")
        if done % config.validation_steps == 0 or last:
            with ema.swapped_in(prior) if ema else contextlib.nullcontext():
                with failing_together():
                    score = family.score(prior, heldout, config)
                run.record(accelerator, done, {family.criterion: score}, stage="prior", split="validation")
                with failing_together():
                    if autoencoder is not None:
                        run.record_picture(accelerator, done, "samples", sample_sheet(autoencoder, prior, config, classes))
                if best is None or score < best["score"] or not settings.early_stopping:
                    best = {"step": done, "score": score}
                    best_tensors = {name: weight.detach().cpu().clone() for name, weight in prior.state_dict().items()}
                    if settings.early_stopping:
                        run_on_first_process(save_best)
        if done % config.checkpointing_steps == 0 or last:
            tensors, state = parts.pack()
            if best is not None:
                tensors, state = tensors | {"best": best_tensors}, state | {"best": best}
            run.save(done, tensors, state, stage="prior", stage_step=done)
    bar.close()
    if best is None:  # of a checkpoint that an earlier version wrote
        best, best_tensors = {"step": start}, ema.state_dict() if ema else prior.state_dict()
    prior.load_state_dict(best_tensors)

    def deliver() -> None:
        logged, last = {(row["split"], row["step"]) for row in run.history()}, settings.max_train_steps
        if "score" in best and ("validation", best["step"]) not in logged:  # the log was lost
            run.record(accelerator, best["step"], {family.criterion: best["score"]}, stage="prior", split="validation")
        if family.final_bits is not None and ("delivered", last) not in logged:
            values = {"bits_per_image": family.final_bits(prior, cache.validation, config)}
            run.record(accelerator, last, values, stage="prior", split="delivered")
        prior.save_pretrained(run.folder, card=card(best["step"]))

    run_on_first_process(deliver)


def fit(
    config: Config,
    family: Family,
    prior: PretrainedModel,
    cache: EncodingCache,
    accelerator: Accelerator,
    run: Run,
    data: dict,
    card: Callable[[int], str],
) -> None:
    """A prior without steps: one fit, one entry of the log for each split, one checkpoint; resuming finds it done."""
    resumed = run.open(accelerator, dataclasses.asdict(cache.fingerprint), data=data)
    if resumed is not None:
        load_weights(prior, resumed.tensors["model"], str(resumed.path))

    def log_fit() -> None:
        if resumed is None:
            fit_mixture(prior, cache, config)
        if not run.history():
            for split, encoded in (("train", cache.train), ("validation", cache.validation)):
                values = {family.criterion: family.score(prior, encoded, config)}
                run.record(accelerator, 1, values, stage="prior", split=split)

    run_on_first_process(log_fit)
    if resumed is None:
        run.save(1, {"model": prior.state_dict()}, {}, stage="prior", stage_step=1)
    run_on_first_process(lambda: prior.save_pretrained(run.folder, card=card(1)))


if __name__ == "__main__":
    main(train, __doc__)
