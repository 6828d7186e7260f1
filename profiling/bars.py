"""The bars of speed and exactness, held against the JSON lines that the scripts here wrote: a Markdown table.

    python profiling/bars.py out/*.jsonl > summary.md

A bar is met, not met, or not measured, with the reason: nobody measured it, the peer is not installed, or it did not run. A ratio
is of two medians of one run; where several runs have both, of the last. Lines that cannot be read are counted and left out.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Panel = tuple[str, dict[str, int], str]

# What the bars of operations are measured on; `bench_kernels.py --bars` measures these.
LARGE_NORM: Panel = ("group_norm_silu", {"B": 8, "C": 128, "H": 256, "L": 1}, "bfloat16")
SMALL_NORM: Panel = ("group_norm_silu", {"B": 16, "C": 512, "H": 16, "L": 1}, "bfloat16")
SEARCHES: dict[int, Panel] = {
    D: ("nearest_code", {"N": N, "K": K, "D": D}, "bfloat16")
    for D, N, K in ((256, 32768, 16384), (64, 65536, 1024), (8, 262144, 16384), (512, 32768, 8192))
}
ENTROPY: Panel = ("linear_cross_entropy", {"N": 8192, "V": 16384, "D": 1024}, "bfloat16")
LARGE_ENTROPY: Panel = ("linear_cross_entropy", {"N": 8192, "V": 65536, "D": 1024}, "bfloat16")
SINKHORN: Panel = ("sinkhorn_divergence", {"N": 16384, "M": 16384, "D": 64}, "float32")
SAMPLING: Panel = ("sample_tokens", {"B": 32, "T": 256, "width": 768, "depth": 12}, "bfloat16")
PANELS: list[Panel] = [LARGE_NORM, SMALL_NORM, *SEARCHES.values(), ENTROPY, LARGE_ENTROPY, SINKHORN, SAMPLING]

STEP_TFLOP = 18.2  # of a stage-1 step of the VQGAN for 256x256 images, batch 16
FAMILIES = ("random", "uniform", "normalized", "pairs")  # of exactness.py
CHAINS = {
    "digits": ("train_dae", "encode", "train_prior", "sample"),
    "photos-kl": ("train_dae", "encode", "train_prior", "sample"),
}


class NotMeasured(Exception):
    """Why there is no figure."""


@dataclass(frozen=True)
class Bar:
    """A figure that must be at least, or at most, a limit. `part` is that of gpu_session.sh which measures it."""

    part: str
    name: str
    figure: Callable[[list[Row]], float]
    limit: float
    at_least: bool = True
    unit: str = ""

    def met(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def words(self, figure: float) -> str:
        return f"{100 * figure:.0f} %" if self.unit == "%" else f"{figure:.4g}{' ' * bool(self.unit)}{self.unit}"


def one_run(rows: list[Row], panel: Panel, *wanted: tuple[str, str]) -> list[Row]:
    """The row of each (case, phase), all measured in one run: the last that has them.

    A case that ends with * stands for all whose names begin so: the fastest of them.
    """
    op, shape, dtype = panel
    rows = [row for row in rows if (row.get("for_op"), row.get("shape"), row.get("dtype")) == (op, shape, dtype)]

    def named(row: Row, case: str) -> bool:
        return row["impl"].startswith(case[:-1]) if case.endswith("*") else row["impl"] == case

    missing = "not in what was measured"
    for run in sorted({row.get("run", "") for row in rows}, reverse=True):
        found = []
        for case, phase in wanted:
            of_case = [row for row in rows if row.get("run", "") == run and named(row, case)]
            if ran := [row for row in of_case if row["status"] == "ok" and row["phase"] == phase]:
                found.append(min(ran, key=lambda row: row["ms"]["median"]))
            else:
                missing = f"{case.rstrip('*')}: {of_case[-1]['status'] if of_case else 'not in what was measured'}"
        if len(found) == len(wanted):
            return found
    raise NotMeasured(missing)


def times(panel: Panel, phase: str, slower: str, faster: str) -> Callable[[list[Row]], float]:
    """How many times as long the first case takes as the second."""

    def figure(rows: list[Row]) -> float:
        a, b = one_run(rows, panel, (slower, phase), (faster, phase))
        return a["ms"]["median"] / b["ms"]["median"]

    return figure


def share_of_copy(panel: Panel, phase: str, case: str) -> Callable[[list[Row]], float]:
    """The least bytes of the operation per second, beside those of the run's copy."""

    def figure(rows: list[Row]) -> float:
        ours, copy = one_run(rows, panel, (case, phase), ("copy", "forward"))
        return ours["gb_per_s"] / copy["gb_per_s"]

    return figure


def share_of_memory(panel: Panel, case: str, peer: str) -> Callable[[list[Row]], float]:
    """Extra bytes of forward and backward, beside the peer's."""

    def figure(rows: list[Row]) -> float:
        ours, theirs = (row["extra_bytes"] for row in one_run(rows, panel, (case, "both"), (peer, "both")))
        if not ours or not theirs:
            raise NotMeasured("no memory was measured")
        return ours / theirs

    return figure


