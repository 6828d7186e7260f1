"""Make tables and figures from the JSON lines of bench_kernels.py.

python profiling/bench_report.py profiling/results/cpu/*.jsonl          # a Markdown table per operation and shape
python profiling/bench_report.py out.jsonl --plot plots                 # and a figure per operation
"""

import argparse
import json
from pathlib import Path
from typing import Any

MEASURES = ("MiB", "GB/s", "TFLOP/s", "x floor", "error")
HEADER = f"{'case':<39}{'median ms':>11}{'20 %':>11}{'80 %':>11}" + "".join(format(name, ">10") for name in MEASURES)


def cells(row: dict[str, Any]) -> list[str]:
    """Median, quantiles and MEASURES of a measured row as text, "" if missing."""
    times, mebibytes = [row["ms"][name] for name in ("median", "p20", "p80")], row["extra_bytes"] and row["extra_bytes"] / 2**20
    values = [*times, mebibytes, *(row[name] for name in ("gb_per_s", "tflop_per_s", "times_floor", "error"))]
    forms = (".3f", ".3f", ".3f", ".1f", ".1f", ".3f", ".2f", ".1e")
    return ["" if value is None else format(value, form) for value, form in zip(values, forms, strict=True)]


def show(row: dict[str, Any]) -> str:
    """One line of the table under HEADER."""
    if row["status"] != "ok":
        return f"{row['impl']:<30}{row['status']}"
    times, measures = cells(row)[:3], cells(row)[3:]
    return f"{row['impl']:<30}{row['phase']:<9}" + "".join(f"{t:>11}" for t in times) + "".join(f"{m:>10}" for m in measures)


def software(where: dict[str, Any]) -> str:
    """Versions and number of threads in a row of measurements."""
    return f"{', '.join(f'{name} {v}' for name, v in where['versions'].items() if v)}; threads: {where['threads']}"


def panels_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by operation, shape, dtype and hardware, in order of appearance."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sizes = ", ".join(f"{key} = {size}" for key, size in row["shape"].items())
        panels.setdefault(f"{row['for_op']}, {sizes}, {row['dtype']}, {row['hardware']}", []).append(row)
    return panels


def markdown(rows: list[dict[str, Any]]) -> str:
    """A heading and a table per panel."""
    lines = []
    for title, panel in panels_of(rows).items():
        lines += [f"### {title}", "", f"`{panel[0]['command']}`, {software(panel[0])}", ""]
        lines += [f"| case | phase | median ms | 20 % | 80 % | {' | '.join(MEASURES)} | note |", "| --- " * 11 + "|"]
        for row in panel:
            measured = row["status"] == "ok"
            found = [row["phase"], *cells(row)] if measured else [row["status"].splitlines()[0], *[""] * 8]
            lines.append(f"| {' | '.join([row['impl'], *found, row['note']])} |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """<folder>/<operation>.png: a panel per shape, dtype and phase, a point per case, whiskers from 20 % to 80 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row["status"] == "ok" and row["op"] != "floor" and row["phase"] != "backward"]
    for operation in sorted({row["op"] for row in rows}):
        panels = [
            (f"{title}: {phase}", cases)
            for title, panel in panels_of([row for row in rows if row["op"] == operation]).items()
            for phase in ("forward", "both")
            if (cases := [row for row in panel if row["phase"] == phase])
        ]
        heights = [1 + 0.3 * len(cases) for _, cases in panels]
        figure, axes = pyplot.subplots(
            len(panels), squeeze=False, figsize=(8, sum(heights)), height_ratios=heights, layout="constrained"
        )
        for axis, (title, cases) in zip(axes[:, 0], panels, strict=True):
            cases = sorted(cases, key=lambda row: -row["ms"]["median"])
            low, median, high = ([row["ms"][name] for row in cases] for name in ("p20", "median", "p80"))
            away = [[abs(m - end) for m, end in zip(median, ends, strict=True)] for ends in (low, high)]
            # Points, not bars, whose length means nothing on a logarithmic axis.
            axis.errorbar(median, [row["impl"] for row in cases], xerr=away, fmt="o", capsize=3)
            axis.set(xscale="log", xlabel="milliseconds: median, 20 % to 80 %", ylim=(-0.6, len(cases) - 0.4))
            axis.xaxis.set_major_formatter(ticker.LogFormatter())
            axis.xaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1, 0.4)))
            axis.grid(axis="x", which="both", alpha=0.3)
            axis.set_title(title, fontsize="small")
        figure.savefig(folder / f"{operation}.png", dpi=120)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what bench_kernels.py --json wrote")
    parser.add_argument("--plot", type=Path, help="write one figure for each operation into this folder (needs matplotlib)")
    arguments = parser.parse_args()
    rows = [json.loads(text) for file in arguments.files for text in file.read_text().splitlines()]
    print(markdown(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
