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
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from dae.cards import prior_card
from dae.cli import main
from dae.config import Config
from dae.data import TrainLoader, load_data
from dae.data.cache import EncodingCache, Fingerprint, transform_fingerprint
from dae.distributed import failing_together, run_on_first_process
from dae.files import write_file
from dae.hub import CARD, PretrainedModel, fingerprint, load_weights, require_model
from dae.lock import writes
from dae.models import Autoencoder, choose_kernels
from dae.training import EMA, Run, TrainingState, build_optimizer, build_scheduler, make_accelerator
from dae.training.initialization import load_prior
from dae.training.loop import global_mean, progress_bar, refuse_non_finite, seed_for, synchronize_gradients
from dae.training.pictures import sample_sheet
from dae.training.priors import FAMILIES, Family, fit_mixture, prior_family


@writes("prior")
def train(config: Config) -> Path:
    """Train, save, and return the folder of the trained prior."""
    family = FAMILIES[prior_family(config)]
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

    def card() -> str:
        return prior_card(config, type(prior), data.describe(), run.history())

    if family.loss is None:
        fit(config, family, prior, cache, accelerator, run, card)
    else:
        train_by_steps(config, family, prior, cache, accelerator, run, card)
    accelerator.print(f"saved {run.folder}")
    if config.push_to_hub:
        accelerator.print(run_on_first_process(lambda: prior.push_to_hub(f"{config.hub_model_id}-prior", folder=run.folder)))
    accelerator.end_training()
    return run.folder


def train_by_steps(
    config: Config,
    family: Family,
    prior: PretrainedModel,
    cache: EncodingCache,
    accelerator: Accelerator,
    run: Run,
    card: Callable[[], str],
) -> None:
    settings, device = config.prior, accelerator.device
    prior.gradient_checkpointing = settings.gradient_checkpointing
    loader = TrainLoader(cache.train, settings.train_batch_size, seed=seed_for(config.seed, "prior", "order"))
    resumed = run.open(accelerator, dataclasses.asdict(cache.fingerprint))

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

    def save_if_best() -> None:
        if not settings.early_stopping or is_best(run, family.criterion):
            prior.save_pretrained(run.folder, card=card())

    def final_bits() -> float:
        return family.final_bits(type(prior).from_pretrained(run.folder, device=device), cache.validation, config)

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
                    values = {family.criterion: family.score(prior, cache.validation, config)}
                run.record(accelerator, done, values, stage="prior", split="validation")
                with failing_together():
                    if autoencoder is not None:
                        run.record_picture(accelerator, done, "samples", sample_sheet(autoencoder, prior, config))
                if settings.early_stopping or last:
                    run_on_first_process(save_if_best)
        if last and family.final_bits is not None:
            values = {"bits_per_image": run_on_first_process(final_bits)}
            run.record(accelerator, done, values, stage="prior", split="delivered")
            run_on_first_process(lambda: write_file(run.folder / CARD, card().encode()))  # with the bits
        if done % config.checkpointing_steps == 0 or last:
            run.save(done, *parts.pack(), stage="prior", stage_step=done)
    bar.close()


def is_best(run: Run, criterion: str) -> bool:
    """Whether the latest validation is better than every one before it."""
    *before, latest = [row[criterion] for row in run.history() if row["split"] == "validation"]
    return latest < min(before, default=math.inf)


def fit(
    config: Config,
    family: Family,
    prior: PretrainedModel,
    cache: EncodingCache,
    accelerator: Accelerator,
    run: Run,
    card: Callable[[], str],
) -> None:
    """A prior without steps: one fit, one entry of the log for each split, one checkpoint; resuming finds it done."""

    def fitted_scores() -> dict[str, float]:
        fit_mixture(prior, cache, config)
        parts = {"train": cache.train, "validation": cache.validation}
        return {split: family.score(prior, encoded, config) for split, encoded in parts.items()}

    resumed = run.open(accelerator, dataclasses.asdict(cache.fingerprint))
    if resumed is not None:
        load_weights(prior, resumed.tensors["model"], str(resumed.path))
    else:
        scores = run_on_first_process(fitted_scores)
        for split, score in scores.items():
            run.record(accelerator, 1, {family.criterion: score}, stage="prior", split=split)
        run.save(1, {"model": prior.state_dict()}, {}, stage="prior", stage_step=1)
    run_on_first_process(lambda: prior.save_pretrained(run.folder, card=card()))


if __name__ == "__main__":
    main(train, __doc__)
