"""Which latent needs the simplest generator? Measures the generator-induced distance D^G of latents and writes a page.

    python recipes/measure_latent.py --config recipes/configs/digits.yaml \\
        'measure.latents=[gaussian,pca,autoencoder:runs/digits/autoencoder,my_module:encode]'

For each latent, generators of increasing capacity are trained to produce the training images from it, and the remaining
distance is measured on held-out rows. A CPU suffices. Writes <output_dir>/measure/latents.html, latents.json and *.png.
"""

from __future__ import annotations

import json
from pathlib import Path

from dae.cli import main
from dae.complexity.measurement import FAMILIES, Measurement, measure_latents
from dae.config import Config
from dae.files import announce, replaced_folder, write_file
from dae.lock import writes
from dae.reporting.elements import duration, per_row
from dae.reporting.latents import DISTANCES, write_latents_page


@writes("measure", makes_folder=True)
def measure_latent(config: Config) -> Path:
    """Measure the latents and write the page; returns its path."""
    measured = measure_latents(config, columns=per_row(config.data.resolution))
    folder = Path(config.output_dir) / "measure"
    with replaced_folder(folder) as new:
        write_file(new / "latents.json", json.dumps(measured.to_dict(), indent=2).encode())
        pictures = write_latents_page(measured, new)
    show(measured)
    names = ["latents.html", "latents.json", *pictures]
    announce(folder, names, f"/latents.html after {duration(measured.seconds)}")
    return folder / "latents.html"


def show(measured: Measurement) -> None:
    if len(measured.config.measure.seeds) == 1:
        print("one seed tells no spread: how sure these numbers are is not known (measure.seeds)")
    for (distance, name, latent), curve in measured.curves.items():
        values = ", ".join(f"{c:g}: {e}" for c, e in zip(curve.capacities, curve.estimates, strict=True))
        print(f"{DISTANCES[distance][0]}, {latent}, {FAMILIES[name].knob} of {FAMILIES[name].name}\n    {values}")
    for distance, marks in measured.baselines.items():
        print(f"{DISTANCES[distance][0]}, " + ", ".join(f"{name}: {estimate.value:.4g}" for name, estimate in marks.items()))


if __name__ == "__main__":
    main(measure_latent, __doc__)
