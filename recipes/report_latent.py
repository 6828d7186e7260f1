"""Write the report card of a latent: how well a generative model is expected to do on it, before one is trained.

    python recipes/report_latent.py --config recipes/configs/digits.yaml
    python recipes/report_latent.py --config recipes/configs/digits.yaml measure.compare_folders=[runs/compare]

Reads <output_dir>/autoencoder and the data set; with finished comparisons (recipes/compare.py) it reports how well each line of
the card ranked their latents. Writes <output_dir>/latent/: card.json, card.html (one file without scripts or network requests)
and the pictures as PNG. Runs on a CPU in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from dae.cli import main
from dae.config import Config
from dae.diagnostics.latent_report import measure_card, to_dict
from dae.diagnostics.ranking import rank_comparisons
from dae.files import announce, replaced_folder, write_file
from dae.hub import require_model
from dae.lock import writes
from dae.reporting.elements import duration
from dae.reporting.latent_card import write_card_page
from dae.reporting.record import trained_configuration


@writes("latent")
def report_latent(config: Config) -> Path:
    """Measure, write card.json and card.html, return the folder.

    Raises:
        FileNotFoundError: the run has no trained autoencoder, or a folder of `measure.compare_folders` holds no trials.
        ValueError: the autoencoder was trained on other data, there are too few images, or a trial's file is damaged or is of
            other data or another bottleneck than the autoencoder.
        FloatingPointError: the autoencoder gives NaN.
    """
    require_model(Path(config.output_dir) / "autoencoder", "train_dae")
    trained = trained_configuration(config)
    rankings = rank_comparisons(config, trained)
    run = measure_card(config, trained.method)
    folder = Path(config.output_dir) / "latent"
    with replaced_folder(folder) as new:
        write_file(new / "card.json", json.dumps(to_dict(run, rankings), indent=2).encode())
        write_card_page(run, rankings, new)
        names = [path.name for path in new.iterdir()]
    size = (folder / "card.html").stat().st_size / 1e6
    announce(folder, names, f"/card.html ({size:.1f} MB), measured in {duration(run.seconds)}")
    return folder


if __name__ == "__main__":
    main(report_latent, __doc__)
