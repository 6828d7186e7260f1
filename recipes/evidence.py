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
from typing import Callable, Iterable

from dae.comparison.pooling import OUTCOMES, pool, pooled_markdown, pooled_predictors, ratio_in_figures
from dae.comparison.results import (
    BY_KEY,
    bits_mean,
    budgets,
    caveats,
    in_figures,
    in_short,
    line,
    markdown,
    rate_means,
    signed,
)

RECIPES = Path(__file__).resolve().parent
DATA = {
    "digits": "scikit-learn's digits, 8x8, grey, 10 classes",
    "photos": "crops of the photographs inside the scikit-learn and scikit-image wheels, 8x8, colour, no labels",
}
KL = ("autoencoder.bottleneck=kl", "autoencoder.latent_channels=4")
DIT = (*KL, "prior.family=dit", "prior.width=32", "prior.max_train_steps=240", "prior.train_batch_size=64", "prior.dropout=0")
DIT = (*DIT, "compare.prior_learning_rates=[1e-2,2e-2]")
GAN = (*KL, "prior.family=mixture", "compare.prior_widths=[4]", "stage2.loss.adversarial=0.1")
GAN = (*GAN, "stage2.loss.discriminator_channels=8", "stage2.loss.discriminator_layers=1")
SMALL = "autoencoder.channel_multipliers=[1,2,2]"
CARRIERS = {
    "vq": ("VQ + autoregressive Transformer", {"digits": (), "photos": ()}),
    "kl": (
        "KL + Diffusion Transformer (flow matching)",
        {
            "digits": (*DIT, "autoencoder.kl.kl_weight=1e-3", "compare.rates=[3e-4,3e-3]", "compare.other_rates=[3e-3]"),
            "photos": (*DIT, "autoencoder.kl.kl_weight=3e-4", "compare.rates=[1e-4,1e-3]", "compare.other_rates=[1e-3]"),
        },
    ),
    "gan": (
        "GAN on a data-dependent latent + Gaussian mixture",
        {
            "digits": (*GAN, SMALL, "autoencoder.kl.kl_weight=3e-4", "compare.rates=[1e-4,1e-3]", "compare.other_rates=[1e-3]"),
            "photos": (*GAN, SMALL, "autoencoder.kl.kl_weight=1e-4", "compare.rates=[3e-5,3e-4]", "compare.other_rates=[3e-4]"),
        },
    ),
}


def evidence(output: Path, docs: Path, overrides: list[str], only: list[str] | None = None) -> Path:
    """Run what is not finished of all comparisons, or `only` of some, and write the document; returns its path.

    Raises:
        ValueError: `only` names no comparison of this recipe.
    """
    started, summaries, names = time.monotonic(), {}, [f"{data}-{carrier}" for data in DATA for carrier in CARRIERS]
    if unknown := [name for name in only or [] if name not in names]:
        raise ValueError(f"--only: no comparison {unknown[0]!r}; there are {', '.join(names)}")
    (docs / "evidence").mkdir(parents=True, exist_ok=True)
    for data in DATA:
        for carrier, (title, keys) in CARRIERS.items():
            name, folder = f"{data}-{carrier}", output / f"{data}-{carrier}"
            if only and name not in only:
                continue
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


def incomplete(summaries: dict[str, dict]) -> list[str]:
    """A warning where comparisons are missing."""
    missing = [f"{data}-{carrier}" for data in DATA for carrier in CARRIERS if f"{data}-{carrier}" not in summaries]
    return [f"**This is not all: {', '.join(missing)} were not run.**", ""] if missing else []


