"""docs/evidence.md: what several comparisons show about decoupling; all sentences are generated from results."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterable, Mapping

from dae.comparison.experiments import EXPERIMENTS
from dae.comparison.pooling import OUTCOMES, pool, pooled_predictors
from dae.comparison.results import BY_KEY
from dae.reporting.findings import (
    bits_mean,
    budgets,
    caveats,
    distance_in_figures,
    in_short,
    markdown_table,
    rate_means,
    results_markdown,
    signed,
)

TEMPLATE = Path(__file__).with_suffix(".md")


def evidence_document(summaries: Mapping[str, dict], command: str) -> str:
    """The document as Markdown.

    Args:
        summaries: results of `summarize_comparison`, by the names of `EXPERIMENTS`.
        command: the one that made them.
    """
    first, pooled = next(iter(summaries.values())), pool(summaries)
    baseline, versions = first["baseline"], first["facts"]["versions"]
    finetuned = next((s["equal_encoder"]["baseline"] for s in summaries.values() if s["equal_encoder"]), None)
    decoupled = {arm["name"] for s in summaries.values() for arm in s["arms"] if arm["decoupled"]}
    said = {says.__name__.strip("_"): said_of_all(says, summaries) for says in (budgets, _tuned, rate_means, bits_mean)}
    blocks = said | {
        "incomplete": incomplete(summaries),
        "answers": pooled_answers(pooled, baseline, decoupled, finetuned),
        "by_comparison": by_comparison(summaries, pooled, baseline, finetuned),
        "pooled": pooled_tables(pooled, finetuned),
        "costs": _costs(summaries),
        "predictors": best_predictor(pooled_predictors(summaries)),
        "sections": [line for name, summary in summaries.items() for line in _section(name, summary)],
    }
    return TEMPLATE.read_text().format(
        command=command,
        trials=sum(s["trials"]["finished"] for s in summaries.values()),
        core_hours=sum(s["seconds"] for s in summaries.values()) / 3600,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        arms=len(first["arms"]),
        seeds=", ".join(map(str, first["seeds"])),
        baseline=baseline,
        **{name: "\n".join(lines) for name, lines in blocks.items()},
    )


def incomplete(summaries: Iterable[str]) -> list[str]:
    """A warning if comparisons are missing, with the blank lines after it."""
    missing = [name for name in EXPERIMENTS if name not in summaries]
    return [f"**This is not all: {', '.join(missing)} were not run.**", "", ""] if missing else []


def _tuned(summary: dict) -> str:
    if not summary["tuning"]:
        return "No arm was tuned: all trained with one learning rate."
    of = "the autoencoder and of the prior" if summary["tuning"]["prior_learning_rates"] else "the autoencoder"
    return (
        f"Each arm, the baseline *{summary['baseline']}* too, was first tuned over the same learning rates of {of}, with another "
        "seed and on training images set aside."
    )


def said_of_all(says: Callable[[dict], str], summaries: Mapping[str, dict]) -> list[str]:
    """A statement on each comparison: once if all share it, else each with the comparisons' names."""
    said: dict[str, list[str]] = {}
    for name, summary in summaries.items():
        said.setdefault(says(summary), []).append(name)
    return list(said) if len(said) == 1 else [f"In {', '.join(names)}: {words}" for words, names in said.items()]


def pooled_answers(
    pooled: Mapping[str, dict | None], baseline: str, decoupled: set[str], finetuned: str | None = None
) -> list[str]:
    """The questions, answered by counts of differences shown after Holm's adjustment, then per decoupled arm."""
    lines = []
    no_encoder = "no arm trains its encoder for as many steps and goes on with its decoder"
    for key, title, other, untrained in (
        ("equal_steps", "equal steps", baseline, ""),
        ("equal_encoder", "equal steps of the encoder", finetuned, no_encoder),
        ("equal_rate", "equal rate", baseline, "no frontier of several rates was trained"),
    ):
        arms = {name: row for name, row in (pooled[key] or {}).items() if name in decoupled}
        if not arms:
            why = untrained if pooled[key] is None else "no decoupled arm has a result"
            lines += [f"**At {title}** nothing can be said: {why if decoupled else 'no arm is decoupled'}.", ""]
            continue
        better, worse, same, unknown = (sum(row[word] for row in arms.values()) for word in OUTCOMES)
        total, unjudged = better + worse + same + unknown, f"; {unknown} could not be judged" if unknown else ""
        lines += [
            f"**Does decoupling help at {title}?** Of {total} pairs of a decoupled arm and a comparison, the decoupled arm's "
            f"samples were nearer to the held-out images than {other}'s in {better}, farther in {worse}, and in {same} no "
            f"difference was shown{unjudged}.",
            "",
            *(f"- {name}: {_over_all(row)}" for name, row in arms.items()),
            "",
        ]
    return lines


