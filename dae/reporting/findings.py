"""Findings of a comparison in words and figures, shared by its page, the terminal and docs/evidence.md."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from dae.comparison.results import BY_KEY, Measure, verdict_in_words
from dae.priors import PRIORS, PriorFamily
from dae.quantizers import BOTTLENECKS, Bottleneck

COLUMNS = ("frechet", "bits", "rate_bits", "psnr", "memorised", "recognised")  # of `results_markdown`


# ---- figures ----


def signed(value: float | None, digits: int = 2) -> str:
    """`+1.20`, `−0.30`; a dash for None."""
    return "–" if value is None else f"{value:+,.{digits}f}".replace("-", "−")


def with_interval(measure: Measure, row: dict | None, sign: bool = False) -> str:
    """A mean with its interval, if any: `12.3 [10.1, 14.5] dB`."""
    if row is None or row["mean"] is None:
        return "–"
    factor, unit = (100, "\u00a0%") if measure.unit == "%" else (1, f"\u00a0{measure.unit}" if measure.unit else "")

    def figure(value: float) -> str:
        return f"{factor * value:{'+' if sign else ''},.{measure.digits}f}".replace("-", "−")

    ends = "" if row["low"] is None else f" [{figure(row['low'])}, {figure(row['high'])}]"
    return f"{figure(row['mean'])}{ends}{unit}"


def with_verdict(key: str, row: dict | None, between: str = " ") -> str:
    """A difference with its interval and verdict; a dash if there is none."""
    measure = BY_KEY[key]
    return "–" if row is None else f"{with_interval(measure, row, sign=True)}{between}{verdict_in_words(measure, row)}"


def with_seeds(key: str, row: dict) -> str:
    """A difference in figures: `−3.05 [−3.26, −2.84]; 4 of 5 seeds`."""
    pairs = f"{row['n']} of {row['of']} seeds" if row["n"] < row["of"] else f"{row['n']} seed{'s' if row['n'] > 1 else ''}"
    return f"{with_interval(BY_KEY[key], row, sign=True)}; {pairs}"


def in_percent(summary: dict, row: dict) -> tuple[str, str]:
    """A difference of distances in % of the baseline's distance, and of that of training images; dashes without one."""
    own = sum(row["baseline"]) / len(row["baseline"]) if row["baseline"] else None

    def share(of: float | None) -> str:
        return f"{signed(round(100 * row['mean'] / of), 0)}\u00a0%" if of and row["mean"] is not None else "–"

    return share(own), share(summary["facts"]["floor"]["frechet"])


def distance_in_figures(summary: dict, row: dict, base: str | None = None) -> str:
    """A difference in generation distance with interval and seeds, and in percent of the reference distances."""
    ours, floor = in_percent(summary, row)
    scale = "" if ours == "–" else f" ({ours} of {base or summary['baseline']}'s distance, {floor} of training images')"
    return with_seeds("frechet", row) + scale


def adjusted_p(row: dict) -> str:
    """p after Holm's adjustment; a dash if there is none."""
    return "–" if row["p"] is None else f"{row['adjusted']:.3f}" if row["adjusted"] >= 0.001 else "< 0.001"


# ---- sentences ----


def by_verdict(key: str, rows: dict[str, dict]) -> dict[str, list[str]]:
    """Names of arms by their `verdict_in_words`, in the order better, worse, no difference shown, not known."""
    words = ("better", "worse", "higher", "lower", "no difference shown", "not known")
    found = {word: [name for name, row in rows.items() if verdict_in_words(BY_KEY[key], row) == word] for word in words}
    return {word: names for word, names in found.items() if names}


def in_short(summary: dict, rows: dict[str, dict], base: str | None = None) -> str:
    """One sentence on which arms are better or worse than `base`, the baseline, for one table of differences.

    Arms without results are named too, and those with diverged trials are marked.
    """
    base, arms = base or summary["baseline"], {arm["name"]: arm for arm in summary["arms"]}
    words = {"better": f"better than {base}", "worse": f"worse than {base}", "not known": "not known, for want of two seeds"}
    groups = {words.get(word, word): names for word, names in by_verdict("frechet", rows).items()}
    if lost := [name for name, arm in arms.items() if arm["diverged"] and not arm["finished"] and name != base]:
        groups["no result"] = lost
    flagged = {
        name: name + (f" ({arm['diverged']} of {arm['trials']} diverged)" if arm["diverged"] else "")
        for name, arm in arms.items()
    }
    said = "; ".join(f"{word}: {', '.join(flagged[name] for name in names)}" for word, names in groups.items())
    itself = f" {flagged[base]} itself." if arms[base]["diverged"] else ""
    return (f"{said[0].upper()}{said[1:]}." if said else f"No arm can be held against {base}.") + itself


def caveats(summary: dict, rows: dict[str, dict]) -> str:
    """How differences are tested, and what the intervals leave out; empty if nothing applies."""
    words, tested = [], {name: row for name, row in rows.items() if row["p"] is not None}
    if len(tested) > 1:
        words.append(
            f"These are {len(tested)} comparisons at once: a difference counts as shown if its p is below "
            f"{1 - summary['level']:.2f} after Holm's adjustment for that. The intervals are each arm's own, not adjusted."
        )
        if alone := [name for name, row in tested.items() if row["alone"] != row["verdict"]]:
            words.append(f"By its own interval, which leaves out 0, {' and '.join(alone)} would count, too.")
    if any(arm["diverged"] for arm in summary["arms"]):
        words.append("The figures know only the trials that did not diverge, and so flatter an arm of which some did.")
    return " ".join(words)


