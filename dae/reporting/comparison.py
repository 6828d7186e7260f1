"""The page of a comparison, for readers who do not know the paper, and its main charts as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

import numpy as np

from dae.comparison.arms import parse_arms
from dae.comparison.jobs import arms_at_rate, learning_rates_in_words, tried_learning_rates
from dae.comparison.results import BY_KEY, DETAILS, MEASURES, verdict_in_words
from dae.config import Config
from dae.quantizers import bottleneck_class
from dae.reporting import comparison_charts as charts
from dae.reporting import elements as web
from dae.reporting import findings
from dae.reporting.charts import Bar
from dae.reporting.comparison_charts import BITS, DISTANCE, RATE, SIZE
from dae.reporting.elements import Html, element, number, paragraph, percent

ABOUT = {
    "joint": "encoder and real decoder are trained together: the usual way",
    "joint_dropout": "the same, with channels of the decoder dropped at random in training",
    "joint_finetuned": "joint first; then the encoder is frozen, and its decoder is trained on alone",
    "weak": "encoder and a weak decoder are trained together, and the weak decoder makes the images",
    "dae-linear": "decoupled: the encoder is trained with a linear decoder and frozen; then the real decoder is trained",
    "dae-overlap": "decoupled, with a linear decoder in the first stage whose patches overlap",
    "dae-projection": "decoupled, with the linear decoder in the first stage that is best for each batch",
    "dae-narrow": "decoupled, with a decoder of few channels in the first stage",
    "dae-shallow": "decoupled, with a decoder of few layers in the first stage",
    "dae-dropout": "decoupled, with a decoder that drops channels at random in the first stage",
    "dae-noise": "decoupled, with noise on the latent of the real decoder in the first stage",
    "dae-mask": "decoupled, with a part of the latent hidden from the real decoder in the first stage",
}


def write_comparison(config: Config, summary: dict, pictures: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Write compare.html and compare.png; returns the path of the page.

    Args:
        config: of the comparison.
        summary: result of `dae.comparison.results.summarize_comparison`.
        pictures: label to uint8 [n, H, W, C], one row each: real images and samples of the arms.
        folder: that of the comparison.
    """
    styles = {arm["name"]: style for style, arm in enumerate(summary["arms"])}  # an arm looks the same in all charts
    page = web.Page(f"How to train the encoder: {len(styles)} ways on {Path(summary['data']).name}", _lead(summary))
    page.section("The answer", *_answer(summary))
    page.section("What was compared", *_compared(config, summary))
    page.section("Differences", *_differences(summary))
    page.section("All measurements", *_measurements(summary))
    page.section("Distance and rate", *_rates(config, summary, styles))
    page.section("Size of the prior", *_sizes(summary, styles))
    page.section("Samples", *_samples(summary, pictures))
    page.section("Copies?", *_copies(summary))
    page.section("What tells the distance beforehand?", *_predictors(summary))
    page.section("Tuning", *_tuning(summary))
    page.section("Left out", *_left_out(summary))
    page.section("Configuration and versions", *_configuration(config, summary))
    ours = "; all hyper-parameters are ours, and no number here is the paper's. Written by recipes/compare.py."
    page.footer = [paragraph("The decoupled method as publicly described in ", web.PAPER, ours)]
    charts.save_charts(summary, styles, folder / "compare.png")
    return page.write(folder / "compare.html")


# ---- sections, in their order on the page ----


def _lead(summary: dict) -> list[Html]:
    what = (
        "An image generator of this kind has two parts. An autoencoder learns to write an image as a short description, its "
        "latent, and to make the image of it again; a second model, the prior, learns to write new descriptions. The usual way "
        "trains the autoencoder’s encoder together with a strong decoder. The decoupled way trains it with a deliberately weak "
        "one, in the hope that descriptions which even a weak decoder can read are simpler to write, too. Does that give better "
        "images?"
    )
    bottleneck, family, adversarial = findings.latent_type(summary)
    latent = f"{'tokens of a codebook' if bottleneck.discrete else 'continuous numbers'}, {family.noun}"
    latent += ", with an adversarial loss of the decoder" if adversarial else ""
    seeds, distance, left_out = summary["seeds"], summary["facts"]["counts"].get("frechet"), len(summary["left_out"])
    measured = (
        f"Here {len(summary['arms'])} ways were trained on “{Path(summary['data']).name}” with {_seeds(seeds)} each"
        + (", and compared seed by seed" if len(seeds) > 1 else "")
        + f" (latent and prior: {latent}). What is compared is the generation distance: how far new images are from real images "
        "that no training saw, as a Fréchet distance in features of a small classifier"
        + (f", at {distance:,} images per side" if distance else "")
        + f". Lower is better; real training images themselves are at {number(summary['facts']['floor']['frechet'])}."
    )
    notices = [f"{left_out} of {summary['trials']['planned']} trials have no result; see “Left out”."] if left_out else []
    if len(seeds) < 2:
        notices.append("One seed shows no spread: nothing here says whether a difference would appear again.")
    said = [paragraph(what, " See ", web.PAPER, "."), paragraph(measured)]
    return said + [paragraph(notice, class_="notice") for notice in notices]


