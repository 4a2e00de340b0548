"""The plots of a run: ratios to the peers, where an iteration's time goes, and how the cost of a token grows.

Small SVG files that change only with the numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.tables import LABELS, generation_seconds, iteration_seconds, peak, per_token, ratio_of_medians

OURS, THEIRS, OTHER = "#1b6ca8", "#c8553d", "#8a8a8a"
rcParams.update(
    {
        "svg.hashsalt": "threefold",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def draw(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write the plots that the parts of a run allow; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = results["parts"]
    files = []
    if "A" in parts or "B" in parts:
        files.append(_ratios(parts, directory / "ratios.svg"))
        files.append(_times(parts, directory / "iteration.svg"))
    if "D" in parts:
        files.append(_growth(parts["D"], directory / "growth.svg"))
    return files


def _save(figure: Figure, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    return file


def _ratios(parts: dict[str, Any], file: Path) -> Path:
    """How many times faster, or smaller, threefold is."""
    bars: list[tuple[str, float, float | None]] = []
    for name, bar in (("B", 5.0), ("A", 2.5)):
        if name not in parts:
            continue
        contestants = parts[name]["contestants"]
        ours = contestants["threefold"]
        bars.append(
            (f"{name}: peak memory, TRL", peak(contestants["trl"]) / peak(ours), 1 / 0.6 if name == "A" else None)
        )
        for peer in ("transformers_continuous", "transformers"):
            ratio = ratio_of_medians(generation_seconds(contestants[peer]), generation_seconds(ours))
            wanted = 3.0 if (name, peer) == ("A", "transformers") else None
            bars.append((f"{name}: generation, {LABELS[peer]}".replace("`", ""), ratio, wanted))
        ratio = ratio_of_medians(iteration_seconds(contestants["trl"]), iteration_seconds(ours))
        bars.append((f"{name}: PPO iteration, TRL", ratio, bar))
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(bars)))
    axes = figure.subplots()
    for height, (_, ratio, wanted) in enumerate(bars):
        axes.barh(height, ratio, color=OURS, height=0.6)
        axes.text(max(ratio, wanted or 0.0), height, f" {ratio:.1f}×", va="center")
        if wanted:
            axes.plot([wanted, wanted], [height - 0.4, height + 0.4], color=THEIRS, linewidth=2)
    axes.axvline(1, color=OTHER, linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.set_xlabel("peer / threefold, ratio of medians (red: the bar that was set)")
    return _save(figure, file)


def _times(parts: dict[str, Any], file: Path) -> Path:
    """Where an iteration's time goes."""
    rows: list[tuple[str, float, list[float]]] = []
    for name in ("B", "A"):
        if name in parts:
            for contestant in ("trl", "threefold"):
                found = parts[name]["contestants"][contestant]
                middle = sorted(found["iterations"], key=lambda answer: answer["seconds"])[
                    len(found["iterations"]) // 2
                ]
                phases = [middle[key] for key in ("generate_s", "score_s", "update_s") if key in middle]
                rows.append((f"{name}: {LABELS[contestant]}", middle["seconds"], phases))
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(rows)))
    axes = figure.subplots()
    colours = {"generate": OURS, "score": "#6aa84f", "update": "#e0a030", "score and update": OTHER}
    for height, (_, seconds, phases) in enumerate(rows):
        names = ("generate", "score", "update") if len(phases) == 3 else ("generate", "score and update")
        lengths = phases if len(phases) == 3 else [phases[0], seconds - phases[0]]
        left = 0.0
        for name, length in zip(names, lengths, strict=True):
            axes.barh(height, length, left=left, color=colours[name], height=0.6)
            left += length
        axes.text(left, height, f" {seconds:.1f} s", va="center")
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_xlabel("seconds of the median iteration")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, file)


def _growth(part: dict[str, Any], file: Path) -> Path:
    figure = Figure(figsize=(7, 3))
    both = figure.subplots(1, 2)
    for axes, axis, other in zip(both, ("length", "batch"), ("batch", "length"), strict=True):
        points = [point for point in part["points"] if point["axis"] == axis]
        for name, colour in (("threefold", OURS), ("transformers", THEIRS)):
            values = [1e3 * per_token(point, name) for point in points]
            axes.plot(
                [point[axis] for point in points],
                values,
                marker="o",
                markersize=3,
                color=colour,
                label=LABELS[name].replace("`", ""),
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(StrMethodFormatter("{x:g}"))
        ticks = [point[axis] for point in points]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel(f"{'answer length' if axis == 'length' else 'batch'} ({other} {points[0][other]})")
    both[0].set_ylabel("ms per answer token")
    both[0].legend(frameon=False, fontsize=8)
    return _save(figure, file)
