"""One trial: an arm of a comparison trained with one seed, its priors, and everything that is measured of it."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dae.comparison.arms import arm_config, parse_arms
from dae.config import Config, with_overrides
from dae.data import in_memory, load_data
from dae.data.cache import EncodedDataset, EncodingCache
from dae.data.pictures import to_uint8
from dae.data.survey import stratified_split
from dae.diagnostics.report_card import report_card, require_images
from dae.evaluation import Judge, train_extractor
from dae.metrics import (
    Classifier,
    CodebookUsage,
    code_entropy_rate,
    extract_features,
    frechet_distance,
    gaussian_rate,
    psnr,
    ssim,
    versions,
)
from dae.models import Autoencoder, Prior
from dae.priors import prior_family
from dae.quantizers import bottleneck_class
from dae.sampling import balanced_labels, generate
from dae.sampling.chain import knows_classes
from dae.seeding import seed_for
from dae.training import plan_stages
from dae.training.engine import LocalEngine
from dae.training.in_memory import encode, train_autoencoder, train_prior
from dae.training.rehearsal import rehearse_chain, require_measurable

JUDGE_SEED = 0  # of the classifier and of all subsets: the same for every trial, arm and seed
SHOWN = 32  # samples kept as pictures
IMAGES_FOR_BITS = 64  # held-out images whose code length is measured where that takes long
IMAGES_FOR_SSIM = 128
IMAGES_FOR_CARD = 1500  # training images that the report card is made from


@dataclass(frozen=True)
class Job:
    """One trial of a comparison.

    Args:
        learning_rate: of both stages of the autoencoder.
        purpose: "measure" on the held-out images, or "tune" on images held out of the training set.
        rate: another rate than the configuration's: the codebook size (vq) or the KL weight (kl); None is its own.
        prior_learning_rate: another one than the configuration's; None is its own.
    """

    arm: str
    seed: int
    learning_rate: float
    purpose: str = "measure"
    rate: float | None = None
    prior_learning_rate: float | None = None

    @property
    def key(self) -> str:
        prior = "" if self.prior_learning_rate is None else f"-prior{self.prior_learning_rate:g}"
        rate = "" if self.rate is None else f"-rate{self.rate:g}"
        return f"{self.purpose}-{self.arm}-seed{self.seed}-lr{self.learning_rate:g}{prior}{rate}"


def job_config(config: Config, job: Job) -> Config:
    """The configuration that `job` trains. ValueError: no such arm."""
    arms = {arm.name: arm for arm in parse_arms(config.compare)}
    if job.arm not in arms:
        raise ValueError(f"no arm {job.arm!r} in this comparison; it has {', '.join(arms)}")
    overrides = [f"seed={job.seed}", *(f"{stage}.learning_rate={job.learning_rate!r}" for stage in ("stage1", "stage2"))]
    if job.prior_learning_rate is not None:
        overrides.append(f"prior.learning_rate={job.prior_learning_rate!r}")
    if job.rate is not None:
        bottleneck = bottleneck_class(config.autoencoder)
        overrides.append(f"{bottleneck.rate_knob}={int(job.rate) if bottleneck.discrete else job.rate!r}")
    return arm_config(config, arms[job.arm], *overrides)


@dataclass
class Bench:
    """What all trials of a comparison share: the images, the classifier whose features judge, the floors."""

    measure: Judge
    tune: Judge  # held-out: a part of the training images
    num_classes: int
    data: dict

    @classmethod
    def prepare(cls, config: Config) -> Bench:
        """Load the data, train the classifier or find it in <output_dir>/bench, and measure the floors.

        Deterministic: the classifier does not depend on the seeds of the comparison.

        Raises:
            ValueError, FileNotFoundError: as `load_data`.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = load_data(config.data, JUDGE_SEED)
        rows = data.describe()
        require_measurable(config, training_images=rows["train"], held_out_images=rows["validation"])
        data.list_skipped(config.output_dir)
        for arm in parse_arms(config.compare):  # before the classifier is trained
            chosen = arm_config(config, arm)
            engine = LocalEngine(device, chosen.mixed_precision)
            rehearse_chain(chosen, data.num_classes, limited(rows["train"], config), engine)
        train, train_labels = _collect(data.train, config, device)
        heldout, heldout_labels = _collect(data.validation, config, device)
        require_images(train_images=len(train), heldout_images=len(heldout))
        labels = train_labels.cpu().numpy() if data.labelled else None
        rest, aside = (
            torch.from_numpy(rows) for rows in stratified_split(len(train), min(len(heldout), len(train) // 4), labels)
        )
        if len(config.compare.learning_rates) * max(1, len(config.compare.prior_learning_rates)) > 1:
            require_measurable(config, images_held_out_for_tuning=len(aside))
        path = (
            Path(config.output_dir)
            / "bench"
            / f"classifier-{data.fingerprint[:12]}-{config.evaluation.classifier_steps}.safetensors"
        )
        if path.is_file():
            classifier = Classifier.load(path, device)
        else:
            options = {"steps": config.evaluation.classifier_steps, "seed": JUDGE_SEED, "device": device, "progress": False}
            classifier = train_extractor(train, train_labels, data, **options)
            path.parent.mkdir(parents=True, exist_ok=True)
            classifier.save(path)
        fixed = data.labelled, config.evaluation.neighbours, JUDGE_SEED
        return cls(
            measure=Judge(classifier, train, train_labels, heldout, heldout_labels, *fixed),
            tune=Judge(classifier, train[rest], train_labels[rest], train[aside], train_labels[aside], *fixed),
            num_classes=data.num_classes,
            data=data.describe(),
        )

    def facts(self) -> dict:
        """What a reader needs to judge the numbers; JSON-able."""
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


def limited(rows: int | None, config: Config) -> int | None:
    """As many of `rows` as are taken."""
    return None if rows is None else min(rows, config.evaluation.max_images)


def _collect(dataset: Dataset, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    settings = config.evaluation
    images, labels = in_memory(dataset, settings.max_images, seed=JUDGE_SEED, batch_size=settings.batch_size)
    return images.to(device), labels.to(device)


def run_trial(bench: Bench, config: Config, job: Job) -> tuple[dict, Tensor]:
    """Train and measure one trial.

    Args:
        bench: of `config`.
        config: of the comparison, not of the trial.

    Returns:
        record: JSON-able: the job, rate and reconstruction, a list of `priors` (the main one first) with bits, generation
            distance to held-out images at equal counts and copies, and the latent's report card.
        samples: uint8 [n, H, W, C], the first ones of the main prior.

    Raises:
        FloatingPointError: the training diverged.
    """
    started, config = time.monotonic(), job_config(config, job)
    judge = bench.tune if job.purpose == "tune" else bench.measure
    autoencoder = train_autoencoder(judge.train, config)
    trained = time.monotonic()
    pairs = (judge.train, judge.train_labels), (judge.heldout, judge.heldout_labels)
    cache = encode(autoencoder, *pairs, bench.num_classes, config)
    record = dataclasses.asdict(job) | _reconstruction(judge, autoencoder, config)
    record |= {"rate_bits": _rate(cache.train, config), "codebook": _codebook(cache.validation, config)}

    priors, samples, family = [], None, prior_family(config)
    sized = job.purpose == "measure" and job.rate is None and job.arm in config.compare.rate_arms
    widths = config.compare.prior_widths if sized else []
    for size in [None, *widths]:
        chosen = config if size is None else with_overrides(config, family.resized(config.prior, size))
        begun = time.monotonic()
        prior = train_prior(cache, chosen)
        generated, labels = _generate(autoencoder, prior, bench.num_classes, config)
        samples = generated[:SHOWN] if samples is None else samples
        facts = {
            "size": getattr(chosen.prior, family.size_knob),
            "parameters": sum(p.numel() for p in (*prior.parameters(), *prior.buffers())),
        }
        facts |= {"learning_rate": None if family.fitted else chosen.prior.learning_rate}
        facts |= {"bits": _bits_an_image(prior, cache, chosen)}
        priors.append(
            facts | judge.samples(generated, labels if knows_classes(prior) else None) | {"seconds": time.monotonic() - begun}
        )
    record["priors"] = priors
    # At another rate there is no card: what a predictor says would follow the rate.
    record["card"] = _card(judge, autoencoder, job) if job.purpose == "measure" and job.rate is None else None
    record["stages"] = [[s.name, s.decoder.family, s.config.max_train_steps] for s in plan_stages(config)]
    record |= {"autoencoder_seconds": trained - started, "seconds": time.monotonic() - started, "versions": versions()}
    return json.loads(json.dumps(record)), torch.from_numpy(to_uint8(samples))


def _some(count: int, limit: int) -> Tensor:
    """At most `limit` of `count` row numbers: the same for every trial, and not the first ones, which may be of one kind."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(JUDGE_SEED))[:limit]


def _card(judge: Judge, autoencoder: Autoencoder, job: Job) -> dict[str, float | None]:
    rows = _some(len(judge.train), IMAGES_FOR_CARD)
    train_labels, heldout_labels = (judge.train_labels[rows], judge.heldout_labels) if judge.labelled else (None, None)
    return report_card(autoencoder, judge.train[rows], train_labels, judge.heldout, heldout_labels, seed=job.seed)


@torch.no_grad()
def _reconstruction(judge: Judge, autoencoder: Autoencoder, config: Config) -> dict:
    parts, some = judge.heldout.split(config.evaluation.batch_size), _some(len(judge.heldout), IMAGES_FOR_SSIM)
    rebuilt = torch.cat([autoencoder(part).sample.clamp(-1, 1) for part in parts])
    return {
        "psnr": psnr(rebuilt, judge.heldout).mean().item(),
        "ssim": ssim(rebuilt[some], judge.heldout[some]).mean().item(),
        "reconstruction_frechet": frechet_distance(judge.heldout_features, extract_features(judge.classifier, rebuilt)),
    }


def _rate(encoded: EncodedDataset, config: Config) -> float:
    """Bits per image of the training set's latents, if a prior knew no more than the frequency of each code, or a Gaussian."""
    if (bottleneck := bottleneck_class(config.autoencoder)).discrete:
        return code_entropy_rate(encoded.values_NC[:, 0], bottleneck.num_codes(config.autoencoder))
    return gaussian_rate(*encoded.values_NC[:, 0].chunk(2, dim=1))


def _codebook(encoded: EncodedDataset, config: Config) -> dict | None:
    bottleneck = bottleneck_class(config.autoencoder)
    if not bottleneck.discrete:
        return None
    usage = CodebookUsage(bottleneck.num_codes(config.autoencoder)).update(encoded.values_NC.cpu())
    return {"usage": usage.usage, "perplexity": usage.perplexity}


def _generate(autoencoder: Autoencoder, prior: Prior, num_classes: int, config: Config) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W], clipped, and the classes that they were asked for."""
    labels_N = balanced_labels(config.sampling.num_samples, num_classes)
    parts = generate(autoencoder, prior, labels_N, config.sampling, seed_for(config.seed, "sampling"))
    return torch.cat([part.clamp(-1, 1) for part in parts]), labels_N


def _bits_an_image(prior: Prior, cache: EncodingCache, config: Config) -> float:
    """Held-out code length of the latent under the prior, in bits per image."""
    family, validation = prior_family(config), cache.validation
    if family.costly_bits:  # it solves an ODE for each image: the same few for every trial
        few = _some(len(validation), IMAGES_FOR_BITS)
        validation = type(validation)(validation.values_NC[few], validation.labels_N[few])
    return family.bits_per_image(prior, validation, config)
