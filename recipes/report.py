"""Write the page of a run: what was trained, how good it is, what its samples look like, and whether they are copies.

    python recipes/report.py --config recipes/configs/digits.yaml

Reads what recipes/train_dae.py, train_prior.py, sample.py and evaluate.py wrote to <output_dir>; measures nothing.
Writes <output_dir>/report.html, one file without scripts or network requests, for any browser or to send by mail, and
report.png: held-out images beside samples.
"""

from __future__ import annotations

from pathlib import Path

from dae.cli import main
from dae.config import Config
from dae.data.pictures import write_png
from dae.files import announce
from dae.lock import writes
from dae.reporting.record import Record
from dae.reporting.run import run_page, samples_beside_originals


@writes("report")
def report(config: Config) -> Path:
    """Write page and picture; returns the page's path. FileNotFoundError: the run has no samples or no metrics.json yet."""
    run, folder = Record.load(config), Path(config.output_dir)
    path, names = run_page(run).write(folder / "report.html"), ["report.html"]
    if "originals" in run.pictures:
        write_png(folder / "report.png", samples_beside_originals(run))
        names.append("report.png")
    announce(folder, names, f"/{path.name} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


if __name__ == "__main__":
    main(report, __doc__)