def document(summaries: dict[str, dict], overrides: list[str]) -> str:
    """docs/evidence.md, from the results alone."""
    first, pooled = next(iter(summaries.values())), pool(summaries)
    seeds, trials = first["seeds"], sum(s["trials"]["finished"] for s in summaries.values())
    command = " ".join(["python recipes/evidence.py", *(f"'{o}'" for o in overrides)]) if overrides else "make evidence"
    finetuned = next((s["equal_encoder"]["baseline"] for s in summaries.values() if s["equal_encoder"]), None)
    core_hours = sum(s["seconds"] for s in summaries.values()) / 3600
    versions = ", ".join(f"{name} {version}" for name, version in first["facts"]["versions"].items())
    lines = [
        "# Does decoupling help, and at equal rate too?",
        "",
        f"Written by `{command}` from {trials} trials of small models ({core_hours:.1f} core hours on CPUs; {versions}).",
        "The method is that of Hu et al. 2023 as publicly described; hyper-parameters and numbers are ours. What small models on",
        "small images show need not hold for large ones.",
        "",
        *incomplete(summaries),
        f"In every comparison {len(first['arms'])} ways to train the encoder (*arms*) were trained with the seeds",
        f"{', '.join(map(str, seeds))}: steps, prior, sampling and codebook size or KL weight are equal.",
        *in_all(budgets, summaries),
        *in_all(tuned, summaries),
        "*Generation distance* is the Frechet distance of samples to held-out images in features of a small classifier trained",
        "on the training images (not Inception); less is better.",
        *in_all(rate_means, summaries),
        *in_all(bits_mean, summaries),
        "Rate and bits are counted an image. Intervals are Student's, over seeds, of differences between arms with the same",
        "seed. *At equal rate*: the arm against the baseline's distance at that rate, read between baselines trained at several",
        "rates, never beyond them. A difference counts as shown if its p is below 0.05 after Holm's adjustment for the number of",
        "arms in a comparison; the intervals themselves are not adjusted.",
        "",
        "## The answer",
        "",
        "The comparisons share seeds, code and two data sets: they are not independent evidence, and the means over them, with",
        "Student's intervals, describe these comparisons and no others. The ratio is the geometric mean over the comparisons of",
        "the arm's distance to the other's; below 1 is better. A comparison enters it with at least two seeds and half of",
        "its own.",
        "",
        *answers(
            pooled, first["baseline"], {a["name"] for s in summaries.values() for a in s["arms"] if a["decoupled"]}, finetuned
        ),
        "",
        *by_comparison(summaries, pooled, first["baseline"], finetuned),
        pooled_markdown(pooled, finetuned).rstrip(),
        "",
        "## What the decoupled latents cost and save",
        "",
        *costs(summaries),
        "",
        "## Which number predicts generation best?",
        "",
        *predictors(pooled_predictors(summaries)),
    ]
    for name, summary in summaries.items():
        lines += section(name, summary)
    lines += [
        "## What these numbers do not say",
        "",
        "- The images are tiny, the models have tens of thousands of parameters and train for seconds.",
        "- Distances are taken in features of one classifier a data set; another one could rank close arms differently.",
        "- Learning rates are tuned by one seed over a short list, at the comparison's own rate and size of the prior. Other",
        "  rates use them as they are, other widths of the prior in inverse proportion. Nothing else is tuned, for any arm.",
        "- A frontier of a few rates is interpolated linearly; seeds whose rate lies outside it are left out of that column.",
        "- p is adjusted within one table of one comparison, not over all tables and comparisons together.",
        "- Where trials diverged, intervals know only the others.",
        "",
    ]
    return "\n".join(lines)


def tuned(summary: dict) -> str:
    if not summary["tuning"]:
        return "No arm was tuned: all trained with one learning rate."
    of = "the autoencoder and of the prior" if summary["tuning"]["prior_learning_rates"] else "the autoencoder"
    return (
        f"Each arm, the baseline *{summary['baseline']}* too, was first tuned over the same learning rates of {of}, with another "
        "seed and on training images set aside."
    )


def in_all(says: Callable[[dict], str], summaries: dict[str, dict]) -> list[str]:
    """What is said of each comparison: once where it is the same for all, else each time with their names."""
    said: dict[str, list[str]] = {}
    for name, summary in summaries.items():
        said.setdefault(says(summary), []).append(name)
    return list(said) if len(said) == 1 else [f"In {', '.join(names)}: {words}" for words, names in said.items()]