def steps(rows: list[Row], compiled: bool) -> tuple[Row, Row]:
    """Ours at its fastest and diffusers' at its fastest, eager or compiled, in the last run that has both."""
    runs = [row for row in rows if row.get("config", "").startswith("imagenet256") and isinstance(row.get("steps"), list)]
    for run in reversed(runs):
        done = [step for step in run["steps"] if step.get("ms")]
        ours = [step for step in done if step["step"].startswith("ours")]
        theirs = [step for step in done if step["step"].startswith("diffusers") and ("compiled" in step["step"]) == compiled]
        if ours and theirs:
            return tuple(min(group, key=lambda step: step["ms"]["median"]) for group in (ours, theirs))  # type: ignore[return-value]
    raise NotMeasured("no run has both steps" if runs else "not in what was measured")


def step_speed(compiled: bool) -> Callable[[list[Row]], float]:
    def figure(rows: list[Row]) -> float:
        ours, theirs = steps(rows, compiled)
        return theirs["ms"]["median"] / ours["ms"]["median"]

    return figure


def step_memory(rows: list[Row]) -> float:
    ours, theirs = steps(rows, False)
    if not ours["peak_bytes"] or not theirs["peak_bytes"]:
        raise NotMeasured("no memory was measured")
    return ours["peak_bytes"] / theirs["peak_bytes"]


def step_rate(rows: list[Row]) -> float:
    """TFLOP per second of our fastest step."""
    return 1000 * STEP_TFLOP / steps(rows, False)[0]["ms"]["median"]


def host_time(op: str | None, phase: str, field: str) -> Callable[[list[Row]], float]:
    """The most microseconds of an operation's call that host_overhead.py found."""

    def figure(rows: list[Row]) -> float:
        rows = [row for row in rows if "us" in row and row.get("phase") == phase and op in (None, row["op"])]
        found = {row["op"]: row["us"]["median"] if field == "us" else row[field] for row in rows}  # the last of each
        if not found:
            raise NotMeasured("not in what was measured")
        return max(found.values())

    return figure


def wrong_codes(rows: list[Row]) -> float:
    found = {row["family"]: row for row in rows if "family" in row and row["impl"] == "triton" and row["precision"] == "exact"}
    if absent := [family for family in FAMILIES if family not in found]:
        raise NotMeasured(f"no {', '.join(absent)}")
    return sum(row["wrong"] for row in found.values())


def failing_tests(rows: list[Row]) -> float:
    ends = [row for row in rows if "tests" in row]
    if not ends:
        failed = sum("test" in row for row in rows)
        raise NotMeasured(f"cut off, {failed} had failed" if failed else "not in what was measured")
    if ends[-1]["interrupted"]:
        raise NotMeasured(f"cut off after {ends[-1]['tests']} tests, {ends[-1]['failed']} failed")
    return ends[-1]["failed"]


def failing_recipes(chain: str) -> Callable[[list[Row]], float]:
    def figure(rows: list[Row]) -> float:
        status = {row["recipe"]: row["status"] for row in rows if row.get("chain") == chain}
        failed = [recipe for recipe, code in status.items() if code]
        if not failed and (absent := [recipe for recipe in CHAINS[chain] if recipe not in status]):
            raise NotMeasured(f"not run: {', '.join(absent)}")
        return len(failed)

    return figure