def answer_lines(summary: dict, rows: dict[str, dict] | None) -> list[str]:
    """The result of one table of generation distances, for a terminal: summary, figures per arm, caveats."""
    if rows is None:
        return []
    figures = [f"  {name}: {distance_in_figures(summary, row)}" for name, row in rows.items()]
    return [in_short(summary, rows), *figures, *filter(None, [caveats(summary, rows)])]


def budgets(summary: dict) -> str:
    """What equal steps mean for encoder and decoder, and which arms generate images with another decoder."""
    by_steps: dict[tuple[int, int], list[str]] = {}
    for arm in summary["arms"]:
        by_steps.setdefault((arm["encoder_steps"], arm["decoder_steps"]), []).append(arm["name"])
    parts = [f"{', '.join(names)}: encoder {e:,}, decoder {d:,}" for (e, d), names in by_steps.items()]
    words = "The encoder and the decoder that makes the images are trained equally long in all arms"
    if len(parts) > 1:
        words = "Steps are equal in sum only; the encoder and the decoder that makes the images are not trained equally long"
    words += f" (steps of {'; of '.join(parts)})."
    usual = next(arm["decoder"] for arm in summary["arms"] if arm["name"] == summary["baseline"])
    others = [f"{arm['name']} ({arm['decoder']})" for arm in summary["arms"] if arm["decoder"] != usual]
    return words + (f" The decoder is that of {summary['baseline']} in all but {', '.join(others)}." if others else "")


def latent_type(summary: dict) -> tuple[type[Bottleneck], PriorFamily, bool]:
    """The bottleneck, the family of the prior, and whether the decoder had an adversarial loss."""
    names = summary["latent_type"] if "latent_type" in summary else summary["carrier"]  # the key in earlier versions
    bottleneck, family, *adversarial = names.split(" + ")
    return BOTTLENECKS[bottleneck], PRIORS[family], bool(adversarial)


def rate_means(summary: dict) -> str:
    """Definition of the rate for this comparison's bottleneck."""
    rate = "the mean Kullback-Leibler divergence of an image's latent distribution from a Gaussian with the moments of them all"
    if latent_type(summary)[0].discrete:
        rate = "the entropy of the codes as if the tokens of an image were independent"
    return f"Rate: {rate}, an upper bound of the information that the latent has of the image, not that information itself."


def bits_mean(summary: dict) -> str:
    """Definition of the bits under the prior; only some priors are class-conditional, and only with labels."""
    words = "Bits under the prior: what the trained prior needs to write down the latent of a held-out image"
    if summary["facts"].get("labelled"):
        words += ", not told its class" if latent_type(summary)[1].fitted else ", told the image's class"
    return words + "."


# ---- Markdown ----


def markdown_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def results_markdown(summary: dict) -> str:
    """The table of all arms with intervals and paired differences, and definitions of its numbers."""
    measures = [BY_KEY[k] for k in COLUMNS if any(arm["measures"][k] for arm in summary["arms"])]
    base, equal, rows = summary["baseline"], summary["equal_rate"], []
    header = ["arm", *(m.name for m in measures), f"distance minus {base}'s", "p (Holm)"]
    header += [f"the same at equal rate (seeds inside {base}'s rates)"] if equal else []
    for arm in summary["arms"]:
        name, lost = arm["name"], missing(arm)
        cells = [name + (f" ({lost} of {arm['trials']})" if lost else "")]
        cells += [with_interval(m, arm["measures"][m.key]) for m in measures]
        row = summary["differences"]["frechet"].get(name)
        cells += [with_verdict("frechet", row), adjusted_p(row) if row else "–"]
        if equal:
            at = equal["frechet"].get(name)
            cells.append(with_verdict("frechet", at) + (f" ({at['n']} of {at['of']})" if at else ""))
        rows.append(cells)
    floor, copies = summary["facts"]["floor"]["frechet"], summary["facts"].get("memorised_heldout")
    note = (
        f"Means over {len(summary['seeds'])} seeds with their {100 * summary['level']:.0f} % intervals, cut at what is possible; "
        f"what a difference is said to be goes by p (Holm). Training images are {floor:,.2f} from the held-out ones"
        + ("." if copies is None else f"; of the held-out images themselves {100 * copies:.1f} % count as near-copies.")
    )
    left_out = [f"- Left out: {lost['trial']} {lost['kind']}: {lost['why']}" for lost in summary["left_out"]]
    return "\n".join([*markdown_table(header, rows), "", note, *left_out]) + "\n"


def missing(arm: Mapping[str, Any]) -> str:
    """Counts of an arm's trials without a result: `1 diverged, 2 failed`; empty if there are none."""
    return ", ".join(f"{arm[kind]} {kind}" for kind in ("diverged", "failed") if arm[kind])