def answers(pooled: dict, baseline: str, decoupled: set[str], finetuned: str | None = None) -> list[str]:
    """The questions, answered by counting what is shown after Holm's adjustment, then each decoupled arm."""
    lines = []
    for key, title, other, untrained in (
        ("equal_steps", "equal steps", baseline, ""),
        (
            "equal_encoder",
            "equal steps of the encoder",
            finetuned,
            "no arm trains its encoder for as many steps and goes on with its decoder",
        ),
        ("equal_rate", "equal rate", baseline, "no frontier of several rates was trained"),
    ):
        arms = {name: row for name, row in (pooled[key] or {}).items() if name in decoupled}
        if not arms:
            why = untrained if pooled[key] is None else "no decoupled arm has a result"
            why = why if decoupled else "no arm is decoupled"
            lines += [f"**At {title}** nothing can be said: {why}.", ""]
            continue
        counts = {word: sum(row[word] for row in arms.values()) for word in OUTCOMES}
        total, (better, worse, same, unknown) = sum(counts.values()), counts.values()
        lines.append(
            f"**Does decoupling help at {title}?** Of {total} pairs of a decoupled arm and a comparison, the decoupled arm's "
            f"samples were nearer to the held-out images than {other}'s in {better}, farther in {worse}, and in {same} no "
            "difference was shown" + (f"; {unknown} could not be judged." if unknown else ".")
        )
        lines += ["", *(f"- {name}: {over_all(row)}" for name, row in arms.items()), ""]
    return lines[:-1]


def by_comparison(names: Iterable[str], pooled: dict, baseline: str, finetuned: str | None = None) -> list[str]:
    """Every arm in every comparison: what is shown, and its distance in multiples of the other's."""
    header = ["arm", "against", *names]
    lines = [
        "In each comparison, with the arm's distance in multiples of the other's:",
        "",
        line(header),
        line(["---"] * len(header)),
    ]
    against = {"equal_steps": baseline, "equal_encoder": f"{finetuned}, equal steps of the encoder"}
    for key, other in (against | {"equal_rate": f"{baseline}, equal rate"}).items():
        for arm, row in (pooled[key] or {}).items():
            ratios = {name: f", {ratio:.2f}" for name, ratio in row["ratios"].items()}
            cells = [row["verdicts"].get(name, "–") + ratios.get(name, "") for name in header[2:]]
            lines.append(line([arm, other, *cells]))
    return [*lines, ""]


def over_all(row: dict) -> str:
    """One arm over all comparisons, in words."""
    ratio, counts = row["ratio"], ", ".join(f"{word} {row[word]}" for word in OUTCOMES if row[word])
    inside = f"{row['seeds']} of {row['of']} seeds have a difference"
    if ratio is None or ratio["low"] is None:
        return f"{counts}; too few comparisons for a mean ({inside})."
    return f"{counts}; {ratio_in_figures(row)} times the distance in the mean of {ratio['n']} comparisons ({inside})."


def predictors(rows: list[dict]) -> list[str]:
    """Which number ranks best, if that can be told, and the tables: known in all comparisons, and in fewer."""
    if not rows:
        return ["No report cards were made, or too few trials finished.", ""]
    best, most = rows[0], rows[0]["n"]
    ranked = [row for row in rows if row["n"] == most]
    if best["low"] is None:
        found = f"One comparison cannot tell: *{best['name']}* has the strongest correlation, {correlation(best)}."
    else:
        next_one = ranked[1]["name"] if len(ranked) > 1 else None
        found = "Which is best cannot be told: " if next_one in best["rivals"] else ""
        found += f"*{best['name']}* has the strongest mean correlation, {correlation(best)}, of {len(ranked)} numbers known in "
        found += f"{most} comparisons"
        clear = sum(row["low"] > 0 or row["high"] < 0 for row in ranked)
        found += f"; it does not differ by more than chance from {len(best['rivals'])} of the others" if best["rivals"] else ""
        found += f", the next one, *{next_one}*, among them" if next_one in best["rivals"] else ""
        found += " (paired differences over the comparisons, p after Holm's adjustment). As the strongest it is chosen after the "
        found += f"fact, which flatters it. The intervals of {clear} of the {len(ranked)} leave out 0; they are not adjusted for "
        found += f"there being {len(ranked)}."
    lines = [
        found,
        "",
        "Rank correlation (Spearman) with the generation distance over the trials of a comparison that have a report card: every",
        "arm and seed at the comparison's own rate, the same trials for every number. Averaged over the comparisons in Fisher's",
        "z, with Student's interval. Near 1 or -1 is a good predictor; the sign is the direction. The reconstruction error",
        "stands for PSNR, too, and a code's entropy for its perplexity: they measure the same. Each comparison's own",
        "intervals, which resample the seeds, are on its page.",
        "",
    ]
    for group in (ranked, rows[len(ranked) :]):
        if group:
            if group is not ranked:
                lines += ["Known in fewer comparisons, and so not ranked beside those above:", ""]
            lines += ["| predictor | mean rank correlation | comparisons |", "|---|---|---|"]
            lines += [*(f"| {row['name']} | {correlation(row)} | {row['n']} |" for row in group), ""]
    return lines


