"""Measure a run: reconstructions of both decoders, the latent, the prior, the samples, and copies of training images.

    python recipes/evaluate.py --config recipes/configs/digits.yaml

Frechet distance, kernel distance (KID's formula) and precision/recall are taken in features of a small classifier that is
trained here on the training split (for unlabelled data: to tell by how many quarter turns an image was rotated). They compare
runs on one data set with one another; they are not Inception numbers. Writes <output_dir>/metrics.json and
<output_dir>/evaluation/.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dae.cli import main
from dae.config import Config
from dae.data import ImageData, in_memory, load_data
from dae.data.pictures import to_uint8, write_npz
from dae.evaluation import Judge, reconstruct, train_extractor
from dae.files import announce, replaced_folder, write_file
from dae.hub import fingerprint
from dae.lock import writes
from dae.memory import require_memory
from dae.metrics import (
    CodebookUsage,
    as_float,
    extract_features,
    gaussian_rate,
    versions,
)
from dae.models import Autoencoder, Prior
from dae.priors import PriorFamily, family_of
from dae.sampling import balanced_labels, generate, load_chain
from dae.sampling.chain import knows_classes
from dae.seeding import seed_for
from dae.training import Run, one_process
from dae.training.rehearsal import require_measurable
from dae.training.run import refuse_other_data


@writes("evaluation")
def evaluate(config: Config) -> dict:
    """Measure, write and return metrics.json."""
    started, device, output, seed = time.monotonic(), one_process(config), Path(config.output_dir), config.seed
    autoencoder, prior = load_chain(output, device, config.kernels)
    samples, sampling = load_samples(output)
    if knows_classes(prior):
        for cfg_scale in config.evaluation.cfg_scales:
            prior.check_guidance(cfg_scale)
    family = family_of(prior)
    history, validations = load_history(config, family)
    data = load_data(config.data, seed)
    refuse_other_data(output / "autoencoder", config.data, data.fingerprint)
    autoencoder.refuse_other_data(config.data.channels, config.data.resolution)
    data.list_skipped(output)
    rows = data.describe()
    counts = {"training_images": rows["train"], "held_out_images": rows["validation"], "samples": len(samples["arr_0"])}
    require_measurable(config, **counts)
    refuse_what_does_not_fit(config, data, len(samples["arr_0"]))
    train, train_labels = collect(data.train, config)
    heldout, heldout_labels = collect(data.validation, config)

    steps, labels = config.evaluation.classifier_steps, (train_labels, heldout_labels)
    classifier = train_extractor(train, train_labels, data, steps=steps, seed=seed, device=device)
    judge = Judge(classifier, train, labels[0], heldout, labels[1], data.labelled, config.evaluation.neighbours, seed)

    shown = (torch.arange(min(32, len(heldout))) * len(heldout)) // min(32, len(heldout))  # of a sorted set not one class
    pictures = {"originals": to_uint8(as_float(heldout[shown]))}
    reconstructions = {}
    for name, model in saved_stages(output / "autoencoder", autoencoder, device).items():
        measured = reconstruct(model, classifier, heldout, shown, config.evaluation.batch_size)
        pictures[name] = to_uint8(measured["rebuilt"])
        means = {key: measured[key].mean().item() for key in ("psnr", "ssim")}
        reconstructions[name] = {"decoder": model.config.decoder.family} | means | judge.reconstructions(measured["found"])

    generated = torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2)  # 8 bits
    found, asked = extract_features(classifier, generated), knows_classes(prior)
    copies = judge.near_copies(generated)
    classes = torch.from_numpy(samples["arr_1"]) if asked else None
    generation = judge.samples(generated, classes, found, copies) | judge.kernel(found)
    closest = copies.nearest_distance.argsort()[:16]  # the worst cases, not a selection that flatters
    pictures |= {
        "samples": samples["arr_0"][closest.numpy()],
        "nearest training images": to_uint8(as_float(train[copies.nearest_index[closest]])),
    }

    # What guidance and the length of training trade: fidelity against variety and copies.
    criterion = family.criterion
    chosen = min(validations, key=lambda row: row[criterion]) if config.prior.early_stopping else validations[-1]
    candidates = []
    if knows_classes(prior):  # one that does not is fitted at once: there is neither guidance nor length of training
        candidates = [(chosen, prior)] + [(row, p) for row, p in other_priors(config, prior, validations) if row != chosen]
    trade, labels = [], balanced_labels(min(len(generated), config.evaluation.max_images), prior.num_classes)
    with tqdm(total=len(candidates) * len(config.evaluation.cfg_scales), desc="trade", mininterval=0.5) as bar:
        for row, model in candidates:
            for cfg_scale in config.evaluation.cfg_scales:
                settings = dataclasses.replace(config.sampling, cfg_scale=cfg_scale)
                images, start = torch.empty(len(labels), *train.shape[1:]), 0
                for batch in generate(autoencoder, model, labels, settings, seed_for(seed, "trade")):
                    images[start : start + len(batch)] = batch.clamp(-1, 1)
                    start += len(batch)
                at = {"prior_step": row["step"], f"heldout_{criterion}": row[criterion], "cfg_scale": cfg_scale}
                trade.append(at | judge.samples(images, labels))
                bar.update()

    metrics = {
        "reconstruction": reconstructions,
        "codebook": describe_codes(measured["indices"], autoencoder.config.vq.codebook_size) if "indices" in measured else None,
        "latent": None if "indices" in measured else describe_posteriors(measured["features"], measured["log_variance"]),
        "prior": {
            "family": family.name,
            f"heldout_{criterion}": chosen[criterion],
            "heldout_bits_per_image": bits_an_image(prior, family, chosen, history),
            "step": chosen["step"],
            "tokens_an_image": family.tokens_per_image(prior),
        },
        "generation": generation,
        "floor": {
            "meaning": "training against held-out images, the Frechet distance at equal counts",
            "frechet": judge.floor.mean,
            "frechet_std": judge.floor.std,
            **judge.kernel(judge.train_features),
        },
        "trade": trade,
        "extractor": {
            "id": classifier.identifier,
            "note": f"{data.title} features, not Inception",
            "heldout_accuracy": judge.accuracy,
        },
        "data": data.describe(),
        "counts": {"train": len(train), "heldout": len(heldout), "samples": len(generated), "frechet": judge.count},
        "sampling": sampling,
        "method": config.method,
        "seed": seed,
        "versions": versions(),
        "measured": {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        },
        "seconds": time.monotonic() - started,
    }
    with replaced_folder(output / "evaluation") as new:
        classifier.save(new / "classifier.safetensors")
        write_npz(new / "pictures.npz", **pictures)
        write_file(output / "metrics.json", json.dumps(metrics, indent=2).encode())
    show(metrics)
    announce(output, ["metrics.json", "evaluation/classifier.safetensors", "evaluation/pictures.npz"], "/metrics.json")
    return metrics


def load_samples(output: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The samples and how they were drawn. FileNotFoundError, ValueError: there are none, or they are another prior's."""
    folder, remedy = output / "samples", "draw them with recipes/sample.py and the same configuration"
    if not (folder / "samples.npz").is_file() or not (folder / "sampling.json").is_file():
        raise FileNotFoundError(f"no samples in {folder}: {remedy}")
    try:
        sampling, samples = dict(json.loads((folder / "sampling.json").read_text())), dict(np.load(folder / "samples.npz"))
        made_by, shape = sampling["prior"], (samples["arr_0"].ndim, len(samples["arr_0"]) == len(samples["arr_1"]))
    except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"the samples in {folder} are damaged ({error}): {remedy}") from error
    if shape != (4, True):
        raise ValueError(f"the samples in {folder} are no images [N, H, W, C] with a label each: {remedy}")
    if made_by != fingerprint(output / "prior"):
        raise ValueError(f"the samples in {folder} are of another prior than {output / 'prior'}: {remedy}")
    if classes := ", ".join(map(str, sampling.get("classes", ()))):
        raise ValueError(f"the samples in {folder} are of {classes} alone, the images held out of all classes: {remedy}")
    return samples, sampling