def _over_all(row: dict) -> str:
    """One arm over all comparisons."""
    ratio, counts = row["ratio"], ", ".join(f"{word} {row[word]}" for word in OUTCOMES if row[word])
    inside = f"{row['seeds']} of {row['of']} seeds have a difference"
    if ratio is None or ratio["low"] is None:
        return f"{counts}; too few comparisons for a mean ({inside})."
    return f"{counts}; {_interval(ratio)} times the distance in the mean of {ratio['n']} comparisons ({inside})."


def _interval(row: dict | None) -> str:
    """`0.93 [0.90, 0.96]`; only the mean for one comparison; a dash for none."""
    if row is None:
        return "–"
    return f"{row['mean']:.2f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")


def by_comparison(
    names: Iterable[str], pooled: Mapping[str, dict | None], baseline: str, finetuned: str | None = None
) -> list[str]:
    """Every arm in every comparison: the verdict, and its distance relative to the other's."""
    against = {"equal_steps": baseline, "equal_encoder": f"{finetuned}, equal steps of the encoder"}
    names, rows = list(names), []
    for key, other in (against | {"equal_rate": f"{baseline}, equal rate"}).items():
        for arm, row in (pooled[key] or {}).items():
            ratios = {name: f", {ratio:.2f}" for name, ratio in row["ratios"].items()}
            rows.append([arm, other, *(row["verdicts"].get(name, "–") + ratios.get(name, "") for name in names)])
    title = "In each comparison, with the arm's distance in multiples of the other's:"
    return [title, "", *markdown_table(["arm", "against", *names], rows), ""]


def pooled_tables(pooled: Mapping[str, dict | None], finetuned: str | None = None) -> list[str]:
    """The tables of `pool`, one row per arm; `finetuned` is the reference arm at equal encoder steps."""
    header = ["arm", *OUTCOMES, "distance / other's", "comparisons in it", "seeds with a difference"]
    encoder = f"At equal steps of the encoder, against {finetuned} instead"
    lines = []
    for key, title in (("equal_steps", "At equal steps"), ("equal_encoder", encoder), ("equal_rate", "At equal rate")):
        rows = []
        for name, row in (pooled[key] or {}).items():
            counts, entered = [row[word] for word in OUTCOMES], row["ratio"]["n"] if row["ratio"] else 0
            of_seeds = f"{row['seeds']} of {row['of']}"
            rows.append([name, *counts, _interval(row["ratio"]), f"{entered} of {sum(counts)}", of_seeds])
        if rows:
            lines += [f"{title}:", "", *markdown_table(header, rows), ""]
    return lines


def _costs(summaries: Mapping[str, dict]) -> list[str]:
    """Bits under the prior, rate, PSNR and copies: arm minus baseline, counts of comparisons per direction."""
    columns = {"rate_bits": "rate, bits", "bits": "bits under the prior", "psnr": "PSNR, dB"}
    columns |= {"memorised": "near-copies, percentage points"}
    lines = []
    for title, key in (("equal steps", "differences"), ("equal rate", "equal_rate")):
        tables = [s[key] for s in summaries.values() if s[key]]
        known = {name: words for name, words in columns.items() if any(name in table for table in tables)}
        arms = dict.fromkeys(arm for table in tables for arm in table["frechet"])
        rows = [[arm, *(_ways(tables, arm, name) for name in known)] for arm in arms]
        if rows:
            lines += [*markdown_table([f"at {title}", *known.values()], rows), ""]
    return lines


