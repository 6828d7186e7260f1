"""Evaluate a run: reconstructions of both decoders, the latent, the prior, the samples, and copies of training images.

    python recipes/evaluate.py --config recipes/configs/digits.yaml

Frechet distance, kernel distance (KID's formula) and precision/recall are taken in features of a small classifier that is
trained here on the training split (on unlabelled data, to predict by how many quarter turns an image was rotated). They compare
runs on one data set; they are not Inception numbers. Writes <output_dir>/metrics.json and <output_dir>/evaluation/.
"""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

import torch

from dae.cli import main
from dae.config import Config
from dae.data import in_memory, load_data
from dae.data.pictures import to_uint8, write_npz
from dae.evaluation import Judge, describe_latent, reconstruct, train_extractor
from dae.evaluation.finished import PriorLog, guidance_sweep, load_samples, require_memory_for_judging
from dae.files import announce, replaced_folder, write_file
from dae.lock import writes
from dae.metrics import as_float, extract_features, versions
from dae.models import Autoencoder
from dae.priors import family_of
from dae.reporting.measures import measurements
from dae.sampling import load_chain
from dae.sampling.chain import knows_classes
from dae.training import one_process
from dae.training.rehearsal import require_measurable
from dae.training.run import refuse_other_data


@writes("evaluation")
def evaluate(config: Config) -> dict:
    """Measure, write and return metrics.json."""
    started, device, output, seed = time.monotonic(), one_process(config), Path(config.output_dir), config.seed
    autoencoder, prior = load_chain(output, device, config.kernels)
    samples, labels, sampling = load_samples(output)
    if knows_classes(prior):
        for cfg_scale in config.evaluation.cfg_scales:
            prior.check_guidance(cfg_scale)
    family = family_of(prior)
    history = PriorLog.load(config, family)
    data = load_data(config.data, seed)
    refuse_other_data(output / "autoencoder", config.data, data.fingerprint)
    autoencoder.refuse_other_data(config.data.channels, config.data.resolution)
    data.list_skipped(output)
    described, settings = data.describe(), config.evaluation
    counts = {"training_images": described["train"], "held_out_images": described["validation"], "samples": len(samples)}
    require_measurable(config, **counts)
    require_memory_for_judging(config, data, len(samples))

    options = {"batch_size": settings.batch_size, "num_workers": config.data.num_workers, "as_bytes": True}
    (train, train_labels), (heldout, heldout_labels) = (
        in_memory(part, settings.max_images, seed=seed, **options) for part in (data.train, data.validation)
    )
    classifier = train_extractor(train, train_labels, data, steps=settings.classifier_steps, seed=seed, device=device)
    judge = Judge(classifier, train, train_labels, heldout, heldout_labels, data.labelled, settings.neighbours, seed)

    shown = (torch.arange(min(32, len(heldout))) * len(heldout)) // min(32, len(heldout))  # spread over the classes
    pictures, reconstruction = {"originals": to_uint8(as_float(heldout[shown]))}, {}
    stages = {"final": autoencoder}
    if (at_the_switch := output / "autoencoder" / "stage1").is_dir():
        stages = {"stage 1": Autoencoder.from_pretrained(at_the_switch, device=device)} | stages
    for name, model in stages.items():
        measured = reconstruct(model, classifier, heldout, shown, settings.batch_size)
        pictures[name] = to_uint8(measured["rebuilt"])
        means = {key: measured[key].mean().item() for key in ("psnr", "ssim")}
        reconstruction[name] = {"decoder": model.config.decoder.family} | means | judge.reconstructions(measured["found"])

    generated = torch.from_numpy(samples).permute(0, 3, 1, 2)  # 8 bits
    found, copies = extract_features(classifier, generated), judge.near_copies(generated)
    asked = torch.from_numpy(labels) if knows_classes(prior) else None
    generation = judge.samples(generated, asked, found, copies) | judge.kernel(found)
    closest = copies.nearest_distance.argsort()[:16]  # the worst cases, not a favourable selection
    pictures["samples"] = samples[closest.numpy()]
    pictures["nearest training images"] = to_uint8(as_float(train[copies.nearest_index[closest]]))
    sweep = guidance_sweep(config, judge, autoencoder, prior, history, min(len(samples), settings.max_images))

    floor = {"meaning": "training against held-out images, the Frechet distance at equal counts"}
    floor |= {"frechet": judge.floor.mean, "frechet_std": judge.floor.std} | judge.kernel(judge.train_features)
    note = f"{data.title} features, not Inception"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    metrics = {
        "reconstruction": reconstruction,
        **describe_latent(autoencoder, measured),
        "prior": {
            "family": family.name,
            f"heldout_{family.criterion}": history.chosen[family.criterion],
            "heldout_bits_per_image": history.bits_per_image(prior),
            "step": history.chosen["step"],
            "tokens_an_image": family.tokens_per_image(prior),
        },
        "generation": generation,
        "floor": floor,
        "guidance_sweep": sweep,
        "extractor": {"id": classifier.identifier, "note": note, "heldout_accuracy": judge.accuracy},
        "data": described,
        "counts": {"train": len(train), "heldout": len(heldout), "samples": len(samples), "frechet": judge.count},
        "sampling": sampling,
        "method": config.method,
        "seed": seed,
        "versions": versions(),
        "measured": {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "device": machine},
        "seconds": time.monotonic() - started,
    }
    with replaced_folder(output / "evaluation") as new:
        classifier.save(new / "classifier.safetensors")
        write_npz(new / "pictures.npz", **pictures)
        write_file(output / "metrics.json", json.dumps(metrics, indent=2).encode())
    for name, value, meaning in measurements(metrics):
        print(f"{name:<42}{value:>16}   {meaning}")
    decoders = ", ".join(f"{name}: {found['decoder']} decoder" for name, found in reconstruction.items())
    print(f"{decoders}; prior of step {history.chosen['step']:,}")
    announce(output, ["metrics.json", "evaluation/classifier.safetensors", "evaluation/pictures.npz"], "/metrics.json")
    return metrics


if __name__ == "__main__":
    main(evaluate, __doc__)