def load_history(config: Config, family: PriorFamily) -> tuple[list[dict], list[dict]]:
    """The log of the prior's training, and its validations. FileNotFoundError, ValueError: it is lost, or damaged."""
    run = Run(config, "prior")
    remedy = "deliver the prior again with recipes/train_prior.py and resume_from_checkpoint=latest"
    if not run.history_file.is_file():
        raise FileNotFoundError(f"no log of the prior's training, {run.history_file}: {remedy}")
    history = run.history()
    validations = [row for row in history if row.get("split") == "validation" and family.criterion in row]
    if not validations or not any(family.bits_key in row for row in history if row.get("split") != "train"):
        raise ValueError(f"{run.history_file} holds no validation of the prior: {remedy}")
    return history, validations


def collect(dataset, config: Config) -> tuple[Tensor, Tensor]:
    """All images (uint8) and labels of a split in memory, or `evaluation.max_images` of them."""
    settings, workers = config.evaluation, config.data.num_workers
    options = {"seed": config.seed, "batch_size": settings.batch_size, "num_workers": workers, "as_bytes": True}
    return in_memory(dataset, settings.max_images, **options)


def saved_stages(folder: Path, final: Autoencoder, device: torch.device) -> dict[str, Autoencoder]:
    """The model at the switch, if there was one, and the final model."""
    stage1 = {"stage 1": Autoencoder.from_pretrained(folder / "stage1", device=device)} if (folder / "stage1").is_dir() else {}
    return stage1 | {"final": final}


