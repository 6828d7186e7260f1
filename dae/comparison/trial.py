"""One trial: an arm of a comparison trained with one seed, its priors, and all measurements."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dae.comparison.arms import arm_config, parse_arms
from dae.comparison.jobs import Job, job_config, tried_learning_rates
from dae.config import Config, with_overrides
from dae.data import in_memory, load_data
from dae.data.cache import EncodingCache
from dae.data.pictures import to_uint8
from dae.data.survey import stratified_split
from dae.diagnostics.report_card import report_card, require_images
from dae.evaluation import Judge, reconstruct, train_extractor
from dae.metrics import Classifier, CodebookUsage, code_entropy_rate, frechet_distance, gaussian_rate, versions
from dae.models import Autoencoder
from dae.priors import prior_family
from dae.quantizers import bottleneck_class
from dae.sampling import balanced_labels, generate
from dae.sampling.chain import knows_classes
from dae.seeding import seed_for
from dae.training import plan_stages
from dae.training.engine import LocalEngine
from dae.training.in_memory import encode, train_autoencoder, train_prior
from dae.training.rehearsal import rehearse_chain, require_measurable

JUDGE_SEED = 0  # for the classifier and all subsets: the same for every trial, arm and seed
SHOWN = 32  # samples kept as pictures
IMAGES_FOR_BITS = 64  # held-out images for the code length, where it is slow to compute
IMAGES_FOR_SSIM = 128
IMAGES_FOR_CARD = 1500  # training images for the report card


@dataclass
class Bench:
    """What all trials of a comparison share: images, the classifier whose features judge samples, and floors."""

    measure: Judge
    tune: Judge  # held-out: a part of the training images
    num_classes: int
    data: dict

    @classmethod
    def prepare(cls, config: Config) -> Bench:
        """Load the data, train the classifier or reuse the one in <output_dir>/bench, and measure the floors.

        Deterministic: the classifier does not depend on the seeds of the comparison.

        Raises:
            ValueError, FileNotFoundError: as `load_data`.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings, data = config.evaluation, load_data(config.data, JUDGE_SEED)
        rows = data.describe()
        require_measurable(config, training_images=rows["train"], held_out_images=rows["validation"])
        data.list_skipped(config.output_dir)
        taken = None if rows["train"] is None else min(rows["train"], settings.max_images)
        for arm in parse_arms(config.compare):  # before the classifier is trained
            chosen = arm_config(config, arm)
            rehearse_chain(chosen, data.num_classes, taken, LocalEngine(device, chosen.mixed_precision))

        def load(dataset: Any) -> tuple[Tensor, Tensor]:
            images, labels = in_memory(dataset, settings.max_images, seed=JUDGE_SEED, batch_size=settings.batch_size)
            return images.to(device), labels.to(device)

        (train, train_labels), (heldout, heldout_labels) = load(data.train), load(data.validation)
        require_images(train_images=len(train), heldout_images=len(heldout))
        classes = train_labels.cpu().numpy() if data.labelled else None
        rest, aside = (
            torch.from_numpy(part) for part in stratified_split(len(train), min(len(heldout), len(train) // 4), classes)
        )
        if len(tried_learning_rates(config)) > 1:
            require_measurable(config, images_held_out_for_tuning=len(aside))
        name = f"classifier-{data.fingerprint[:12]}-{settings.classifier_steps}.safetensors"
        path = Path(config.output_dir) / "bench" / name
        if path.is_file():
            classifier = Classifier.load(path, device)
        else:
            classifier = train_extractor(
                train, train_labels, data, steps=settings.classifier_steps, seed=JUDGE_SEED, device=device, progress=False
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            classifier.save(path)
        fixed = data.labelled, settings.neighbours, JUDGE_SEED
        return cls(
            measure=Judge(classifier, train, train_labels, heldout, heldout_labels, *fixed),
            tune=Judge(classifier, train[rest], train_labels[rest], train[aside], train_labels[aside], *fixed),
            num_classes=data.num_classes,
            data=data.describe(),
        )

    def facts(self) -> dict:
        """Context for reading the numbers; JSON-able."""
        measure = self.measure
        return {
            "floor": {"frechet": measure.floor.mean, "frechet_std": measure.floor.std},
            "memorised_heldout": measure.heldout_copies.share_heldout,
            "heldout_accuracy": measure.accuracy,
            "extractor": measure.classifier.identifier,
            "counts": {
                "train": len(measure.train),
                "heldout": len(measure.heldout),
                "frechet": measure.count,
                "tuning_train": len(self.tune.train),
                "tuning_heldout": len(self.tune.heldout),
            },
            "labelled": measure.labelled,
            "data": self.data,
            "versions": versions(),
        }


def run_trial(bench: Bench, config: Config, job: Job) -> tuple[dict, Tensor]:
    """Train and measure one trial.

    Args:
        bench: of `config`.
        config: of the comparison, not of the trial.

    Returns:
        record: JSON-able: the job, rate and reconstruction, a list of `priors` (main one first) with bits, generation
            distance to held-out images at equal counts and copies, and the latent's report card.
        samples: uint8 [n, H, W, C], the main prior's first.

    Raises:
        FloatingPointError: the training diverged.
    """
    started, config = time.monotonic(), job_config(config, job)
    judge, measuring = (bench.tune, False) if job.purpose == "tune" else (bench.measure, True)
    autoencoder = train_autoencoder(judge.train, config)
    trained = time.monotonic()
    pairs = (judge.train, judge.train_labels), (judge.heldout, judge.heldout_labels)
    cache = encode(autoencoder, *pairs, bench.num_classes, config)
    record = dataclasses.asdict(job) | _reconstruction(judge, autoencoder, config) | _of_latent(cache, config)

    sized = measuring and job.rate is None and job.arm in config.compare.rate_arms
    sizes = [prior_family(config).resized(config.prior, size) for size in config.compare.prior_widths] if sized else []
    trained_priors = [
        _with_prior(bench, judge, autoencoder, cache, with_overrides(config, overrides)) for overrides in ([], *sizes)
    ]
    record["priors"] = [prior for prior, _ in trained_priors]
    # No card at another rate: the predictors would follow the rate.
    record["card"] = _card(judge, autoencoder, job) if measuring and job.rate is None else None
    record["stages"] = [[s.name, s.decoder.family, s.config.max_train_steps] for s in plan_stages(config)]
    record |= {"autoencoder_seconds": trained - started, "seconds": time.monotonic() - started, "versions": versions()}
    return json.loads(json.dumps(record)), trained_priors[0][1]


def _with_prior(
    bench: Bench, judge: Judge, autoencoder: Autoencoder, cache: EncodingCache, config: Config
) -> tuple[dict, Tensor]:
    """Train and measure a prior and its samples; returns the record and the first samples as uint8."""
    begun, family, validation = time.monotonic(), prior_family(config), cache.validation
    prior = train_prior(cache, config)
    labels_N = balanced_labels(config.sampling.num_samples, bench.num_classes)
    parts = generate(autoencoder, prior, labels_N, config.sampling, seed_for(config.seed, "sampling"))
    images = torch.cat([part.clamp(-1, 1) for part in parts])
    if family.costly_bits:  # the same few images in every trial
        few = _some(len(validation), IMAGES_FOR_BITS)
        validation = type(validation)(validation.values_NC[few], validation.labels_N[few])
    facts = {
        "size": getattr(config.prior, family.size_knob),
        "parameters": sum(p.numel() for p in (*prior.parameters(), *prior.buffers())),
        "learning_rate": None if family.fitted else config.prior.learning_rate,
        "bits": family.bits_per_image(prior, validation, config),
        **judge.samples(images, labels_N if knows_classes(prior) else None),
        "seconds": time.monotonic() - begun,
    }
    return facts, torch.from_numpy(to_uint8(images[:SHOWN]))


def _some(count: int, limit: int) -> Tensor:
    """At most `limit` of `count` row numbers, the same in every trial; spread, as the first rows may be of one kind."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(JUDGE_SEED))[:limit]


def _card(judge: Judge, autoencoder: Autoencoder, job: Job) -> dict[str, float | None]:
    rows = _some(len(judge.train), IMAGES_FOR_CARD)
    train_labels, heldout_labels = (judge.train_labels[rows], judge.heldout_labels) if judge.labelled else (None, None)
    return report_card(autoencoder, judge.train[rows], train_labels, judge.heldout, heldout_labels, seed=job.seed)


def _reconstruction(judge: Judge, autoencoder: Autoencoder, config: Config) -> dict[str, float]:
    none = torch.arange(0)
    found = reconstruct(autoencoder, judge.classifier, judge.heldout, none, config.evaluation.batch_size)
    return {
        "psnr": found["psnr"].mean().item(),
        "ssim": found["ssim"][_some(len(judge.heldout), IMAGES_FOR_SSIM)].mean().item(),
        "reconstruction_frechet": frechet_distance(judge.heldout_features, found["found"]),
    }


def _of_latent(cache: EncodingCache, config: Config) -> dict[str, Any]:
    """Bits per image of the training latents under the code frequencies or one Gaussian, and the held-out codebook usage."""
    bottleneck, train_NC = bottleneck_class(config.autoencoder), cache.train.values_NC[:, 0]
    if not bottleneck.discrete:
        return {"rate_bits": gaussian_rate(*train_NC.chunk(2, dim=1)), "codebook": None}
    codes = bottleneck.vocabulary(config.autoencoder)
    usage = CodebookUsage(*codes).update(cache.validation.values_NC.cpu())
    codebook = {"usage": usage.usage, "perplexity": usage.perplexity}
    return {"rate_bits": code_entropy_rate(train_NC, *codes), "codebook": codebook}
