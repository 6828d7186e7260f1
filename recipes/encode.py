"""Encode a data set with a trained VQ autoencoder: the token cache that the prior is trained on.

    accelerate launch recipes/encode.py --config recipes/configs/digits.yaml

Each image is encoded once as it is, and `prior.augmented_copies` times otherwise: augmented (`prior.augment_images`), with codes
drawn near the encoder's output rather than the nearest ones (`prior.code_temperature`), or both.
Several processes share the work. Writes <output_dir>/tokens with fingerprints of tokenizer, data set and augmentation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from dae.cli import main
from dae.config import Config
from dae.data import augment, evaluation_batches, load_data
from dae.data.tokens import Fingerprint, TokenCache, TokenDataset, transform_fingerprint
from dae.distributed import each_for_itself
from dae.hub import fingerprint, require_model
from dae.models import Autoencoder, choose_kernels
from dae.training import make_accelerator
from dae.training.loop import seed_for


@torch.inference_mode()
def encode(config: Config) -> Path:
    """Make the token cache; returns its folder."""
    accelerator = make_accelerator(config)
    output = Path(config.output_dir)
    data = load_data(config.data, config.seed)
    trained = require_model(output / "autoencoder", "train_dae")
    autoencoder = Autoencoder.from_pretrained(trained, device=accelerator.device)
    choose_kernels(autoencoder, config.kernels)
    autoencoder.refuse_other_data(config.data.channels, config.data.resolution)
    if autoencoder.config.bottleneck != "vq":
        raise ValueError("an autoregressive prior models tokens: train the autoencoder with autoencoder.bottleneck=vq")

    def further_tokens(images: torch.Tensor) -> torch.Tensor:
        """Another encoding of the same images: augmented, with codes drawn rather than the nearest, or both."""
        if config.prior.augment_images:
            images = augment(images, random_flip=config.data.random_flip, random_affine=config.data.random_affine)
        encoding = autoencoder.encode(images)
        if config.prior.code_temperature == 0:
            return encoding.indices
        return autoencoder.bottleneck.sample_indices(encoding.features, config.prior.code_temperature)

    parts = {}
    for name, copies in {"train": config.prior.augmented_copies, "validation": 0}.items():
        mine: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        batches = evaluation_batches(getattr(data, name), config.evaluation.batch_size, num_workers=config.data.num_workers)
        bar = tqdm(desc=f"encode {name}", unit="image", disable=not accelerator.is_main_process, mininterval=1)
        for number, batch in enumerate(batches):
            bar.update(len(batch["label"]))
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            torch.manual_seed(seed_for(config.seed, "encode", name, number))
            images = batch["image"].to(accelerator.device)
            with each_for_itself():
                views = [autoencoder.encode(images).indices] + [further_tokens(images) for _ in range(copies)]
            mine.append((number, torch.stack(views, dim=1).flatten(2).int().cpu(), batch["label"]))
        bar.close()
        rows = sorted(gather_object(mine), key=lambda row: row[0])
        parts[name] = TokenDataset(torch.cat([row[1] for row in rows]), torch.cat([row[2] for row in rows]))

    folder = output / "tokens"
    if accelerator.is_main_process:
        cache = TokenCache(
            **parts,
            vocab_size=autoencoder.config.vq.codebook_size,
            num_classes=data.num_classes,
            latent_size=autoencoder.latent_size,
            fingerprint=Fingerprint(fingerprint(trained), data.fingerprint, transform_fingerprint(config)),
        )
        cache.save(folder)
        print(f"saved {folder}: {len(cache.train)} training and {len(cache.validation)} held-out images")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


if __name__ == "__main__":
    main(encode, __doc__)
