"""The page of a comparison, for a reader who does not know the paper; and its two main charts as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from dae.comparison.jobs import arms_at_rate, learning_rates_in_words, tried_learning_rates
from dae.comparison.results import (
    BY_KEY,
    DETAILS,
    MEASURES,
    Measure,
    bits_mean,
    budgets,
    caveats,
    detail,
    grouped,
    in_figures,
    in_short,
    p_value,
    rate_means,
    shown,
    verdict,
    yardsticks,
)
from dae.config import Config, config_differences
from dae.reporting import elements as web
from dae.reporting.charts import (
    Bar,
    Panel,
    Series,
    frontier_chart,
    frontier_panel,
    interval_chart,
    interval_height,
    interval_panel,
    save_png,
)
from dae.reporting.elements import Html, element, number, paragraph, percent

PAPER = web.link("Hu et al., “Complexity Matters”, NeurIPS 2023", "https://arxiv.org/abs/2307.08283")
ABOUT = {
    "joint": "encoder and real decoder are trained together: the usual way",
    "joint_dropout": "the same, with channels of the decoder dropped at random in training",
    "joint_finetuned": "joint first; then the encoder is frozen, and its decoder is trained on alone",
    "weak": "encoder and a weak decoder are trained together, and the weak decoder makes the images",
    "dae-linear": "decoupled: the encoder is trained with a linear decoder and frozen; then the real decoder is trained",
    "dae-narrow": "decoupled, with a decoder of few channels in the first stage",
    "dae-shallow": "decoupled, with a decoder of few layers in the first stage",
    "dae-dropout": "decoupled, with a decoder that drops channels at random in the first stage",
}
DISTANCE, RATE = "generation distance", "rate, bits per image"
BITS, SIZE = "bits per image under the prior", "parameters of the prior"


def write_page(config: Config, summary: dict, pictures: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Write compare.html and compare.png; returns the path of the page.

    Args:
        config: of the comparison.
        summary: of `dae.comparison.results.summarize`.
        pictures: label -> uint8 [n, H, W, C], one row each: real images and samples of the arms.
        folder: that of the comparison.
    """
    arms = {arm["name"]: style for style, arm in enumerate(summary["arms"])}  # an arm looks alike in all charts
    page = web.Page(f"How to train the encoder: {len(arms)} ways on {Path(summary['data']).name}", lead(summary))
    page.section("The answer", *answer(summary))
    page.section("What was compared", *compared(config, summary))
    page.section("Differences", *differences(summary))
    page.section("All measurements", *measurements(summary))
    page.section("Distance and rate", *rates(config, summary, arms))
    page.section("Size of the prior", *sizes(summary, arms))
    page.section("Samples", *samples(summary, pictures))
    page.section("Copies?", *copies(summary))
    page.section("What tells the distance beforehand?", *predictors(summary))
    page.section("Tuning", *tuning(summary))
    page.section("Left out", *left_out(summary))
    page.section("Configuration and versions", *configuration(config, summary))
    ours = "; all hyper-parameters are ours, and no number here is the paper's."
    page.footer = [paragraph("The decoupled method as publicly described in ", PAPER, ours, " Written by recipes/compare.py.")]
    panels, heights = zip(*pictures_of(summary, arms), strict=True)
    save_png(panels, heights, folder / "compare.png")
    return page.write(folder / "compare.html")


# ---- sections, in their order on the page ----


def lead(summary: dict) -> list[Html]:
    what = (
        "An image generator of this kind has two parts. An autoencoder learns to write an image as a short description, its "
        "latent, and to make the image of it again; a second model, the prior, learns to write new descriptions. The usual way "
        "trains the autoencoder’s encoder together with a strong decoder. The decoupled way trains it with a deliberately weak "
        "one, in the hope that descriptions which even a weak decoder can read are simpler to write, too. Does that give better "
        "images?"
    )
    seeds, distance = summary["seeds"], summary["facts"]["counts"].get("frechet")
    measured = (
        f"Here {len(summary['arms'])} ways were trained on “{Path(summary['data']).name}” with {_seeds(len(seeds))} each"
        + (", and compared seed by seed" if len(seeds) > 1 else "")
        + f" (latent and prior: {_carrier(summary)}). What is compared is the generation distance: how far new images are from "
        "real images that no training saw, as a Fréchet distance in features of a small classifier"
        + (f", at {distance:,} images a side" if distance else "")
        + ". Lower is better; real training images themselves are at "
        + f"{number(summary['facts']['floor']['frechet'])}."
    )
    return [paragraph(what, " See ", PAPER, "."), paragraph(measured), *_notices(summary)]


