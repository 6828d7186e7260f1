"""Train the prior: an autoregressive Transformer over the tokens that recipes/encode.py cached.

    accelerate launch recipes/train_prior.py --config recipes/configs/digits.yaml
    torchrun --standalone --nproc_per_node 2 recipes/train_prior.py prior.train_batch_size=32

Runs on a CPU as it stands; on GPUs add `--mixed_precision bf16` to `accelerate launch`. Held-out bits a token are measured
every `validation_steps`; with `prior.early_stopping` the weights with the fewest are delivered.
Writes <output_dir>/prior: model.safetensors and config.json, checkpoint-*/, logs/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import torch

from dae.cards import prior_card
from dae.cli import main
from dae.config import Config
from dae.data import TrainLoader, load_data
from dae.data.tokens import Fingerprint, TokenCache, TokenDataset, choose_copies, transform_fingerprint
from dae.distributed import draw_rows
from dae.hub import fingerprint, require_model
from dae.models import ARPrior, choose_kernels
from dae.training import EMA, Run, TrainingState, build_optimizer, build_scheduler, make_accelerator
from dae.training.loop import global_mean, progress_bar, refuse_non_finite, seed_for, synchronize_gradients


def train(config: Config) -> Path:
    """Train, save, and return the folder of the trained prior."""
    run = Run(config, "prior", without_influence=("method", "autoencoder.", "auxiliary_decoder.", "stage1.", "stage2."))
    accelerator = make_accelerator(config, run.folder / "logs")
    device, settings, output = accelerator.device, config.prior, Path(config.output_dir)
    data = load_data(config.data, config.seed)
    tokenizer = fingerprint(require_model(output / "autoencoder", "train_dae"))
    expected = Fingerprint(tokenizer, data.fingerprint, transform_fingerprint(config))
    cache = TokenCache.load(output / "tokens", expected)

    torch.manual_seed(seed_for(config.seed, "prior"))
    prior = ARPrior(
        settings,
        vocab_size=cache.vocab_size,
        sequence_length=cache.latent_size**2,
        num_classes=cache.num_classes,
        tokenizer=cache.fingerprint.tokenizer,
    ).to(device)
    choose_kernels(prior, config.kernels)
    prior.gradient_checkpointing = settings.gradient_checkpointing
    loader = TrainLoader(cache.train, settings.train_batch_size, seed=seed_for(config.seed, "prior", "order"))
    resumed = run.open(accelerator, dataclasses.asdict(expected))

    ema = EMA(prior, settings.ema_decay) if settings.use_ema else None
    optimizer = build_optimizer(prior, settings)
    scheduler = build_scheduler(optimizer, settings)
    model, optimizer = accelerator.prepare(torch.compile(prior) if config.compile else prior, optimizer)
    parts = TrainingState({"model": prior}, {"optimizer": optimizer}, scheduler, loader, ema, accelerator.scaler)
    start = parts.restore(resumed)

    batches = iter(loader)
    accumulation = settings.gradient_accumulation_steps
    bar = progress_bar(settings.max_train_steps, start, "prior")
    for step in range(start, settings.max_train_steps):
        prior.train()
        for micro in range(accumulation):
            torch.manual_seed(seed_for(config.seed, "prior", step, micro))  # the only source of this micro-step's randomness
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
            tokens = choose_copies(batch["tokens"], draw_rows(torch.rand, batch["label"].shape, device=device))
            with synchronize_gradients(accelerator, model, when=micro == accumulation - 1):
                loss = model(prior.hide_classes(batch["label"]), prior.corrupt(tokens[:, :-1]), targets_BT=tokens)
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
                bits = bits_per_token(prior, cache.validation, config.evaluation.batch_size)
                run.record(accelerator, done, {"bits_per_token": bits}, stage="prior", split="validation")
                if accelerator.is_main_process and (is_best(run) if settings.early_stopping else last):
                    prior.save_pretrained(run.folder, card=prior_card(config, data.describe(), run.history()))
        if done % config.checkpointing_steps == 0 or last:
            run.save(done, *parts.pack(), stage="prior", stage_step=done)
    bar.close()
    accelerator.print(f"saved {run.folder}")
    if config.push_to_hub and accelerator.is_main_process:
        accelerator.print(prior.push_to_hub(f"{config.hub_model_id}-prior", folder=run.folder))
    accelerator.end_training()
    return run.folder


def is_best(run: Run) -> bool:
    """Whether the latest validation has fewer bits than every one before it."""
    *before, latest = [row["bits_per_token"] for row in run.history() if row["split"] == "validation"]
    return latest < min(before, default=math.inf)


@torch.inference_mode()
def bits_per_token(prior: ARPrior, tokens: TokenDataset, batch_size: int) -> float:
    """Held-out code length: mean of -log2 p(token | class, earlier tokens) over the plain encodings."""
    prior.eval()
    device, total = prior.head.weight.device, 0.0
    for labels, batch in zip(tokens.labels_N.split(batch_size), tokens.tokens_NCT[:, 0].split(batch_size), strict=True):
        batch = batch.long().to(device)
        total += prior(labels.to(device), batch[:, :-1], targets_BT=batch).item() * len(labels)
    return total / len(tokens) / math.log(2)


if __name__ == "__main__":
    main(train, __doc__)
