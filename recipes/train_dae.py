"""Train an autoencoder: the Decoupled Autoencoder in two stages, or one of its one-stage baselines.

    accelerate launch recipes/train_dae.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train_dae.py --config recipes/configs/digits.yaml method=joint output_dir=runs/joint
    torchrun --standalone --nproc_per_node 2 recipes/train_dae.py stage1.train_batch_size=32 stage2.train_batch_size=32

Stage 1 trains encoder, bottleneck and a weak auxiliary decoder; then encoder and bottleneck are frozen for good, and stage 2
trains the real decoder. Runs on a CPU as it stands; on GPUs add `--mixed_precision bf16` to `accelerate launch`.
Writes <output_dir>/autoencoder: model.safetensors and config.json, stage1/ (the model at the switch), checkpoint-*/, logs/.
"""

from __future__ import annotations

import contextlib
import dataclasses
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator

from dae.cards import autoencoder_card
from dae.cli import main
from dae.config import Config
from dae.data import ImageData, TrainLoader, augment, evaluation_batches, load_data, summarize
from dae.distributed import failing_together, rank, run_on_first_process, sum_over_processes, world_size
from dae.files import announce
from dae.hub import prepare_repository
from dae.lock import writes
from dae.losses import PerceptualLoss, adaptive_weight, discriminator_loss, generator_loss, reconstruction_loss
from dae.metrics import CodebookUsage, psnr
from dae.models import Autoencoder, PatchDiscriminator, choose_kernels
from dae.models.autoencoder import Reconstruction
from dae.quantizers import VectorQuantizer
from dae.training import (
    EMA,
    Checkpoint,
    Run,
    Stage,
    TrainingState,
    build_optimizer,
    build_scheduler,
    make_accelerator,
    plan_stages,
)
from dae.training.initialization import load_decoder, load_latent
from dae.training.loop import global_mean, progress_bar, refuse_non_finite, seed_for, synchronize_gradients, validation_images
from dae.training.pictures import reconstruction_sheet
from dae.training.priors import require_guidance
from dae.training.rehearsal import rehearse_prior, rehearse_stage, require_batches, require_measurable, sampled_classes


@writes("autoencoder", makes_folder=True)
def train(config: Config) -> Path:
    """Train, save, and return the folder of the trained autoencoder."""
    require_guidance(config)
    run = Run(config, "autoencoder", without_influence=("prior.",))
    accelerator = make_accelerator(config, run.folder / "logs")
    stages = plan_stages(config)
    if accelerator.mixed_precision == "fp16" and any(stage.config.loss.adversarial > 0 for stage in stages):
        raise ValueError("an adversarial loss needs mixed_precision=bf16 or no: one loss scale cannot serve two optimisers")
    with failing_together():
        data = load_data(config.data, config.seed)
        for stage in stages:  # a mistake in any stage shows before the first one is trained
            make_loader(config, stage, data, "check")
            trial = build_autoencoder(config, stage).to(accelerator.device)
            rehearse_stage(config, stage, trial, build_perceptual_loss(config, stage), accelerator.autocast)
        rows = data.describe()
        require_batches(config, rows["train"], accelerator.num_processes)
        sampled_classes(config, data.class_names, data.labels)
        rehearse_prior(config, trial, data.num_classes, rows["train"], accelerator.autocast)
        require_measurable(config, training_images=rows["train"], held_out_images=rows["validation"])
        del trial
        summary = summarize(data) if accelerator.is_main_process else None
    if config.push_to_hub:
        run_on_first_process(lambda: prepare_repository(config.hub_model_id, f"{config.hub_model_id}-prior"))
    resumed = run.open(accelerator, {"data set": data.fingerprint}, stages, rows | {"table": summary and summary.table()})
    data.list_skipped(config.output_dir)
    if summary:
        print("\n".join(summary.lines()))

    autoencoder = build_autoencoder(config, stages[0]).to(accelerator.device)
    steps_before = 0
    for stage in stages:
        if stage is not stages[0] and not stage.keeps_decoder:
            torch.manual_seed(seed_for(config.seed, stage.name, "decoder"))
            autoencoder.replace_decoder(stage.decoder)
            if config.init_from:
                load_decoder(autoencoder, config.init_from)
        if stage.latent_frozen:
            autoencoder.freeze_latent()
        if resumed is None or resumed.state["stage"] == stage.name:
            train_stage(config, stage, autoencoder, data, accelerator, run, steps_before, resumed)
            resumed = None
            if stage is not stages[-1]:
                run_on_first_process(lambda folder=run.folder / stage.name: autoencoder.save_pretrained(folder))
        steps_before += stage.config.max_train_steps

    def save() -> None:
        autoencoder.save_pretrained(run.folder, card=autoencoder_card(config, data.describe(), run.history(), summary.lines()))
        announce(run.folder, run.outputs(*(stage.name for stage in stages[:-1])), data.skipped_note())
        if config.push_to_hub:
            print(autoencoder.push_to_hub(config.hub_model_id, folder=run.folder))

    run_on_first_process(save)
    accelerator.end_training()
    return run.folder