def _carrier(summary: dict) -> str:
    words = {
        "vq": "tokens of a codebook", "kl": "continuous numbers", "ar": "an autoregressive Transformer",
        "dit": "a Diffusion Transformer with flow matching", "mixture": "a Gaussian mixture",
        "gan": "with an adversarial loss of the decoder",
    }  # fmt: skip
    return ", ".join(words[part] for part in summary["carrier"].split(" + "))


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _notices(summary: dict) -> list[Html]:
    notices = []
    if summary["left_out"]:
        notices.append(f"{len(summary['left_out'])} of {summary['trials']['planned']} trials have no result; see “Left out”.")
    if len(summary["seeds"]) < 2:
        notices.append("One seed shows no spread: nothing here says whether a difference would appear again.")
    return [paragraph(words, class_="notice") for words in notices]


def answer(summary: dict) -> list[Html]:
    base, share = summary["baseline"], f"{100 * summary['level']:.0f}\u00a0%"
    why = "A latent with less information is easier to model, so an arm can win above merely by keeping less of the image. "
    if summary["equal_rate"]:
        why += (
            f"So each arm is held against what {base} reaches at the same rate (bits of the latent), read off between {base}’s "
            "own trials of the same seed at several rates; never beyond them."
        )
        at_rate = [paragraph(why), *_answer(summary, summary["equal_rate"]["frechet"])]
    else:
        at_rate = [paragraph(f"Not measured. {why}To tell, {base} must be trained at several rates (compare.rates).")]
    brackets = (
        f"The numbers are differences in generation distance, negative is better; in brackets their {share} interval, from the "
        "spread between the seeds. “No difference shown” does not mean that there is none: how wide the interval is says how "
        "large a difference may have been missed."
    )
    steps = [*_answer(summary, summary["differences"]["frechet"]), paragraph(budgets(summary))]
    encoder = []
    if equal := summary["equal_encoder"]:
        about = (
            f"The decoupled ways train the encoder for {equal['steps']:,} steps only. So does {equal['baseline']}, which spends "
            f"the rest on the decoder that it has; here they are held against it instead of {base}."
        )
        encoder = [element("h3", "With equally many steps of the encoder"), paragraph(about)]
        encoder += _answer(summary, equal["frechet"], equal["baseline"])
    titles = [element("h3", words) for words in ("With equally many training steps", "At equal rate")]
    return [titles[0], *steps, *encoder, titles[1], *at_rate, paragraph(brackets)]


def _answer(summary: dict, rows: dict[str, dict], base: str | None = None) -> list[Html]:
    items = [element("li", f"{name}: {in_figures(summary, row, base)}") for name, row in rows.items()]
    caveat = caveats(summary, rows)
    parts = [paragraph(element("strong", in_short(summary, rows, base))), element("ul", *items)]
    return parts + ([paragraph(caveat)] if caveat else [])


def compared(config: Config, summary: dict) -> list[Html]:
    header = ("arm", "how it is trained", "stages", "learning rate")
    rows = []
    for arm in summary["arms"]:
        stages = "; ".join(f"{steps:,} steps with {_decoder(family)}" for _, family, steps in arm["stages"] or [])
        own = next((words for words in config.compare.arms if words.partition(":")[0].strip() == arm["name"]), "")
        about = ABOUT.get(arm["name"], own) if ":" not in own else own.partition(":")[2].strip()
        rows.append((arm["name"], about, stages or "–", _rates(arm)))
    total = config.stage1.max_train_steps + config.stage2.max_train_steps
    codebook = f"a codebook of {config.autoencoder.vq.codebook_size:,} codes"
    bottleneck = codebook if config.autoencoder.bottleneck == "vq" else f"a KL weight of {config.autoencoder.kl.kl_weight:g}"
    tried = len(tried_learning_rates(config))
    tuned = f"{tried} tuning trials for each" if tried > 1 else "one learning rate for all, not tuned"
    equal = (
        f"Equal for all arms: the training images, {total:,} steps of the autoencoder in all, {bottleneck}, the prior "
        f"({config.prior.max_train_steps:,} steps), how it is sampled, the features that judge, and {tuned}. "
        "How the steps are shared out between encoder and decoder is not equal: see “The answer”."
    )
    return [web.table(header, rows, prose=(0, 1, 2), marked=_marked(summary, [r[0] for r in rows])), paragraph(equal)]


