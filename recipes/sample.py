"""Sample images: class -> prior -> tokens -> decoder.

    python recipes/sample.py --config recipes/configs/digits.yaml
    python recipes/sample.py --config recipes/configs/digits.yaml sampling.cfg_scale=2 sampling.num_samples=100

Classes in equal parts. Writes <output_dir>/samples: samples.npz with arr_0 [N, H, W, C] uint8 (the format of the ADM evaluator)
and arr_1 [N] labels, png/ with one file an image, grid.png with one row a class, and sampling.json with the settings.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from dae.config import Config, config_from_command_line
from dae.data.pictures import grid, to_uint8, write_png
from dae.hub import fingerprint
from dae.models import ARPrior, Autoencoder
from dae.sampling import sample_tokens
from dae.training.loop import seed_for


def load_chain(config: Config, device: torch.device) -> tuple[Autoencoder, ARPrior]:
    """Both trained models; ValueError if the prior was trained on another tokenizer's tokens."""
    output = Path(config.output_dir)
    prior = ARPrior.from_pretrained(output / "prior", device=device)
    if prior.tokenizer != fingerprint(output / "autoencoder"):
        raise ValueError(
            f"{output / 'prior'} was trained on the tokens of another autoencoder than {output / 'autoencoder'}: "
            "encode the data again (recipes/encode.py) and train the prior again (recipes/train_prior.py)"
        )
    return Autoencoder.from_pretrained(output / "autoencoder", device=device), prior


@torch.inference_mode()
def sample(config: Config) -> Path:
    """Write samples; returns their folder."""
    device, settings = Accelerator().device, config.sampling
    autoencoder, prior = load_chain(config, device)
    labels_N = torch.arange(settings.num_samples) % prior.num_classes
    generator = torch.Generator(device).manual_seed(seed_for(config.seed, "sampling"))
    started, images = time.monotonic(), []
    for labels in tqdm(labels_N.split(settings.batch_size), desc="sample", unit_scale=settings.batch_size, mininterval=0.5):
        tokens = sample_tokens(
            prior,
            labels.to(device),
            cfg_scale=settings.cfg_scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            generator=generator,
        )
        images.append(to_uint8(autoencoder.decode_indices(tokens).sample))
    seconds = time.monotonic() - started

    folder = Path(config.output_dir) / "samples"
    (folder / "png").mkdir(parents=True, exist_ok=True)
    arrays = np.concatenate(images)
    np.savez(folder / "samples.npz", arr_0=arrays, arr_1=labels_N.numpy())
    for old in (folder / "png").glob("*.png"):
        old.unlink()
    for number, (array, label) in enumerate(zip(arrays, labels_N.tolist(), strict=True)):
        write_png(folder / "png" / f"{number:06d}_class{label}.png", array)
    rows = min(prior.num_classes, 20)
    by_class = np.concatenate([arrays[labels_N == c][:16] for c in range(rows)]) if prior.num_classes > 1 else arrays[:160]
    write_png(folder / "grid.png", grid(by_class, columns=min(16, max(1, int((labels_N == 0).sum())))))
    facts = {"seconds": seconds, "prior": fingerprint(Path(config.output_dir) / "prior"), "seed": config.seed}
    (folder / "sampling.json").write_text(json.dumps(dataclasses.asdict(settings) | facts, indent=2))
    print(f"saved {folder}: {len(arrays)} images in {seconds:.1f} s")
    return folder


if __name__ == "__main__":
    sample(config_from_command_line(__doc__))