def refuse_what_does_not_fit(config: Config, data: ImageData, samples: int) -> None:
    """ValueError before anything is measured, if the images to be held in memory do not fit there."""
    limit, resolution = config.evaluation.max_images, config.data.resolution
    train, heldout = (min(n or limit, limit) for n in (data.describe()[part] for part in ("train", "validation")))
    held = 2 * train + heldout + samples  # as 8 bits; training images twice while they are put together
    held += 0 if data.labelled else 4 * train  # in four rotations
    held += 8 * min(samples, limit)  # of other guidance scales and checkpoints, in float32
    require_memory(
        held * config.data.channels * resolution**2,
        f"{train:,} training images, {heldout:,} held-out ones and {samples:,} samples of {resolution} x {resolution} pixels",
        "lower evaluation.max_images or sampling.num_samples",
    )


def describe_codes(indices: Tensor, codebook_size: int) -> dict:
    usage = CodebookUsage(codebook_size).update(indices)
    return {"usage": usage.usage, "perplexity": usage.perplexity, "counts": usage.counts.tolist()}


def describe_posteriors(mean: Tensor, log_variance: Tensor) -> dict:
    """Bits per image that the latent costs under one Gaussian of independent values: of each channel, and of all together."""
    pairs = zip(mean.split(1, dim=1), log_variance.split(1, dim=1), strict=True)
    bits = [gaussian_rate(*pair, covariance="diagonal") for pair in pairs]
    return {"channels": mean.shape[1], "size": mean.shape[2], "gaussian_bits": sum(bits), "gaussian_bits_by_channel": bits}


def bits_an_image(prior: Prior, family: PriorFamily, chosen: dict, history: list[dict]) -> float:
    """Held-out code length of an image's latent under the delivered prior."""
    rows = [row for row in history if row["split"] != "train" and family.bits_key in row]
    row = chosen if family.bits_key in chosen else rows[-1]
    return row[family.bits_key] * (family.tokens_per_image(prior) or 1)


def other_priors(config: Config, prior: Prior, validations: list[dict]) -> Iterator[tuple[dict, Prior]]:
    """The prior as it was at each checkpoint that was kept, with the validation of that step."""
    checkpoints = Run(config, "prior").checkpoints
    for path in checkpoints.all():
        try:
            checkpoint = checkpoints.load(str(path))
        except (ValueError, FileNotFoundError) as error:
            print(f"left out of the table of guidance: {error}")
            continue
        for row in validations:
            if row["step"] == checkpoint.state["step"]:
                other = type(prior).from_config(prior.to_config()).to(next(prior.parameters()).device).eval()
                other.load_state_dict(checkpoint.tensors["ema" if config.prior.use_ema else "model"])
                yield row, other


def show(metrics: dict) -> None:
    generation, floor, extractor = metrics["generation"], metrics["floor"], metrics["extractor"]
    rows = [
        ("Frechet distance to held-out", f"{generation['frechet']:.2f}", f"training images: {floor['frechet']:.2f}"),
        ("  as a ratio", f"{generation['frechet_ratio']:.2f}", "1 is as near as the training images"),
        (
            "kernel distance to held-out",
            f"{generation['kernel_distance']:.3g}",
            f"± {generation['kernel_distance_std']:.2g} over {generation['kernel_subsets']} subsets of "
            f"{generation['kernel_subset_size']:,}; training images: {floor['kernel_distance']:.3g}",
        ),
        ("near-copies of training images", f"{generation['memorised']:.1%}", f"held-out: {generation['memorised_heldout']:.1%}"),
    ]
    prior = metrics["prior"]
    what, unit = ("held-out bits per token", "token") if prior["family"] == "ar" else ("held-out bits per image", "image")
    rows.append((what, f"{prior[f'heldout_bits_per_{unit}']:.3f}", f"step {prior['step']}"))
    if generation["recognised"] is not None:
        yardstick = f"held-out images: {extractor['heldout_accuracy']:.1%}"
        rows.insert(0, ("samples recognised as their class", f"{generation['recognised']:.1%}", yardstick))
    for name, values in metrics["reconstruction"].items():
        rows.append((f"PSNR, {name} ({values['decoder']})", f"{values['psnr']:.2f} dB", f"SSIM {values['ssim']:.3f}"))
    for what, value, yardstick in rows:
        print(f"{what:<36}{value:>10}   ({yardstick})")


if __name__ == "__main__":
    main(evaluate, __doc__)