def _decoder(family: str) -> str:
    return {"full": "the real decoder", "dropout": "a decoder with dropout"}.get(family, f"a {family} decoder")


def _marked(summary: dict, names: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(names) if name == summary["baseline"]]


def differences(summary: dict) -> list[Html]:
    base, seeds = summary["baseline"], len(summary["seeds"])
    parts = [_forest(summary, summary["differences"]["frechet"], "With equally many steps")]
    if summary["equal_rate"]:
        parts.append(_forest(summary, summary["equal_rate"]["frechet"], "At equal rate"))
    tables, found = [], {"With equally many steps": (summary["differences"], base)}
    if equal := summary["equal_encoder"]:
        found["With equally many steps of the encoder"] = equal, equal["baseline"]
    if summary["equal_rate"]:
        found["At equal rate"] = summary["equal_rate"], base
    for title, (table, other) in found.items():
        header = ["arm", f"{DISTANCE}, minus {other}’s", "so it is", "p (Holm)", f"in % of {other}’s", "in % of training images’"]
        rows = [
            [name, shown(BY_KEY["frechet"], row, sign=True), verdict(BY_KEY["frechet"], row), p_value(row),
             *yardsticks(summary, row)]
            for name, row in table["frechet"].items()
        ]  # fmt: skip
        also = [[name, *(_cell(BY_KEY[key], table[key].get(name)) for key in DETAILS)] for name in table["frechet"]]
        tables += [element("h3", f"{title}: minus {other}’s"), web.table(header, rows, prose=(0, 2))]
        tables += [web.table(["arm", *(BY_KEY[key].name for key in DETAILS)], also)]
    how = (
        "The arms share their seeds. With one seed, every arm’s encoder starts from the same weights, every prior starts from "
        "the same weights and sees the images in the same order, and samples are drawn with the same random numbers. Not shared: "
        "the first weights of a decoder that is of another kind or comes in later, the noise inside the training of the "
        "autoencoder, and the order of its images, which only arms with stages of the same kind have in common. The differences "
        "are taken seed by seed, which removes what the seed does to both alike; the interval is Student’s of "
        f"{_seeds(seeds)}. Holm’s adjustment raises p for the number of arms in a table; a difference counts as shown if it is "
        f"below {1 - summary['level']:.2f} then."
    )
    return [web.side_by_side(*parts), paragraph(how), *tables]


def _cell(measure: Measure, row: dict | None) -> str:
    return "–" if row is None else f"{shown(measure, row, sign=True)}: {verdict(measure, row)}"


def _bars(rows: dict[str, dict]) -> list[Bar]:
    kept = {name: row for name, row in rows.items() if row["mean"] is not None}
    return [Bar(_of(name, row), row["mean"], row["low"], row["high"], row["values"]) for name, row in kept.items()]


def _of(name: str, row: dict) -> str:
    return name if row["n"] == row["of"] else f"{name} ({row['n']} of {row['of']} seeds)"


def _forest(summary: dict, rows: dict[str, dict], title: str) -> Html:
    base, bars = summary["baseline"], _bars(rows)
    if not bars:
        why = f"has a rate within {base}’s rates" if rows else "has a result"
        return paragraph(f"{title}: no other arm {why}, so nothing can be said.")
    axis = f"{DISTANCE}, minus {base}’s"
    drawn = web.chart(interval_chart(bars, x=axis, ends=("better", "worse")), _bars_in_words(axis, bars))
    caption = (
        f"{title}: {DISTANCE} of each arm minus {base}’s. Dot and line: mean and {100 * summary['level']:.0f}\u00a0% interval, "
        "in colour where it leaves out 0 (before Holm’s adjustment); ticks: the single seeds."
    )
    missing = [name for name, row in rows.items() if row["mean"] is None]
    return web.figure(drawn, caption + (f" Outside of {base}’s rates with every seed: {', '.join(missing)}." if missing else ""))


def _bars_in_words(axis: str, bars: Sequence[Bar]) -> str:
    words = [f"{b.name} {b.mean:.3g}" + ("" if b.low is None else f" from {b.low:.3g} to {b.high:.3g}") for b in bars]
    return f"Chart of {axis}: {'; '.join(words)}"