def _seeds(seeds: Sequence[int]) -> str:
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _answer(summary: dict) -> list[Html]:
    base = summary["baseline"]
    parts = [element("h3", "With equally many training steps"), *_found(summary, summary["differences"]["frechet"])]
    parts.append(paragraph(findings.budgets(summary)))
    if equal := summary["equal_encoder"]:
        about = (
            f"The decoupled ways train the encoder for {equal['steps']:,} steps only. So does {equal['baseline']}, which spends "
            f"the rest on the decoder that it has; here they are held against it instead of {base}."
        )
        parts += [element("h3", "With equally many steps of the encoder"), paragraph(about)]
        parts += _found(summary, equal["frechet"], equal["baseline"])
    parts.append(element("h3", "At equal rate"))
    why = "A latent with less information is easier to model, so an arm can win above merely by keeping less of the image. "
    if summary["equal_rate"]:
        why += (
            f"So each arm is held against what {base} reaches at the same rate (bits of the latent), read off between {base}’s "
            "own trials of the same seed at several rates; never beyond them."
        )
        parts += [paragraph(why), *_found(summary, summary["equal_rate"]["frechet"])]
    else:
        parts.append(paragraph(f"Not measured. {why}To tell, {base} must be trained at several rates (compare.rates)."))
    brackets = (
        f"The numbers are differences in generation distance, negative is better; in brackets their {_share(summary)} interval, "
        "from the spread between the seeds. “No difference shown” does not mean that there is none: how wide the interval is "
        "says how large a difference may have been missed."
    )
    return [*parts, paragraph(brackets)]


def _share(summary: dict) -> str:
    return f"{100 * summary['level']:.0f}\u00a0%"


def _found(summary: dict, rows: dict[str, dict], base: str | None = None) -> list[Html]:
    items = [element("li", f"{name}: {findings.distance_in_figures(summary, row, base)}") for name, row in rows.items()]
    parts = [paragraph(element("strong", findings.in_short(summary, rows, base))), element("ul", *items)]
    return parts + [paragraph(words) for words in [findings.caveats(summary, rows)] if words]


def _compared(config: Config, summary: dict) -> list[Html]:
    abouts = {arm.name: ABOUT.get(arm.name, " ".join(arm.overrides)) for arm in parse_arms(config.compare)}
    rows = []
    for arm in summary["arms"]:
        stages = "; ".join(f"{steps:,} steps with {_decoder(family)}" for _, family, steps in arm["stages"] or [])
        rows.append((arm["name"], abouts[arm["name"]], stages or "–", _rates_taken(arm)))
    total = config.stage1.max_train_steps + config.stage2.max_train_steps
    bottleneck = bottleneck_class(config.autoencoder)
    rate = bottleneck.rate_setting.format(bottleneck.rate(config.autoencoder))
    tried = len(tried_learning_rates(config))
    tuned = f"{tried} tuning trials for each" if tried > 1 else "one learning rate for all, not tuned"
    equal = (
        f"Equal for all arms: the training images, {total:,} steps of the autoencoder in all, {rate}, the prior "
        f"({config.prior.max_train_steps:,} steps), how it is sampled, the features that judge, and {tuned}. "
        "How the steps are shared out between encoder and decoder is not equal: see “The answer”."
    )
    header = ("arm", "how it is trained", "stages", "learning rate")
    return [_arms_table(summary, header, rows, (0, 1, 2)), paragraph(equal)]


def _decoder(family: str) -> str:
    return {"full": "the real decoder", "dropout": "a decoder with dropout"}.get(family, f"a {family} decoder")


def _arms_table(summary: dict, header: Sequence[str], rows: Sequence[Sequence[str]], prose: Sequence[int] = (0,)) -> Html:
    """A table with a row per arm, the baseline marked."""
    marked = [i for i, arm in enumerate(summary["arms"]) if arm["name"] == summary["baseline"]]
    return web.table(header, rows, prose=prose, marked=marked)


