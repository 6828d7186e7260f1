"""Write the page of a run: what was trained, how good it is, what its samples look like, and whether they are copies.

    python recipes/report.py --config recipes/configs/digits.yaml

Reads what recipes/train_dae.py, train_prior.py, sample.py and evaluate.py left in <output_dir>; measures nothing anew.
Writes <output_dir>/report.html: one file without scripts and without requests, to open in any browser or to send by mail.
"""

from __future__ import annotations

from pathlib import Path

from dae.cli import main
from dae.config import Config
from dae.files import announce
from dae.lock import writes
from dae.reporting.record import Record
from dae.reporting.run import run_page


@writes("report")
def report(config: Config) -> Path:
    """Write the page; returns its path. FileNotFoundError: the run has no samples or no metrics.json yet."""
    path = run_page(Record.load(config)).write(Path(config.output_dir) / "report.html")
    announce(path.parent, [path.name], f"/{path.name} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


if __name__ == "__main__":
    main(report, __doc__)