def measurements(summary: dict) -> list[Html]:
    used = [m for m in MEASURES if any(arm["measures"][m.key] for arm in summary["arms"])]
    direction = {-1: " ↓", 1: " ↑", 0: ""}
    header = ["arm", "trials", *(m.name + direction[m.better] for m in used)]
    rows = []
    for arm in summary["arms"]:
        lost = [f"{arm[kind]} {kind}" for kind in ("diverged", "failed") if arm[kind]]
        rows.append(
            [arm["name"], f"{arm['finished']}" + (f" ({', '.join(lost)})" if lost else ""),
             *(shown(m, arm["measures"][m.key]) for m in used)]
        )  # fmt: skip
    facts = summary["facts"]
    yardsticks = f"Yardsticks: real training images have a {DISTANCE} of {number(facts['floor']['frechet'])}"
    if facts.get("memorised_heldout") is not None:
        yardsticks += f"; {percent(facts['memorised_heldout'])} of the held-out images count as near-copies"
    if facts.get("labelled"):
        yardsticks += f"; {percent(facts['heldout_accuracy'])} of them are recognised as their class"
    how = (
        f"Means over the seeds with their {100 * summary['level']:.0f}\u00a0% intervals, cut at what is possible (a share lies "
        f"between 0 and 100\u00a0%); ↓ less is better, ↑ more is better. {rate_means(summary)} {bits_mean(summary)} Such bits "
        "compare only latents of equal rate. The row in bold is the baseline."
    )
    return [web.table(header, rows, marked=_marked(summary, [r[0] for r in rows])), paragraph(yardsticks, ". ", how)]


def _frontier(summary: dict, arms: Mapping[str, int], key: str) -> list[Series]:
    """One series an arm: at each of its rates the mean over the seeds; the lines span the seeds."""
    series = []
    for name, style in arms.items():
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for point in summary["frontier"]:
            if point["arm"] == name and point["rate_bits"] is not None and point[key] is not None:
                by_rate.setdefault(point["rate"], []).append((point["rate_bits"], point[key]))
        if by_rate:
            x, y = (np.array([np.mean([p[i] for p in points]) for points in by_rate.values()]) for i in (0, 1))
            low, high = ([end(p[1] for p in points) for points in by_rate.values()] for end in (min, max))
            series.append(Series(name, x.tolist(), y.tolist(), style, True, low, high))
    return series


def rates(config: Config, summary: dict, arms: Mapping[str, int]) -> list[Html]:
    floor = (summary["facts"]["floor"]["frechet"], "training images")
    charts = []
    for key, axis, level in (("frechet", DISTANCE, floor), ("bits", BITS, None)):
        series = _frontier(summary, arms, key)
        drawn = web.chart(frontier_chart(series, x=RATE, y=axis, level=level), _series_in_words(f"{axis} over {RATE}", series))
        charts.append(web.figure(drawn, f"{axis[0].upper()}{axis[1:]} against {RATE}: means; the thin lines span the seeds."))
    setting = "codebook sizes" if config.autoencoder.bottleneck == "vq" else "KL weights"
    if config.compare.rates:
        at = {rate: " and ".join(arms) for rate in config.compare.rates if (arms := arms_at_rate(config, rate))}
        words = f"Trained at further {setting}, too: {'; '.join(f'{names} at {rate:g}' for rate, names in at.items())}."
    else:
        words = f"No arm was trained at further {setting}, so each has one point."
    means = (
        "Down is better; to the left is a cheaper description. An arm that lies on another’s line only bought a lower rate; one "
        f"that lies below it is better at equal rate. {words}"
    )
    return [paragraph(means), web.side_by_side(*charts)]


def _series_in_words(axis: str, series: Sequence[Series]) -> str:
    pairs = [f"{s.name} {', '.join(f'{y:.3g} at {x:.4g}' for x, y in zip(s.x, s.y, strict=True))}" for s in series]
    return f"Chart of {axis}: {'; '.join(pairs)}"


def _by_size(summary: dict, arms: Mapping[str, int], key: str) -> list[Series]:
    """One series an arm: the mean over the seeds at each size of the prior."""
    series = []
    for name, style in arms.items():
        mine = [row for row in summary["prior_sizes"] if row["arm"] == name and row[key]]
        if mine:
            series.append(Series(name, [row["parameters"] for row in mine], [row[key]["mean"] for row in mine], style))
    return series