def _differences(summary: dict) -> list[Html]:
    base, measure = summary["baseline"], BY_KEY["frechet"]
    equal, encoder = summary["equal_rate"], summary["equal_encoder"]
    forests = [_forest(summary, summary["differences"]["frechet"], "With equally many steps")]
    forests += [_forest(summary, equal["frechet"], "At equal rate")] if equal else []
    tables = [("With equally many steps", summary["differences"], base)]
    tables += [("With equally many steps of the encoder", encoder, encoder["baseline"])] if encoder else []
    tables += [("At equal rate", equal, base)] if equal else []
    parts = []
    for title, table, other in tables:
        header = ["arm", f"{DISTANCE}, minus {other}’s", "so it is", "p (Holm)", f"in % of {other}’s", "in % of training images’"]
        rows = [
            [name, findings.with_interval(measure, row, sign=True), verdict_in_words(measure, row), findings.adjusted_p(row),
             *findings.in_percent(summary, row)]
            for name, row in table["frechet"].items()
        ]  # fmt: skip
        also = [[name, *(findings.with_verdict(key, table[key].get(name), ": ") for key in DETAILS)] for name in table["frechet"]]
        parts += [element("h3", f"{title}: minus {other}’s"), web.table(header, rows, prose=(0, 2))]
        parts += [web.table(["arm", *(BY_KEY[key].name for key in DETAILS)], also)]
    how = (
        "The arms share their seeds. With one seed, every arm’s encoder starts from the same weights, every prior starts from "
        "the same weights and sees the images in the same order, and samples are drawn with the same random numbers. Not shared: "
        "the first weights of a decoder that is of another kind or comes in later, the noise inside the training of the "
        "autoencoder, and the order of its images, which only arms with stages of the same kind have in common. The differences "
        "are taken seed by seed, which removes what the seed does to both alike; the interval is Student’s of "
        f"{_seeds(summary['seeds'])}. Holm’s adjustment raises p for the number of arms in a table; a difference counts as shown "
        f"if it is below {1 - summary['level']:.2f} then."
    )
    return [web.side_by_side(*forests), paragraph(how), *parts]


def _forest(summary: dict, rows: dict[str, dict], title: str) -> Html:
    base, bars = summary["baseline"], charts.difference_bars(rows)
    if not bars:
        why = f"has a rate within {base}’s rates" if rows else "has a result"
        return paragraph(f"{title}: no other arm {why}, so nothing can be said.")
    caption = (
        f"{title}: {DISTANCE} of each arm minus {base}’s. Dot and line: mean and {_share(summary)} interval, in colour where it "
        "leaves out 0 (before Holm’s adjustment); ticks: the single seeds."
    )
    missing = [name for name, row in rows.items() if row["mean"] is None]
    caption += f" Outside of {base}’s rates with every seed: {', '.join(missing)}." if missing else ""
    return charts.interval_figure(bars, f"{DISTANCE}, minus {base}’s", caption, ends=("better", "worse"))


def _measurements(summary: dict) -> list[Html]:
    used = [m for m in MEASURES if any(arm["measures"][m.key] for arm in summary["arms"])]
    direction = {-1: " ↓", 1: " ↑", 0: ""}
    header = ["arm", "trials", *(m.name + direction[m.better] for m in used)]
    rows = []
    for arm in summary["arms"]:
        lost = findings.missing(arm)
        cells = [findings.with_interval(m, arm["measures"][m.key]) for m in used]
        rows.append([arm["name"], f"{arm['finished']}" + (f" ({lost})" if lost else ""), *cells])
    facts = summary["facts"]
    words = f"Yardsticks: real training images have a {DISTANCE} of {number(facts['floor']['frechet'])}"
    if facts.get("memorised_heldout") is not None:
        words += f"; {percent(facts['memorised_heldout'])} of the held-out images count as near-copies"
    if facts.get("labelled"):
        words += f"; {percent(facts['heldout_accuracy'])} of them are recognised as their class"
    words += (
        f". Means over the seeds with their {_share(summary)} intervals, cut at what is possible (a share lies between 0 and "
        f"100\u00a0%); ↓ less is better, ↑ more is better. {findings.rate_means(summary)} {findings.bits_mean(summary)} Such "
        "bits compare only latents of equal rate. The row in bold is the baseline."
    )
    return [_arms_table(summary, header, rows), paragraph(words)]