def costs(summaries: dict[str, dict]) -> list[str]:
    """Bits under the prior, rate, PSNR and copies: arm minus baseline, in how many comparisons each way."""
    baseline = next(iter(summaries.values()))["baseline"]
    columns = {
        "rate_bits": "rate, bits",
        "bits": "bits under the prior",
        "psnr": "PSNR, dB",
        "memorised": "near-copies, percentage points",
    }
    lines = [
        f"Each arm minus *{baseline}*: in how many comparisons it is shown to be higher or lower (adjusted as above), and the",
        "range of the mean differences.",
        "",
    ]
    for title, key in (("equal steps", "differences"), ("equal rate", "equal_rate")):
        tables = [s[key] for s in summaries.values() if s[key]]
        arms = dict.fromkeys(arm for table in tables for arm in table["frechet"])
        shown = {name: words for name, words in columns.items() if any(name in table for table in tables)}
        if arms:
            lines += [f"| at {title} | {' | '.join(shown.values())} |", "|---" * (len(shown) + 1) + "|"]
            lines += [f"| {arm} | {' | '.join(ways(tables, arm, name) for name in shown)} |" for arm in arms]
            lines.append("")
    return lines[:-1]


def ways(tables: list[dict], arm: str, key: str) -> str:
    """In how many tables one measure of an arm is shown to be higher or lower, and between what its mean differences lie."""
    rows = [row for table in tables if (row := table[key].get(arm)) and row["mean"] is not None]
    verdicts = [0 if row["low"] is None else row["verdict"] for row in rows]
    factor, digits = (100, 2) if key == "memorised" else (1, 1)
    means = [factor * row["mean"] for row in rows]
    between = f" ({signed(min(means), digits)} to {signed(max(means), digits)})" if means else ""
    return f"{verdicts.count(1)} higher, {verdicts.count(-1)} lower, {verdicts.count(0)} neither{between}"


def correlation(row: dict) -> str:
    return f"{row['mean']:.2f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")


def section(name: str, summary: dict) -> list[str]:
    data, carrier = name.split("-")
    tables = {"equal steps": (summary["differences"], None), "equal rate": (summary["equal_rate"], None)}
    if encoder := summary["equal_encoder"]:
        tables["equal steps of the encoder"] = encoder, encoder["baseline"]
    words = []
    for title, (table, other) in tables.items():
        if table:
            said = [in_short(summary, table["frechet"], other), caveats(summary, table["frechet"])]
            words += [f"At {title}: {' '.join(said)}".rstrip(), ""]
        if table and other:  # what the table below does not hold
            words += [*(f"- {name}: {in_figures(summary, row, other)}" for name, row in table["frechet"].items()), ""]
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
    parser.add_argument("--only", type=lambda names: names.split(","), help="some comparisons, for example digits-vq,photos-vq")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every comparison, for example compare.seeds=[5,6]")
    arguments = parser.parse_args()
    try:
        evidence(arguments.output, arguments.docs, arguments.overrides, arguments.only)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except ValueError as error:
        parser.error(str(error))