def sizes(summary: dict, arms: Mapping[str, int]) -> list[Html]:
    if not summary["prior_sizes"]:
        return [paragraph("One size of prior was trained (compare.prior_widths names further ones).")]
    charts = []
    for key, axis in (("frechet", DISTANCE), ("bits", BITS)):
        series, x = _by_size(summary, arms, key), SIZE
        drawn = web.chart(frontier_chart(series, x=x, y=axis, logarithmic=True), _series_in_words(f"{axis} over {x}", series))
        charts.append(web.figure(drawn, f"{axis[0].upper()}{axis[1:]} by the size of the prior: means over the seeds."))
    words = "If a latent is simpler to model, its line should start lower. The learning rate of a network goes as 1 / width."
    return [paragraph(words), web.side_by_side(*charts)]


def samples(summary: dict, pictures: Mapping[str, np.ndarray]) -> list[Html]:
    if not pictures:
        return [paragraph("No pictures were kept.")]
    columns = web.per_row(max(max(images.shape[1:3]) for images in pictures.values()))
    rows = [
        (label, web.strip(images[:columns], f"{label}: {len(images[:columns])} images")) for label, images in pictures.items()
    ]
    seed = summary["seeds"][0]
    return [web.figure(web.strips(rows), f"The first samples of each arm with seed {seed}, not a selection; above, real images.")]


def copies(summary: dict) -> list[Html]:
    floor = summary["facts"].get("memorised_heldout")
    bars = []
    for arm in summary["arms"]:
        if row := arm["measures"]["memorised"]:
            ends = [None if row[k] is None else 100 * row[k] for k in ("low", "high")]
            bars.append(Bar(arm["name"], 100 * row["mean"], *ends, [100 * v for v in arm["values"]["memorised"]]))
    axis = "near-copies among the samples, %"
    level = None if floor is None else (100 * floor, "held-out images")
    words = (
        "A generator that repeats its training images looks perfect and is useless, and the generation distance does not see "
        "it. A sample counts as a near-copy if it is nearer to a training image, pixel by pixel, than 99\u00a0% of the held-out "
        "images are."
    )
    drawn = web.chart(interval_chart(bars, x=axis, level=level), _bars_in_words(axis, bars))
    rows, key = summary["differences"]["memorised"], "memorised"
    against = {"worse": "more", "better": "fewer", "no difference shown": "no difference shown", "not known": "not known"}
    groups = {word: [f"{n} ({detail(key, rows[n])})" for n in names] for word, names in grouped(key, rows).items()}
    said = "; ".join(f"{against[word]}: {', '.join(names)}" for word, names in groups.items())
    chart = web.figure(drawn, f"Means with {100 * summary['level']:.0f}\u00a0% intervals; the rule: real held-out images.")
    return [paragraph(words), web.side_by_side(chart, paragraph(f"Near-copies against {summary['baseline']}’s: {said}."))]


def predictors(summary: dict) -> list[Html]:
    rows = [row for row in summary["predictors"] if row["rho"] is not None]
    if not rows:
        return [paragraph("No report cards were made, or too few trials finished.")]
    best, axis = rows[0], f"rank correlation with the {DISTANCE}"
    bars = [Bar(r["name"] + ("" if r["n"] == best["n"] else f" ({r['n']} trials)"), r["rho"], r["low"], r["high"]) for r in rows]
    ranked = [row for row in rows if row["n"] == best["n"]]
    words = (
        f"Before a prior is trained, the latent can be measured. Over the {best['n']} trials that have such a report card (arms "
        f"and seeds at the configuration’s own rate; none of further rates), “{best['name']}” orders the trials most like the "
        f"{DISTANCE} in the end: {number(best['rho'])}"
    )
    if best["low"] is None:
        words += "; but one seed cannot tell which number is best. "
    else:
        nearest = max(0.0, best["low"] if best["rho"] > 0 else -best["high"])  # the end of its interval that lies next to 0
        rivals = [r for r in ranked[1:] if r["low"] is not None and max(-r["low"], r["high"]) >= nearest]
        words += f" ({number(best['low'])} to {number(best['high'])}). "
        words += (
            f"The intervals of {len(rivals)} of {len(ranked) - 1} others reach as far: which is best is not settled. "
            if rivals
            else "The interval of no other reaches as far. "
        )
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
    drawn = web.chart(interval_chart(bars, x=axis, level=(0.0, "")), _bars_in_words(axis, bars))
    return [web.side_by_side(web.figure(drawn, note), paragraph(words))]