def build_autoencoder(config: Config, stage: Stage) -> Autoencoder:
    torch.manual_seed(seed_for(config.seed, "autoencoder"))
    architecture = dataclasses.replace(config.autoencoder, decoder=stage.decoder)
    autoencoder = Autoencoder(architecture, config.data.channels, config.data.resolution)
    if config.init_from:
        load_latent(autoencoder, config.init_from)
        load_decoder(autoencoder, config.init_from)
    return autoencoder


def build_perceptual_loss(config: Config, stage: Stage) -> PerceptualLoss | None:
    if stage.config.loss.perceptual == 0:
        return None
    if (got := config.data.resolution) < (least := PerceptualLoss.least_size):
        raise ValueError(f"{stage.name}.loss.perceptual needs data.resolution of at least {least}, got {got}")
    return PerceptualLoss.from_pretrained(stage.config.loss.perceptual_weights)


def train_stage(
    config: Config,
    stage: Stage,
    autoencoder: Autoencoder,
    data: ImageData,
    accelerator: Accelerator,
    run: Run,
    steps_before: int,
    resumed: Checkpoint | None,
) -> None:
    settings, loss_config, device = stage.config, stage.config.loss, accelerator.device
    accumulation = settings.gradient_accumulation_steps
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    choose_kernels(autoencoder.to(memory_format=layout), config.kernels)
    learns_codebook = isinstance(autoencoder.bottleneck, VectorQuantizer) and not stage.latent_frozen
    loader = make_loader(config, stage, data, "order")
    if learns_codebook and not resumed and not config.init_from:
        initialize_codebook(config, stage, autoencoder, data, device)

    # What is trained: everything, or the decoder alone on latents that the frozen encoder computes without gradient.
    trained = autoencoder.decoder if stage.latent_frozen else autoencoder
    autoencoder.enable_gradient_checkpointing(settings.gradient_checkpointing)
    ema = EMA(trained, settings.ema_decay) if settings.use_ema else None
    optimizer = build_optimizer(trained, settings)
    scheduler = build_scheduler(optimizer, settings)
    model, optimizer = accelerator.prepare(torch.compile(trained) if config.compile else trained, optimizer)
    parts = TrainingState({"model": autoencoder}, {"optimizer": optimizer}, scheduler, loader, ema, accelerator.scaler)

    discriminator = None
    if loss_config.adversarial > 0:
        torch.manual_seed(seed_for(config.seed, stage.name, "discriminator"))
        critic = PatchDiscriminator(config.data.channels, loss_config.discriminator_channels, loss_config.discriminator_layers)
        critic_optimizer = build_optimizer(critic, settings, loss_config.discriminator_learning_rate)
        choose_kernels(critic.to(memory_format=layout), config.kernels)
        discriminator, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
        parts.modules["discriminator"], parts.optimizers["discriminator_optimizer"] = critic, critic_optimizer

    perceptual = build_perceptual_loss(config, stage)  # frozen: of no optimiser, in no checkpoint
    if perceptual is not None:
        choose_kernels(perceptual.to(device, memory_format=layout), config.kernels)

    start = parts.restore(resumed)

    def reconstruct(images: torch.Tensor) -> Reconstruction:
        if not stage.latent_frozen:
            return model(images)
        with torch.no_grad(), accelerator.autocast():
            encoding = autoencoder.encode(images, sample_posterior=True)
        return Reconstruction(model(encoding.latents), encoding)

    batches = iter(loader)
    bar = progress_bar(settings.max_train_steps, start, f"{stage.name}, {stage.decoder.family} decoder")
    for step in range(start, settings.max_train_steps):
        autoencoder.train()
        for micro in range(accumulation):
            torch.manual_seed(seed_for(config.seed, stage.name, step, micro))  # the only source of this micro-step's randomness
            images = next(batches)["image"].to(device, non_blocking=True)
            images = augment(images, random_flip=config.data.random_flip, random_affine=config.data.random_affine)
            images = images.contiguous(memory_format=layout)
            with synchronize_gradients(accelerator, model, discriminator, when=micro == accumulation - 1):
                output = reconstruct(images)
                reconstruction = reconstruction_loss(output.sample, images, loss_config)
                if perceptual is not None:
                    with accelerator.autocast():
                        distance = perceptual(output.sample, images).mean()
                    reconstruction = reconstruction + loss_config.perceptual * distance
                loss = reconstruction if stage.latent_frozen else reconstruction + output.encoding.loss
                if discriminator is not None and step >= loss_config.adversarial_start:
                    critic.requires_grad_(False)
                    adversarial = generator_loss(critic(output.sample))
                    weight = adaptive_weight(reconstruction, adversarial, output.sample)
                    loss = loss + loss_config.adversarial * weight * adversarial
                    critic.requires_grad_(True)
                accelerator.backward(loss / accumulation)
                if discriminator is not None:
                    verdict = discriminator_loss(discriminator(images), discriminator(output.sample.detach()))
                    accelerator.backward(verdict / accumulation)
            if learns_codebook:
                autoencoder.bottleneck.observe(output.encoding)
            parts.losses.append(reconstruction.detach())

        if settings.max_grad_norm > 0:
            accelerator.clip_grad_norm_(trained.parameters(), settings.max_grad_norm)
        for each in parts.optimizers.values():
            each.step()
            each.zero_grad()
        scheduler.step()
        if learns_codebook:
            autoencoder.bottleneck.update_codebook()
        if ema:
            ema.update(trained)

        done, last, step_of_run = step + 1, step + 1 == settings.max_train_steps, steps_before + step + 1
        bar.update()
        if done % config.logging_steps == 0 or last:
            values = {"loss": global_mean(parts.losses), "lr": scheduler.get_last_lr()[0]}
            parts.losses.clear()
            refuse_non_finite(values["loss"], stage.name, done)
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            run.record(accelerator, step_of_run, values, stage=stage.name, split="train")
        if done % config.validation_steps == 0 or last:
            with ema.swapped_in(trained) if ema else contextlib.nullcontext(), accelerator.autocast():
                values = validate(config, autoencoder, data, device, validation_images(config, settings))
                with failing_together():
                    if run.shows_images():
                        shown = next(evaluation_batches(data.validation, config.logged_images, limit=config.logged_images))
                        sheet = reconstruction_sheet(autoencoder, shown["image"])
                        run.record_picture(accelerator, step_of_run, "reconstructions", sheet)
            run.record(accelerator, step_of_run, values, stage=stage.name, split="validation")
        if step_of_run % config.checkpointing_steps == 0 or last:
            run.save(step_of_run, *parts.pack(), stage=stage.name, stage_step=done)
    bar.close()
    if ema:
        trained.load_state_dict(ema.state_dict())  # what is delivered, and what stage 2 freezes, is the average
    accelerator.free_memory()


