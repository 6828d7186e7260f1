"""Does decoupling help, and at equal rate too? Six comparisons, two data sets by three carriers, and docs/evidence.md from them.

    make evidence                                                   # docs/evidence.md, the pages behind it in runs/evidence
    python recipes/evidence.py --output runs/mine --docs runs/mine/docs 'compare.seeds=[10,11,12,13,14]' compare.tuning_seed=2000

Each comparison is recipes/compare.py with recipes/configs/evidence-<data>.yaml and the carrier's keys below; key=value on the
command line changes all of them alike. Finished trials are kept: the same command goes on where it was stopped. The document is
written from the comparisons' results alone, sentences included: other seeds, other sentences.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dae.comparison.results import BY_KEY, adjustment, in_short, markdown, pool, pooled_markdown, pooled_predictors, signed

RECIPES = Path(__file__).resolve().parent
DATA = {
    "digits": "scikit-learn's digits, 8x8, grey, 10 classes",
    "photos": "crops of the photographs inside the scikit-learn and scikit-image wheels, 8x8, colour, no labels",
}
KL = ("autoencoder.bottleneck=kl", "autoencoder.latent_channels=4")
DIT = (*KL, "prior.family=dit", "prior.learning_rate=2e-2", "prior.train_batch_size=64", "prior.dropout=0")
GAN = (*KL, "prior.family=mixture", "compare.prior_widths=[4]", "stage2.loss.adversarial=0.1")
GAN = (*GAN, "stage2.loss.discriminator_channels=16", "stage2.loss.discriminator_layers=1")
SMALL = "autoencoder.channel_multipliers=[1,2,2]"
CARRIERS = {
    "vq": ("VQ + autoregressive Transformer", {"digits": (), "photos": ()}),
    "kl": (
        "KL + Diffusion Transformer (flow matching)",
        {
            "digits": (*DIT, "autoencoder.kl.kl_weight=1e-3", "compare.rates=[3e-4,3e-3]"),
            "photos": (*DIT, "autoencoder.kl.kl_weight=3e-4", "compare.rates=[1e-4,1e-3]"),
        },
    ),
    "gan": (
        "GAN on a data-dependent latent + Gaussian mixture",
        {
            "digits": (*GAN, SMALL, "autoencoder.kl.kl_weight=3e-4", "compare.rates=[1e-4,1e-3]"),
            "photos": (*GAN, SMALL, "autoencoder.kl.kl_weight=1e-4", "compare.rates=[3e-5,3e-4]"),
        },
    ),
}


def evidence(output: Path, docs: Path, overrides: list[str]) -> Path:
    """Run what is not finished, and write the document; returns its path."""
    started, summaries = time.monotonic(), {}
    (docs / "evidence").mkdir(parents=True, exist_ok=True)
    for data in DATA:
        for carrier, (title, keys) in CARRIERS.items():
            name, folder = f"{data}-{carrier}", output / f"{data}-{carrier}"
            print(f"--- {title} on {data}", flush=True)
            command = [
                sys.executable,
                str(RECIPES / "compare.py"),
                "--config",
                str(RECIPES / "configs" / f"evidence-{data}.yaml"),
            ]
            subprocess.run([*command, *keys[data], *overrides, f"output_dir={folder}"], check=True)
            summaries[name] = json.loads((folder / "compare.json").read_text())
            shutil.copyfile(folder / "compare.png", docs / "evidence" / f"{name}.png")
    path = docs / "evidence.md"
    path.write_text(document(summaries, overrides))
    print(f"saved {path} in {(time.monotonic() - started) / 60:.1f} min")
    return path


def document(summaries: dict[str, dict], overrides: list[str]) -> str:
    """docs/evidence.md, from the results alone."""
    first, pooled = next(iter(summaries.values())), pool(summaries)
    seeds, trials = first["seeds"], sum(s["trials"]["finished"] for s in summaries.values())
    command = " ".join(["python recipes/evidence.py", *(f"'{o}'" for o in overrides)]) if overrides else "make evidence"
    core_hours = sum(s["seconds"] for s in summaries.values()) / 3600
    versions = ", ".join(f"{name} {version}" for name, version in first["facts"]["versions"].items())
    lines = [
        "# Does decoupling help, and at equal rate too?",
        "",
        f"Written by `{command}` from {trials} trials of small models ({core_hours:.1f} core hours on CPUs; {versions}).",
        "The method is that of Hu et al. 2023 as publicly described; hyper-parameters and numbers are ours. What small models on",
        "small images show need not hold for large ones.",
        "",
        f"In every comparison {len(first['arms'])} ways to train the encoder (*arms*) were trained with the seeds",
        f"{', '.join(map(str, seeds))}: equal numbers of steps, equal decoder, prior, sampling and codebook size or KL weight.",
        tuned(first),
        "*Generation distance* is the Frechet distance of samples to held-out images in features of a small classifier trained",
        "on the training images (not Inception); less is better. *Rate* is the information in the latent, in bits an image;",
        "*bits* is what the trained prior needs for the latent of a held-out image. Intervals are Student's, over seeds, of",
        "differences between arms with the same seed. *At equal rate*: the arm against the baseline's distance at that rate,",
        "read between baselines trained at several rates, never beyond them.",
        "",
        "## The answer",
        "",
        *answers(pooled, first["baseline"]),
        "",
        pooled_markdown(pooled).rstrip(),
        "",
        "The ratio is the geometric mean over the comparisons of the arm's distance to the baseline's, with its interval over",
        "them; below 1 is better. The comparisons share seeds, code and two data sets: they are not independent evidence.",
        "",
        "## What the decoupled latents cost and save",
        "",
        *costs(summaries),
        "",
        "## Which number predicts generation best?",
        "",
        "Rank correlation (Spearman) with the generation distance over all trials of a comparison, averaged over the comparisons",
        "with Student's interval (cut at -1 and 1). Near 1 or -1 is a good predictor; the sign is the direction. Each",
        "comparison's own intervals, which resample the seeds, are on its page.",
        "",
        "| predictor | mean rank correlation | comparisons |",
        "|---|---|---|",
        *(f"| {row['name']} | {correlation(row)} | {row['n']} |" for row in pooled_predictors(summaries)),
        "",
    ]
    for name, summary in summaries.items():
        lines += section(name, summary)
    lines += [
        "## What these numbers do not say",
        "",
        "- The images are tiny, the models have tens of thousands of parameters and train for seconds.",
        "- Distances are taken in features of one classifier a data set; another one could rank close arms differently.",
        "- Learning rates are tuned by one seed over a short list; nothing else is tuned, for any arm.",
        "- A frontier of a few rates is interpolated linearly; seeds whose rate lies outside it are left out of that column.",
        "- Many intervals are shown: of twenty that hold nothing, one excludes zero by chance. Columns of p are adjusted (Holm).",
        "",
    ]
    return "\n".join(lines)


def tuned(summary: dict) -> str:
    if not summary["tuning"]:
        return "No arm was tuned: all trained with one learning rate."
    return (
        f"Each arm, the baseline *{summary['baseline']}* too, was first tuned over the same learning rates, with another seed "
        "and on training images set aside."
    )


OUTCOMES = ("better", "worse", "no difference shown", "not known")


def answers(pooled: dict, baseline: str) -> list[str]:
    """The two questions, answered by counting intervals, then each decoupled arm."""
    lines = []
    for title, key in (("equal steps", "equal_steps"), ("equal rate", "equal_rate")):
        arms = {name: row for name, row in pooled[key].items() if name.startswith("dae")}
        if not arms:
            lines += [f"**At {title}** nothing can be said: no arm was trained for it.", ""]
            continue
        counts = {word: sum(row[word] for row in arms.values()) for word in OUTCOMES}
        total, (better, worse, same, unknown) = sum(counts.values()), counts.values()
        lines.append(
            f"**Does decoupling help at {title}?** Of {total} pairs of a decoupled arm and a comparison, the decoupled arm's "
            f"samples were nearer to the held-out images than {baseline}'s in {better}, farther in {worse}, and in {same} no "
            "difference was shown" + (f"; {unknown} could not be judged." if unknown else ".")
        )
        lines += ["", *(f"- {name}: {over_all(row)}" for name, row in arms.items()), ""]
    return lines[:-1]


def over_all(row: dict) -> str:
    """One arm over all comparisons, in words."""
    ratio, counts = row["ratio"], ", ".join(f"{word} {row[word]}" for word in OUTCOMES if row[word])
    if ratio is None or ratio["low"] is None:
        return f"{counts}; too few comparisons for a mean."
    word = "nearer" if ratio["high"] < 1 else "farther" if ratio["low"] > 1 else "neither nearer nor farther by this evidence"
    ends = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{counts}; over the comparisons {word} ({ratio['mean']:.2f} times the distance, {ends})."


def costs(summaries: dict[str, dict]) -> list[str]:
    """Bits under the prior, rate and PSNR: arm minus baseline, in how many comparisons each way."""
    baseline, table = next(iter(summaries.values()))["baseline"], []
    arms = dict.fromkeys(arm for s in summaries.values() for arm in s["differences"]["frechet"])
    for arm in arms:
        cells = []
        for key in ("rate_bits", "bits", "psnr", "copies"):
            rows = [s["differences"][key][arm] for s in summaries.values() if arm in s["differences"][key]]
            ways = [0 if row["low"] is None else row["verdict"] for row in rows]
            factor, digits = (100, 2) if key == "copies" else (1, 1)
            means = [factor * row["mean"] for row in rows]
            cells.append(
                f"{ways.count(1)} higher, {ways.count(-1)} lower, {ways.count(0)} neither "
                f"({signed(min(means), digits)} to {signed(max(means), digits)})"
            )
        table.append(f"| {arm} | {' | '.join(cells)} |")
    return [
        f"Each arm minus *{baseline}* at equal steps: in how many comparisons its interval lies above or below zero, and the",
        "range of the mean differences.",
        "",
        "| arm | rate, bits | bits under the prior | PSNR, dB | near-copies, percentage points |",
        "|---|---|---|---|---|",
        *table,
    ]


def correlation(row: dict) -> str:
    ends = "" if row["low"] is None else f" [{max(row['low'], -1):.2f}, {min(row['high'], 1):.2f}]"
    return f"{row['mean']:.2f}{ends}"


def section(name: str, summary: dict) -> list[str]:
    data, carrier = name.split("-")
    equal = summary["equal_rate"]
    words = []
    for title, rows in (("equal steps", summary["differences"]["frechet"]), ("equal rate", equal and equal["frechet"])):
        if rows:
            words += [f"At {title}: {in_short(summary, rows)} {adjustment(summary, rows)}".rstrip(), ""]
    return [
        f"## {CARRIERS[carrier][0]} on {data}",
        "",
        f"{DATA[data]}; {summary['facts']['counts']['train']:,} training and {summary['facts']['counts']['heldout']:,} held-out "
        "images.",
        "",
        *words,
        markdown(summary).rstrip(),
        "",
        f"![Differences and frontiers](evidence/{name}.png)",
        "",
        *prior_sizes(summary),
    ]


def prior_sizes(summary: dict) -> list[str]:
    """Distance and bits by the size of the prior, for every arm."""
    rows = summary["prior_sizes"]
    if not rows:
        return []
    sizes = sorted({row["size"] for row in rows})
    parameters = {row["size"]: row["parameters"] for row in rows}
    cells = {(row["arm"], row["size"]): row for row in rows}
    header = [f"{BY_KEY[key].name}, {parameters[size]:,} parameters" for key in ("frechet", "bits") for size in sizes]
    lines = [f"| arm | {' | '.join(header)} |", "|" + "---|" * (len(header) + 1)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [cells.get((arm, size), {}).get(key) for key in ("frechet", "bits") for size in sizes]
        lines.append(f"| {arm} | {' | '.join('–' if row is None else format(row['mean'], '.2f') for row in found)} |")
    return ["By the size of the prior:", "", *lines, ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where evidence.md goes (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every comparison, for example compare.seeds=[5,6]")
    arguments = parser.parse_args()
    try:
        evidence(arguments.output, arguments.docs, arguments.overrides)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
