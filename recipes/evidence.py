"""Does decoupling help, and at equal rate too? Six comparisons on two data sets and three latent types; writes docs/evidence.md.

    make evidence                                                   # docs/evidence.md, the pages behind it in runs/evidence
    python recipes/evidence.py --output runs/mine --docs runs/mine/docs 'compare.seeds=[10,11,12,13,14]' compare.tuning_seed=2000

Each comparison is recipes/compare.py with recipes/configs/evidence-<data>.yaml and its overrides in dae.comparison.experiments;
key=value on the command line changes all of them. Finished trials are kept: the same command resumes a stopped run.
The document, sentences included, is generated from the comparisons' results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dae.comparison.experiments import EXPERIMENTS
from dae.reporting.evidence import evidence_document

RECIPES = Path(__file__).resolve().parent


def evidence(output: Path, docs: Path, overrides: list[str], only: list[str] | None = None) -> Path:
    """Run the unfinished trials of all comparisons, or of those in `only`, and write the document; returns its path.

    Raises:
        ValueError: `only` names no comparison of this recipe.
    """
    started, summaries = time.monotonic(), {}
    if unknown := [name for name in only or [] if name not in EXPERIMENTS]:
        raise ValueError(f"--only: no comparison {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    (docs / "evidence").mkdir(parents=True, exist_ok=True)
    for name, experiment in EXPERIMENTS.items():
        if only and name not in only:
            continue
        print(f"--- {experiment.title} on {experiment.data}", flush=True)
        folder, config = output / name, RECIPES / "configs" / f"evidence-{experiment.data}.yaml"
        command = [sys.executable, str(RECIPES / "compare.py"), "--config", str(config), *experiment.overrides, *overrides]
        subprocess.run([*command, f"output_dir={folder}"], check=True)
        summaries[name] = json.loads((folder / "compare.json").read_text())
        shutil.copyfile(folder / "compare.png", docs / "evidence" / f"{name}.png")
    path, command = docs / "evidence.md", ["python recipes/evidence.py", *(f"'{override}'" for override in overrides)]
    path.write_text(evidence_document(summaries, " ".join(command) if overrides else "make evidence"))
    print(f"saved {path} in {(time.monotonic() - started) / 60:.1f} min")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where evidence.md goes (default: %(default)s)")
    parser.add_argument("--only", type=lambda names: names.split(","), help="some comparisons, for example digits-vq,photos-vq")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every comparison, for example compare.seeds=[5,6]")
    arguments = parser.parse_args()
    try:
        evidence(arguments.output, arguments.docs, arguments.overrides, arguments.only)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except ValueError as error:
        parser.error(str(error))