def make_loader(config: Config, stage: Stage, data: ImageData, purpose: str) -> TrainLoader:
    return TrainLoader(
        data.train,
        stage.config.train_batch_size,
        seed=seed_for(config.seed, stage.name, purpose),
        num_workers=config.data.num_workers,
        shuffle_buffer_size=config.data.shuffle_buffer_size,
    )


@torch.no_grad()
def initialize_codebook(config: Config, stage: Stage, autoencoder: Autoencoder, data: ImageData, device: torch.device) -> None:
    """k-means on the untrained encoder's outputs for the first images: 16 vectors a code, of at most 64 batches."""
    images = -(-16 * config.autoencoder.vq.codebook_size // autoencoder.latent_size**2)
    mine, features = len(range(rank(), images, world_size())), []  # not all of a batch: whatever its size
    with failing_together():
        for batch, _ in zip(make_loader(config, stage, data, "codebook"), range(64), strict=False):
            features.append(autoencoder.encode(batch["image"].to(device)).features)
            if sum(map(len, features)) >= mine:
                break
    generator = torch.Generator().manual_seed(seed_for(config.seed, "codebook"))
    autoencoder.bottleneck.initialize_codebook(torch.cat(features)[:mine], generator)


@torch.no_grad()
def validate(
    config: Config, autoencoder: Autoencoder, data: ImageData, device: torch.device, most_images: int
) -> dict[str, float]:
    """PSNR on held-out images, shared by the processes, and for VQ the codebook's use.

    At most `data.validation_size` images and `most_images`.
    """
    autoencoder.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # sum of PSNR, number of images
    usage = CodebookUsage(config.autoencoder.vq.codebook_size) if config.autoencoder.bottleneck == "vq" else None
    limit = min(config.data.validation_size, most_images)
    batches = evaluation_batches(data.validation, config.evaluation.batch_size, limit=limit)
    with failing_together():
        for batch in islice(batches, rank(), None, world_size()):
            images = batch["image"].to(device)
            output = autoencoder(images)
            ratios = psnr(output.sample.float().clamp(-1, 1), images).double()
            totals += torch.stack([ratios.sum(), totals.new_tensor(len(images))])
            if usage:
                usage.update(output.encoding.indices.cpu())
    ratio, images_seen = sum_over_processes(totals).tolist()
    values = {"psnr": ratio / images_seen}
    if usage:
        usage.all_reduce()
        values |= {"codebook_usage": usage.usage, "codebook_perplexity": usage.perplexity}
    return values


if __name__ == "__main__":
    main(train, __doc__)