def all_bars() -> Iterator[Bar]:
    """Every bar, the parts and the most important first."""
    kernels = "kernels"
    for phase in ("forward", "backward"):
        share = share_of_copy(LARGE_NORM, phase, "triton")
        yield Bar(kernels, f"GN+SiLU [8,128,256,256] bf16, {phase}: share of copy bandwidth", share, 0.7, unit="%")
    for phase, words in (("forward", "forward"), ("both", "forward and backward")):
        for panel, size, limit in ((LARGE_NORM, "[8,128,256,256]", 1.5), (SMALL_NORM, "[16,512,16,16]", 1.2)):
            speed = times(panel, phase, "compile", "triton")
            yield Bar(kernels, f"GN+SiLU {size} bf16, {words}: speed beside torch.compile", speed, limit, unit="x")
    words = "N=32,768 K=16,384 D=256 bf16: share of the product's rate"
    yield Bar(
        kernels, f"nearest_code fast, {words}", times(SEARCHES[256], "forward", "product alone", "triton, fast"), 0.7, unit="%"
    )
    for D, panel in SEARCHES.items():
        size = f"N={panel[1]['N']:,} K={panel[1]['K']:,} D={D} bf16"
        speed = times(panel, "forward", "flash-kmeans", "triton, fast")
        yield Bar(kernels, f"nearest_code fast, {size}: speed beside flash-kmeans", speed, 1.2, unit="x")
        longer = times(panel, "forward", "triton, exact", "triton, fast")
        yield Bar(kernels, f"nearest_code exact, {size}: time beside fast", longer, 1.25, False, "x")
    plain, size = "linear + cross_entropy", "linear_cross_entropy N=8,192 V=16,384 D=1,024 bf16, forward and backward"
    yield Bar(kernels, f"{size}: time beside {plain}", times(ENTROPY, "both", "triton", plain), 1.1, False, "x")
    yield Bar(kernels, f"{size}: extra memory beside {plain}", share_of_memory(ENTROPY, "triton", plain), 0.25, False, "x")
    for peer in ("Liger", "cut-cross-entropy"):
        speed, words = times(LARGE_ENTROPY, "both", peer, "triton"), size.replace("16,384", "65,536")
        yield Bar(kernels, f"{words}: speed beside {peer}", speed, 1.0, unit="x")
    speed, words = times(SINKHORN, "both", "flash-sinkhorn", "triton"), "same updates, cost and precision"
    yield Bar(kernels, f"sinkhorn_divergence N=M=16,384 D=64: speed beside flash-sinkhorn, {words}", speed, 1.0, unit="x")
    speed = times(SAMPLING, "forward", "whole prefix", "cached*")
    yield Bar(kernels, "sampling 256 tokens, batch 32, width 768, depth 12: speed beside the prefix anew", speed, 5.0, unit="x")
    host = "host time of a call without its launches, the slowest operation's"
    for phase, limit in (("forward", 15.0), ("both", 30.0)):
        words = "forward" if phase == "forward" else "forward and backward, two operations"
        yield Bar(kernels, f"{host}, {words}", host_time(None, phase, "beside_us"), limit, False, "us")
    real = host_time("group_norm_silu", "forward real", "us")
    yield Bar(kernels, "GN+SiLU forward, host time with its launches", real, 60.0, False, "us")

    name = "VQGAN 256x256 stage-1 step, batch 16, bf16"
    yield Bar("step", f"{name}: speed beside diffusers' blocks, eager", step_speed(False), 2.2, unit="x")
    yield Bar("step", f"{name}: speed beside diffusers' blocks under torch.compile", step_speed(True), 1.3, unit="x")
    yield Bar("step", f"{name}: peak memory beside diffusers' blocks, eager", step_memory, 0.5, False, "x")
    yield Bar("step", f"{name}: rate", step_rate, 250.0, unit="TFLOP/s")

    yield Bar("checks", "nearest_code exact: queries with a wrong code, of all families", wrong_codes, 0, False)
    yield Bar("checks", "tests of the kernels on this device that fail", failing_tests, 0, False)
    yield Bar("chain", "digits, bf16: recipes that fail", failing_recipes("digits"), 0, False)
    yield Bar("chain", "photos-kl, bf16, compile=true: recipes that fail", failing_recipes("photos-kl"), 0, False)


def judged(rows: list[Row], bars: Iterable[Bar]) -> Iterator[tuple[Bar, str, str]]:
    """Each bar, its figure in words, and "met", "not met" or "not measured"."""
    for bar in bars:
        try:
            figure = bar.figure(rows)
        except NotMeasured as why:
            yield bar, " ".join(str(why).split())[:120].replace("|", "/"), "not measured"
        else:
            yield bar, bar.words(figure), "met" if bar.met(figure) else "not met"


def summary(rows: list[Row], unreadable: int = 0, small: bool = False) -> str:
    """The table, and above it what it was measured with. With `small` no bar is judged."""
    bars = [(bar, words, "not judged" if small else state) for bar, words, state in judged(rows, all_bars())]
    count = {state: sum(s == state for _, _, s in bars) for state in ("met", "not met", "not measured")}
    hardware = sorted({row["hardware"] for row in rows if row.get("hardware")})
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in (row.get("versions") or {}).items():
            if version:
                versions.setdefault(name, set()).add(version)
    words = "Small sizes, which try the scripts: no bar is judged" if small else ", ".join(f"{n} {s}" for s, n in count.items())
    lines = ["# Bars", "", f"{words}.", ""]
    if hardware:
        software = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in versions.items())
        lines += [f"Measured on {'; '.join(hardware)}; {software}.", ""]
    if len(hardware) > 1:
        lines += ["**Several machines: each ratio is of one of them, and absolute figures do not compare.**", ""]
    if unreadable:
        lines += [f"{unreadable} lines could not be read.", ""]
    lines += ["| part | what | figure | bar | |", "| --- | --- | --- | --- | --- |"]
    for bar, words, state in bars:
        lines.append(f"| {bar.part} | {bar.name} | {words} | {'>=' if bar.at_least else '<='} {bar.words(bar.limit)} | {state} |")
    return "\n".join(lines) + "\n"


def read(files: Iterable[Path]) -> tuple[list[Row], int]:
    """The rows of the files that are there, and how many lines are no JSON object: the last one of a killed run, say."""
    rows, unreadable = [], 0
    for file in files:
        for text in file.read_text().splitlines() if file.is_file() else []:
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                unreadable += 1
    return rows, unreadable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines of the other scripts; one that is not there is left out")
    parser.add_argument("--small", action="store_true", help="judge no bar: what was run only tries the scripts")
    arguments = parser.parse_args()
    print(summary(*read(arguments.files), arguments.small), end="")


if __name__ == "__main__":
    main()
