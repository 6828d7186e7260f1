"""Encode a data set with a trained autoencoder: caches the tokens (VQ) or posteriors (KL) that train the prior.

    accelerate launch recipes/encode.py --config recipes/configs/digits.yaml
    accelerate launch recipes/encode.py --config recipes/configs/digits-kl.yaml

Each image is encoded once unchanged, and `prior.num_augmentations` times augmented (`prior.augment_images`), with codes sampled
near the encoder's output instead of the nearest ones (`prior.code_temperature`, of vq, vq_gradient and simvq), or both.
Several processes share the work. Writes <output_dir>/tokens, or <output_dir>/latents with mean and log-variance of each
posterior; both with fingerprints of autoencoder, data set and augmentation.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from dae.cli import main
from dae.config import Config
from dae.data import evaluation_batches, load_data
from dae.data.cache import Fingerprint, transform_fingerprint
from dae.distributed import agree, as_single_process, failing_together, gather_objects, run_on_first_process
from dae.files import announce
from dae.hub import require_model
from dae.lock import writes
from dae.models import Autoencoder, choose_kernels
from dae.models.latent import identities
from dae.seeding import seed_for
from dae.training import end_training, make_accelerator
from dae.training.encodings import build_cache, cache_class, encode_views
from dae.training.run import refuse_other_data


@writes("encodings")
@torch.inference_mode()
def encode(config: Config) -> Path:
    """Write the cache; returns its folder."""
    accelerator = make_accelerator(config)
    output = Path(config.output_dir)
    with failing_together():
        data = load_data(config.data, config.seed)
        trained = require_model(output / "autoencoder", "train_dae")
        refuse_other_data(trained, config.data, data.fingerprint)
        autoencoder = Autoencoder.from_pretrained(trained, device=accelerator.device)
    agree({"the fingerprint of the data": data.fingerprint})
    choose_kernels(autoencoder, config.kernels)
    autoencoder.refuse_other_data(config.data.channels, config.data.resolution)
    if (trained_with := autoencoder.config.bottleneck) != config.autoencoder.bottleneck:
        raise ValueError(
            f"autoencoder.bottleneck={config.autoencoder.bottleneck} is asked for, the autoencoder in {trained} was trained with "
            f"{trained_with}: use the configuration that it was trained with"
        )
    kind = cache_class(autoencoder.bottleneck)
    if not autoencoder.bottleneck.draws_codes and config.prior.num_augmentations and config.prior.code_temperature:
        accelerator.print(f"prior.code_temperature has no effect: autoencoder.bottleneck={trained_with} draws no codes")

    data.list_skipped(output)
    parts = {}
    for name, augmentations in {"train": config.prior.num_augmentations, "validation": 0}.items():
        mine: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        batches = evaluation_batches(getattr(data, name), config.evaluation.batch_size, num_workers=config.data.num_workers)
        bar = tqdm(desc=f"encode {name}", unit="image", disable=not accelerator.is_main_process, mininterval=1)
        with failing_together(), as_single_process():
            for number, batch in enumerate(batches):
                bar.update(len(batch["label"]))
                if number % accelerator.num_processes != accelerator.process_index:
                    continue
                torch.manual_seed(seed_for(config.seed, "encode", name, number))
                views = encode_views(autoencoder, batch["image"].to(accelerator.device), augmentations, config)
                mine.append((number, views.cpu(), batch["label"]))
        bar.close()
        rows = sorted(chain.from_iterable(gather_objects(mine)), key=lambda row: row[0])
        parts[name] = kind.dataset(torch.cat([row[1] for row in rows]), torch.cat([row[2] for row in rows]))

    folder = output / kind.folder

    def save() -> None:
        made_of = Fingerprint(identities(trained)[0], data.fingerprint, transform_fingerprint(config))
        cache = build_cache(autoencoder, parts["train"], parts["validation"], data.num_classes, made_of)
        cache.save(folder)
        note = f": {len(cache.train)} training and {len(cache.validation)} held-out images{data.skipped_note()}"
        announce(folder, cache.files(), note)

    run_on_first_process(save)
    end_training(accelerator)
    return folder


if __name__ == "__main__":
    main(encode, __doc__)