def tuning(summary: dict) -> list[Html]:
    found = summary["tuning"]
    if not found:
        return [paragraph("Nothing was tuned: all arms, the baseline too, trained with the one learning rate that was given.")]
    tried = list(dict.fromkeys(_rates(t) for t in found["trials"]))
    rows = []
    for arm in summary["arms"]:
        trials = {_rates(t): t for t in found["trials"] if t["arm"] == arm["name"]}
        rows.append([arm["name"], *(_tuned(trials.get(rates)) for rates in tried), _rates(arm)])
    of = "its autoencoder with each of its prior" if found["prior_learning_rates"] else "its autoencoder"
    words = (
        f"Each arm, the baseline too, had {len(tried)} trials, one for each learning rate of {of}, with seed {found['seed']}, "
        "which is none of the seeds above, and judged on images held out of the training set, so not on those that the results "
        f"are measured on. What had the smallest {DISTANCE} was taken."
    )
    header = ["arm", *(f"{DISTANCE} at {rates}" for rates in tried), "taken"]
    lists = {key: found[f"{key}s"] for key in ("learning_rate", "prior_learning_rate") if len(found[f"{key}s"]) > 1}
    edge = [a["name"] for a in summary["arms"] if any(a[key] in (min(v), max(v)) for key, v in lists.items())]
    at_edge = f"At the edge of the tried rates, so that a better one may lie beyond: {', '.join(edge)}." if edge else ""
    return [paragraph(words), web.table(header, rows), *([paragraph(at_edge)] if at_edge else [])]


def _rates(row: dict) -> str:
    return learning_rates_in_words(row["learning_rate"], row["prior_learning_rate"])


def _tuned(trial: dict | None) -> str:
    if trial is None:
        return "–"
    return "diverged" if trial["diverged"] else "failed" if trial["failed"] else number(trial["frechet"])


def left_out(summary: dict) -> list[Html]:
    if not summary["left_out"]:
        return [paragraph(f"Nothing: all {summary['trials']['planned']} trials have a result, and all are in the numbers above.")]
    words = (
        "These trials have no result, and their pairs are missing from the intervals. A diverged trial is a result of its arm: "
        "take it as worse than any number. A failed one says nothing about its arm; the same command tries it again."
    )
    rows = [(lost["trial"], lost["kind"], lost["why"]) for lost in summary["left_out"]]
    unmeasured = [arm["name"] for arm in summary["arms"] if not arm["trials"]]
    parts = [paragraph(words), web.table(("trial", "what happened", "message"), rows, prose=(0, 1, 2))]
    if unmeasured:
        parts.append(
            paragraph(f"Not measured at all, since the tuning did not finish or diverged throughout: {', '.join(unmeasured)}.")
        )
    return parts


def configuration(config: Config, summary: dict) -> list[Html]:
    from omegaconf import OmegaConf

    words = OmegaConf.to_yaml(OmegaConf.structured(config))
    title = f"The resolved configuration ({len(config_differences(Config(), config))} keys differ from the defaults)"
    facts: dict[str, Any] = summary["facts"]
    rows = [(f"images: {name.replace('_', ' ')}", f"{count:,}") for name, count in facts["counts"].items()]
    rows += [("classifier whose features judge", str(facts["extractor"]))] if facts.get("extractor") else []
    rows += [("computing time of all trials together", web.duration(summary["seconds"]))]
    rows += list(facts.get("versions", {}).items())
    return [web.table(("what", "value"), rows, prose=(0, 1)), web.details(title, web.preformatted(words))]


# ---- the PNG ----


def pictures_of(summary: dict, arms: Mapping[str, int]) -> list[tuple[Panel, float]]:
    """Panels of compare.png with their heights: differences, distance and bits against the rate, distance by size of prior."""
    base, panels = summary["baseline"], []
    for rows, title in ((summary["differences"], "equal steps"), (summary["equal_rate"], "equal rate")):
        if rows and (bars := _bars(rows["frechet"])):
            axis = f"{DISTANCE}, minus {base}’s, at {title}"
            panels.append((interval_panel(bars, x=axis, ends=("better", "worse")), interval_height(bars)))
    floor = (summary["facts"]["floor"]["frechet"], "training images")
    panels.append((frontier_panel(_frontier(summary, arms, "frechet"), x=RATE, y=DISTANCE, level=floor), 3.6))
    panels.append((frontier_panel(_frontier(summary, arms, "bits"), x=RATE, y=BITS), 3.6))
    if summary["prior_sizes"]:
        panels.append((frontier_panel(_by_size(summary, arms, "frechet"), x=SIZE, y=DISTANCE, logarithmic=True), 3.6))
    return panels
