"""Sample images: class -> prior -> tokens or latent -> decoder.

    python recipes/sample.py --config recipes/configs/digits.yaml
    python recipes/sample.py --config recipes/configs/digits.yaml sampling.cfg_scale=2 sampling.num_samples=100

Classes in equal parts; a Gaussian mixture knows none, and all labels are 0. Writes <output_dir>/samples: samples.npz with arr_0
[N, H, W, C] uint8 (the format of the ADM evaluator) and arr_1 [N] labels, png/ with one file an image, grid.png with one row a
class, and sampling.json with the settings.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dae.cli import main
from dae.config import Config
from dae.data.pictures import grid, to_uint8, write_png
from dae.hub import fingerprint
from dae.lock import writes
from dae.sampling import balanced_labels, generate, load_chain
from dae.sampling.chain import knows_classes
from dae.training import one_process
from dae.training.loop import seed_for


@writes("samples")
def sample(config: Config) -> Path:
    """Write samples; returns their folder."""
    settings = config.sampling
    autoencoder, prior = load_chain(config.output_dir, one_process(config), config.kernels)
    classes = prior.num_classes if knows_classes(prior) else 1
    labels_N = balanced_labels(settings.num_samples, classes)
    started, images = time.monotonic(), []
    with tqdm(total=len(labels_N), desc="sample", unit="image", mininterval=0.5) as bar:
        for batch in generate(autoencoder, prior, labels_N, settings, seed_for(config.seed, "sampling")):
            images.append(to_uint8(batch))
            bar.update(len(batch))
    seconds = time.monotonic() - started

    folder = Path(config.output_dir) / "samples"
    (folder / "png").mkdir(parents=True, exist_ok=True)
    arrays = np.concatenate(images)
    (folder / "sampling.json").unlink(missing_ok=True)  # written last: without it there are no samples
    for old in (folder / "png").glob("*.png"):
        old.unlink()
    np.savez(folder / "samples.npz", arr_0=arrays, arr_1=labels_N.numpy())
    for number, (array, label) in enumerate(zip(arrays, labels_N.tolist(), strict=True)):
        write_png(folder / "png" / f"{number:06d}_class{label}.png", array)
    rows = min(classes, 20)
    by_class = np.concatenate([arrays[labels_N == c][:16] for c in range(rows)]) if classes > 1 else arrays[:160]
    write_png(folder / "grid.png", grid(by_class, columns=min(16, max(1, int((labels_N == 0).sum())))))
    facts = {"seconds": seconds, "prior": fingerprint(Path(config.output_dir) / "prior"), "seed": config.seed}
    (folder / "sampling.json").write_text(json.dumps(dataclasses.asdict(settings) | facts, indent=2))
    print(f"saved {folder}: {len(arrays)} images in {seconds:.1f} s")
    return folder


if __name__ == "__main__":
    main(sample, __doc__)