def _rates(config: Config, summary: dict, styles: Mapping[str, int]) -> list[Html]:
    setting = bottleneck_class(config.autoencoder).rate_plural
    words = f"No arm was trained at further {setting}, so each has one point."
    if config.compare.rates:
        at = {rate: " and ".join(arms) for rate in config.compare.rates if (arms := arms_at_rate(config, rate))}
        words = f"Trained at further {setting}, too: {'; '.join(f'{names} at {rate:g}' for rate, names in at.items())}."
    means = (
        "Down is better; to the left is a cheaper description. An arm that lies on another’s line only bought a lower rate; one "
        f"that lies below it is better at equal rate. {words}"
    )
    caption = f"against {RATE}: means; the thin lines span the seeds."
    figures = [
        charts.frontier_figure(charts.rate_series(summary, styles, key), RATE, axis, caption, level=level)
        for key, axis, level in (("frechet", DISTANCE, charts.floor_of(summary)), ("bits", BITS, None))
    ]
    return [paragraph(means), web.side_by_side(*figures)]


def _sizes(summary: dict, styles: Mapping[str, int]) -> list[Html]:
    if not summary["prior_sizes"]:
        return [paragraph("One size of prior was trained (compare.prior_widths names further ones).")]
    caption = "by the size of the prior: means over the seeds."
    figures = [
        charts.frontier_figure(charts.size_series(summary, styles, key), SIZE, axis, caption, logarithmic=True)
        for key, axis in (("frechet", DISTANCE), ("bits", BITS))
    ]
    words = "If a latent is simpler to model, its line should start lower. The learning rate of a network goes as 1 / width."
    return [paragraph(words), web.side_by_side(*figures)]


def _samples(summary: dict, pictures: Mapping[str, np.ndarray]) -> list[Html]:
    if not pictures:
        return [paragraph("No pictures were kept.")]
    columns = web.per_row(max(max(images.shape[1:3]) for images in pictures.values()))
    cut = {label: images[:columns] for label, images in pictures.items()}
    rows = [(label, web.strip(images, f"{label}: {len(images)} images")) for label, images in cut.items()]
    seed = summary["seeds"][0]
    return [web.figure(web.strips(rows), f"The first samples of each arm with seed {seed}, not a selection; above, real images.")]


def _copies(summary: dict) -> list[Html]:
    floor, key, bars = summary["facts"].get("memorised_heldout"), "memorised", []
    for arm in summary["arms"]:
        if row := arm["measures"][key]:
            low, high = (None if row[end] is None else 100 * row[end] for end in ("low", "high"))
            bars.append(Bar(arm["name"], 100 * row["mean"], low, high, [100 * v for v in arm["values"][key]]))
    words = (
        "A generator that repeats its training images looks perfect and is useless, and the generation distance does not see "
        "it. A sample counts as a near-copy if it is nearer to a training image, pixel by pixel, than 99\u00a0% of the held-out "
        "images are."
    )
    rows, against = summary["differences"][key], {"worse": "more", "better": "fewer"}
    groups = [
        (word, [f"{n} ({findings.with_seeds(key, rows[n])})" for n in names])
        for word, names in findings.by_verdict(key, rows).items()
    ]
    said = "; ".join(f"{against.get(word, word)}: {', '.join(names)}" for word, names in groups)
    caption = f"Means with {_share(summary)} intervals; the rule: real held-out images."
    level = None if floor is None else (100 * floor, "held-out images")
    figure = charts.interval_figure(bars, "near-copies among the samples, %", caption, level=level)
    return [paragraph(words), web.side_by_side(figure, paragraph(f"Near-copies against {summary['baseline']}’s: {said}."))]


