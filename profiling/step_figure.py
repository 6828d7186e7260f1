"""The figure of profile_step.py: per stage, time by block on the left and memory over one step on the right."""

import io
from pathlib import Path
from typing import Any

from clock import phases_of

COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "data": "#9d9d9d", "update": "#54a24b"}
WORDS = {"forward": "forward", "backward": "backward", "data": "loading data", "update": "update of weights"}


def draw(profiles: dict[str, dict], title: str, path: Path) -> None:
    """Write the figure to `path`. Blocks from top to bottom in order of execution."""
    import matplotlib
    from PIL import Image  # comes with matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1.6 + 0.27 * len(found["blocks"]) for found in profiles.values()]
    figure, axes = pyplot.subplots(
        len(profiles), 2, squeeze=False, figsize=(13, 1 + sum(heights)), height_ratios=heights, width_ratios=[1.25, 1],
        layout="constrained",
    )  # fmt: skip
    figure.suptitle(f"Where the time and memory of a training step go: {title}", fontsize="medium")
    for (left, right), (name, found) in zip(axes, profiles.items(), strict=True):
        draw_blocks(left, name, found)
        draw_memory(right, name, found)
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(file).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size, for the repository


def draw_blocks(axis: Any, name: str, found: dict) -> None:
    blocks = found["blocks"]
    totals = {block: sum(cells.values()) for block, cells in blocks.items()}
    everything, longest = sum(totals.values()), max(totals.values())
    ends = [0.0] * len(blocks)
    for phase, colour in COLOURS.items():
        widths = [cells.get(phase, 0.0) for cells in blocks.values()]
        if any(widths):
            axis.barh(list(blocks), widths, left=ends, color=colour, label=WORDS[phase])
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, total in enumerate(totals.values()):
        words = f"{total:.1f} ms, {total / everything:.0%}" if total >= 0.05 else "less than 0.1 ms"
        axis.text(total + 0.01 * longest, row, words, va="center", fontsize="small")
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds of one step", xlim=(0, 1.25 * longest))
    speed = f"{found['ms']['median']:.1f} ms per step of {found['batch']} images = {found['images_per_second']:.0f} images/s"
    shares = ", ".join(f"{WORDS[part]} {ms / sum(found['parts'].values()):.0%}" for part, ms in found["parts"].items())
    axis.set_title(f"{name}: {speed}\n{shares}", fontsize="medium", loc="left")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", fontsize="small")


def draw_memory(axis: Any, name: str, found: dict) -> None:
    recorded = found["recorded"]
    memory, stamps = recorded["memory"], recorded["stamps"]
    end = stamps[-1][2]
    points = [(ms, size / 2**20) for ms, size in memory if ms <= end]
    points.append((end, points[-1][1]))
    peak = max(size for _, size in points)
    for phase, begin, until in phases_of(stamps):
        axis.axvspan(begin, until, color=COLOURS[phase], alpha=0.18, linewidth=0)
        if until - begin > 0.08 * end:
            axis.text((begin + until) / 2, 1.12 * peak, WORDS[phase], ha="center", va="center", fontsize="small")
    axis.step(*zip(*points, strict=True), where="post", color="black", linewidth=1)
    kept = sum(recorded["state_bytes"].values()) / 2**20
    axis.axhline(kept, color="black", linewidth=1, linestyle=(0, (2, 2)))
    axis.text(0.01 * end, 0.97 * kept, "always there: weights, optimiser, average of weights", va="top", fontsize="small")
    axis.set(xlim=(0, end), ylim=(0, 1.2 * peak), ylabel="MiB allocated")
    axis.set_xlabel("milliseconds into one step that the profiler watches")
    axis.set_title(f"{name}: memory over one step, at most {peak:.4g} MiB", fontsize="medium", loc="left")
