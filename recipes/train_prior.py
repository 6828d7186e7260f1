"""Train the prior on what recipes/encode.py cached: an autoregressive Transformer over tokens, or over a continuous latent a
Diffusion Transformer or a Gaussian mixture (`prior.family`).

    accelerate launch recipes/train_prior.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train_prior.py --config recipes/configs/digits-kl.yaml
    torchrun --standalone --nproc_per_node 2 recipes/train_prior.py prior.train_batch_size=32

Runs on a CPU unchanged; on GPUs add `--mixed_precision bf16` to `accelerate launch`. Held-out bits per token (Diffusion
Transformer: the flow-matching loss) are measured every `validation_steps`; with `prior.early_stopping` the best weights are
delivered. Bits per image of a continuous latent are measured once, at the end. A mixture is fitted in one step by one process.
Writes <output_dir>/prior: model.safetensors and config.json, checkpoint-*/, logs/.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dae.cli import main
from dae.config import Config
from dae.data import TrainLoader, load_data, summarize_data
from dae.data.cache import Fingerprint, transform_fingerprint
from dae.diagnostics.doctor import Doctor
from dae.distributed import failing_together, run_on_first_process
from dae.files import announce
from dae.hub import prepare_repository, require_model
from dae.lock import writes
from dae.models import Autoencoder, choose_kernels
from dae.models.latent import identities
from dae.planning.plan import plan_prior
from dae.priors import prior_family, require_guidance
from dae.quantizers import bottleneck_class
from dae.reporting.cards import prior_card
from dae.seeding import seed_for
from dae.training import Run, end_training, make_accelerator
from dae.training.encodings import cache_class
from dae.training.engine import AcceleratorEngine
from dae.training.initialization import load_prior
from dae.training.pictures import sample_sheet
from dae.training.preflight import preflight_prior
from dae.training.prior import Best, PriorTraining, deliver, fit_at_once, train_by_steps
from dae.training.rehearsal import sampled_classes


@writes("prior")
def train(config: Config) -> Path:
    """Train, save, and return the folder of the trained prior."""
    family = prior_family(config)
    require_guidance(config)
    run = Run(config, "prior", Doctor().examine)
    accelerator = make_accelerator(config, run.folder / "logs")
    settings, output = config.prior, Path(config.output_dir)
    with failing_together():
        data = load_data(config.data, config.seed)
        tokenizer, *earlier_names = identities(require_model(output / "autoencoder", "train_dae"))
        expected = Fingerprint(tokenizer, data.fingerprint, transform_fingerprint(config))
        kind = cache_class(bottleneck_class(config.autoencoder))
        cache = kind.load(output / kind.folder, expected, earlier_names)
        torch.manual_seed(seed_for(config.seed, "prior"))
        prior = family.build(settings, cache).to(accelerator.device)
        if settings.init_from:
            load_prior(prior, settings.init_from)
        choose_kernels(prior, config.kernels)
        classes = sampled_classes(config, data.class_names, data.labels)
        summary = summarize_data(data) if accelerator.is_main_process else None

        def make_loader() -> TrainLoader:
            return TrainLoader(cache.train, settings.train_batch_size, seed=seed_for(config.seed, "prior", "order"))

        loader = None if family.fitted else make_loader()
    repository = f"{config.hub_model_id}-prior"
    if config.push_to_hub:
        run_on_first_process(lambda: prepare_repository(repository))
    table = data.describe() | {"table": summary and summary.table()}
    resumed = run.open(accelerator, dataclasses.asdict(cache.fingerprint), data=table)

    def card(step: int) -> str:
        """The model card, with the measurements of this step's weights."""
        rows = [row for row in run.history() if row["step"] <= step or row["split"] == "delivered"]
        return prior_card(config, family, data.describe(), rows, summary.lines())

    def save_best(best: Best) -> None:
        prior.save_pretrained(run.folder, card=card(best.step))

    if resumed is None:
        preflight_prior(config, family, prior, make_loader, accelerator.device)
    if loader is None:
        fit_at_once(prior, family, cache, run, resumed, card)
    else:
        picture = None
        with failing_together():
            if run.shows_images():
                autoencoder = Autoencoder.from_pretrained(output / "autoencoder", device=accelerator.device)
                choose_kernels(autoencoder, config.kernels)
                picture = lambda: sample_sheet(autoencoder, prior, config, classes)  # noqa: E731
        training = PriorTraining(config, family, prior, loader, AcceleratorEngine(accelerator))
        best = train_by_steps(training, cache.validation, run=run, resumed=resumed, picture=picture, save_best=save_best)
        run_on_first_process(lambda: deliver(prior, best, family, cache.validation, run, card))
    run_on_first_process(lambda: announce(run.folder, run.outputs()))
    if config.push_to_hub:
        accelerator.print(run_on_first_process(lambda: prior.push_to_hub(repository, folder=run.folder)))
    end_training(accelerator)
    return run.folder


if __name__ == "__main__":
    main(train, __doc__, plan_prior)