def _predictors(summary: dict) -> list[Html]:
    rows = [row for row in summary["predictors"] if row["rho"] is not None]
    if not rows:
        return [paragraph("No report cards were made, or too few trials finished.")]
    best, ranked = rows[0], [row for row in rows if row["n"] == rows[0]["n"]]
    words = (
        f"Before a prior is trained, the latent can be measured. Over the {best['n']} trials that have such a report card (arms "
        f"and seeds at the configuration’s own rate; none of further rates), “{best['name']}” orders the trials most like the "
        f"{DISTANCE} in the end: {number(best['rho'])}"
    )
    if best["low"] is None:
        words += "; but one seed cannot tell which number is best. "
    else:
        nearest = max(0.0, best["low"] if best["rho"] > 0 else -best["high"])  # the end of its interval nearest to 0
        rivals = [r for r in ranked[1:] if r["low"] is not None and max(-r["low"], r["high"]) >= nearest]
        reach = f"The intervals of {len(rivals)} of {len(ranked) - 1} others reach as far: which is best is not settled."
        reach = reach if rivals else "The interval of no other reaches as far."
        words += f" ({number(best['low'])} to {number(best['high'])}). {reach} "
    words += (
        f"1 is the same order, −1 the reverse, 0 none. The strongest of {len(ranked)} is chosen after the fact, which flatters "
        "it. The reconstruction error stands for PSNR, too, and the entropy of a code for the perplexity: they measure the same."
    )
    note = (
        "Spearman’s correlation over the same trials for all"
        + ("" if len(ranked) == len(rows) else " but the last ones, which some trials lack and which are not ranked beside them")
        + ", with bootstrap intervals that draw whole seeds; with few seeds these are too narrow. It tells arms of this "
        "comparison apart; it says nothing about others."
    )
    bars = [Bar(r["name"] + ("" if r["n"] == best["n"] else f" ({r['n']} trials)"), r["rho"], r["low"], r["high"]) for r in rows]
    figure = charts.interval_figure(bars, f"rank correlation with the {DISTANCE}", note)
    return [web.side_by_side(figure, paragraph(words))]


def _tuning(summary: dict) -> list[Html]:
    found = summary["tuning"]
    if not found:
        return [paragraph("Nothing was tuned: all arms, the baseline too, trained with the one learning rate that was given.")]
    tried = list(dict.fromkeys(_rates_taken(trial) for trial in found["trials"]))
    results = {
        (t["arm"], _rates_taken(t)): "diverged" if t["diverged"] else "failed" if t["failed"] else number(t["frechet"])
        for t in found["trials"]
    }
    rows = [[a["name"], *(results.get((a["name"], rates), "–") for rates in tried), _rates_taken(a)] for a in summary["arms"]]
    of = "its autoencoder with each of its prior" if found["prior_learning_rates"] else "its autoencoder"
    words = (
        f"Each arm, the baseline too, had {len(tried)} trials, one for each learning rate of {of}, with seed {found['seed']}, "
        "which is none of the seeds above, and judged on images held out of the training set, so not on those that the results "
        f"are measured on. What had the smallest {DISTANCE} was taken."
    )
    parts = [paragraph(words), web.table(["arm", *(f"{DISTANCE} at {rates}" for rates in tried), "taken"], rows)]
    lists = {key: found[f"{key}s"] for key in ("learning_rate", "prior_learning_rate") if len(found[f"{key}s"]) > 1}
    if edge := [arm["name"] for arm in summary["arms"] if any(arm[key] in (min(v), max(v)) for key, v in lists.items())]:
        parts.append(paragraph(f"At the edge of the tried rates, so that a better one may lie beyond: {', '.join(edge)}."))
    return parts


def _rates_taken(row: dict) -> str:
    return learning_rates_in_words(row["learning_rate"], row["prior_learning_rate"])


def _left_out(summary: dict) -> list[Html]:
    if not summary["left_out"]:
        return [paragraph(f"Nothing: all {summary['trials']['planned']} trials have a result, and all are in the numbers above.")]
    words = (
        "These trials have no result, and their pairs are missing from the intervals. A diverged trial is a result of its arm: "
        "take it as worse than any number. A failed one says nothing about its arm; the same command tries it again."
    )
    rows = [(lost["trial"], lost["kind"], lost["why"]) for lost in summary["left_out"]]
    parts = [paragraph(words), web.table(("trial", "what happened", "message"), rows, prose=(0, 1, 2))]
    if unmeasured := ", ".join(arm["name"] for arm in summary["arms"] if not arm["trials"]):
        parts.append(paragraph(f"Not measured at all, since the tuning did not finish or diverged throughout: {unmeasured}."))
    return parts


def _configuration(config: Config, summary: dict) -> list[Html]:
    facts = summary["facts"]
    rows = [(f"images: {name.replace('_', ' ')}", f"{count:,}") for name, count in facts["counts"].items()]
    rows += [("classifier whose features judge", str(facts["extractor"]))] if facts.get("extractor") else []
    rows += [("computing time of all trials together", web.duration(summary["seconds"])), *facts.get("versions", {}).items()]
    return [web.table(("what", "value"), rows, prose=(0, 1)), web.configuration(config)]