def _ways(tables: list[dict], arm: str, key: str) -> str:
    """In how many tables a measure of an arm is shown to be higher or lower, and the range of its mean differences."""
    rows = [row for table in tables if (row := table[key].get(arm)) and row["mean"] is not None]
    verdicts = [0 if row["low"] is None else row["verdict"] for row in rows]
    factor, digits = (100, 2) if key == "memorised" else (1, 1)
    means = [factor * row["mean"] for row in rows]
    between = f" ({signed(min(means), digits)} to {signed(max(means), digits)})" if means else ""
    return f"{verdicts.count(1)} higher, {verdicts.count(-1)} lower, {verdicts.count(0)} neither{between}"


def best_predictor(rows: list[dict]) -> list[str]:
    """The best-ranking number, if significant, and tables of those known in all comparisons and in fewer."""
    if not rows:
        return ["No report cards were made, or too few trials finished.", ""]
    best, most = rows[0], rows[0]["n"]
    ranked = [row for row in rows if row["n"] == most]
    if best["low"] is None:
        found = f"One comparison cannot tell: *{best['name']}* has the strongest correlation, {_interval(best)}."
    else:
        next_one, rivals = ranked[1]["name"] if len(ranked) > 1 else None, best["rivals"]
        clear = sum(row["low"] > 0 or row["high"] < 0 for row in ranked)
        found = (
            ("Which is best cannot be told: " if next_one in rivals else "")
            + f"*{best['name']}* has the strongest mean correlation, {_interval(best)}, of {len(ranked)} numbers known in {most} "
            "comparisons"
            + (f"; it does not differ by more than chance from {len(rivals)} of the others" if rivals else "")
            + (f", the next one, *{next_one}*, among them" if next_one in rivals else "")
            + " (paired differences over the comparisons, p after Holm's adjustment). As the strongest it is chosen after the "
            f"fact, which flatters it. The intervals of {clear} of the {len(ranked)} leave out 0; they are not adjusted for "
            f"there being {len(ranked)}."
        )
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
    header = ["predictor", "mean rank correlation", "comparisons"]
    for title, group in (
        ("", ranked),
        ("Known in fewer comparisons, and so not ranked beside those above:", rows[len(ranked) :]),
    ):
        if group:
            table = markdown_table(header, [[row["name"], _interval(row), row["n"]] for row in group])
            lines += [*([title, ""] if title else []), *table, ""]
    return lines


def _section(name: str, summary: dict) -> list[str]:
    """One comparison: answers, table, picture and prior sizes."""
    experiment, counts = EXPERIMENTS[name], summary["facts"]["counts"]
    tables = {"equal steps": (summary["differences"], None), "equal rate": (summary["equal_rate"], None)}
    if encoder := summary["equal_encoder"]:
        tables["equal steps of the encoder"] = encoder, encoder["baseline"]
    words = []
    for title, (table, other) in tables.items():
        if table:
            said = [in_short(summary, table["frechet"], other), caveats(summary, table["frechet"])]
            words += [f"At {title}: {' '.join(said)}".rstrip(), ""]
        if table and other:  # not in the table below
            rows = table["frechet"].items()
            words += [*(f"- {arm}: {distance_in_figures(summary, row, other)}" for arm, row in rows), ""]
    return [
        f"## {experiment.title} on {experiment.data}",
        "",
        f"{experiment.images}; {counts['train']:,} training and {counts['heldout']:,} held-out images.",
        "",
        *words,
        results_markdown(summary),
        f"![Differences and frontiers](evidence/{name}.png)",
        "",
        *_prior_sizes(summary["prior_sizes"]),
    ]


def _prior_sizes(rows: list[dict]) -> list[str]:
    """Distance and bits by the size of the prior, for every arm."""
    if not rows:
        return []
    parameters = {row["size"]: row["parameters"] for row in sorted(rows, key=lambda row: row["size"])}
    columns = [(key, size) for key in ("frechet", "bits") for size in parameters]
    header = ["arm", *(f"{BY_KEY[key].name}, {parameters[size]:,} parameters" for key, size in columns)]
    cells = {(row["arm"], key, row["size"]): f"{row[key]['mean']:.2f}" for row in rows for key in ("frechet", "bits") if row[key]}
    table = [[arm, *(cells.get((arm, *column), "–") for column in columns)] for arm in dict.fromkeys(row["arm"] for row in rows)]
    return ["By the size of the prior:", "", *markdown_table(header, table), ""]
