"""The figures that every task has: training curves, the metric over the learning rate, and the tuning as a map.

They are SVG files, the same to the byte for the same records and the same version of matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recipes.machinery.runs import Record, Runs
from recipes.machinery.tables import TO_PERCENT

STYLE: Any = {
    "svg.hashsalt": "sing-plugins",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
A_ROW = 4  # axes of a figure that has many
FAR = 4.0  # times the lowest final loss: above the figure
SMOOTHED = 9  # points of a training curve that are averaged
BEGINNING = 0.05  # of a training, in which the loss falls from wherever the weights began
LABEL_HEIGHT = 0.045  # of the height of a figure
LOSS, NORM, NORM_OF_LAYERNORMS = "training loss", "norm of the gradients", "norm of the gradients of LayerNorms"
OF_BATCH = {LOSS, NORM, NORM_OF_LAYERNORMS}

Points = list[tuple[float, float]]
Lines = Callable[[Record], Points]


def save(figure: Figure, file: Path) -> None:
    """Write a figure, with nothing in it that depends on the day or the machine."""
    figure.savefig(file, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)


def grid(count: int, columns: int, width: float, height: float, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes, each ``width`` by ``height`` inches, all of one scale if they ``share`` it."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = width * columns, height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=share, sharey=share)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_axis_off()
    return figure, flat[:count]


def draw_curves(found: Mapping[str, Runs], labels: Sequence[str], name: str, file: Path, points: Lines) -> bool:
    """A value over the steps, for each optimizer at its best learning rate and weight decay.

    The mean over the seeds, in a band from the lowest to the highest of them. What is measured on a batch is averaged
    over neighbouring points, and has a logarithmic scale if it is never below zero; where the training loss of a seed
    spiked, there is a triangle.

    Args:
        found: as recipes.machinery.runs.read_runs returns it.
        labels: of the optimizers.
        name: of the value.
        file: to be written.
        points: the steps and values of a record.

    Returns:
        Whether there is anything to draw.
    """
    of_batch = name in OF_BATCH
    lines = {label: [points(made) for made in found[label].chosen] for label in labels if label in found}
    values = [value for seeds in lines.values() for seed in seeds for _, value in seed]
    if not values:
        return False
    with plt.rc_context(STYLE):
        figure, (axes,) = grid(1, 1, 7.0, 4.0)
        ends: dict[str, tuple[float, float]] = {}
        colors: dict[str, str] = {}
        tops: dict[str, float] = {}
        for style, (label, seeds) in zip(_styles(), lines.items(), strict=False):
            steps, low, mean, high = band(seeds, window=SMOOTHED if of_batch else 1)
            if not steps:
                continue
            axes.fill_between(steps, low, high, alpha=0.15, linewidth=0, color=style["color"])
            axes.plot(steps, mean, linewidth=1.2, **style)
            spikes = [step for made in found[label].chosen for step in made["spikes"]] if name == LOSS else []
            axes.plot(spikes, np.interp(spikes, steps, mean), "^", markersize=4, color=style["color"], alpha=0.7)
            ends[label], colors[label] = (steps[-1], mean[-1]), style["color"]
            tops[label] = max(value for step, value in zip(steps, high, strict=True) if step >= BEGINNING * steps[-1])
        if of_batch and min(values) > 0:
            axes.set_yscale("log")
            if name == LOSS:
                # Where all begin alike, and where one does not learn, there is little to be seen.
                lowest = min(last for _, last in ends.values())
                axes.set_ylim(top=max(tops[label] for label, (_, last) in ends.items() if last <= FAR * lowest))
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        label_ends(axes, ends, colors)
        save(figure, file)
    return True


def band(seeds: Sequence[Points], window: int = 1) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps; lowest value, mean and highest value over the seeds that got so far.

    Args:
        seeds: steps and values of each, at the same steps; a run that diverged ends before the others.
        window: how many neighbouring points of a seed are averaged.
    """
    longest = max(seeds, key=len, default=[])
    steps = [float(step) for step, _ in longest]
    if not steps:
        return [], [], [], []
    rows = np.full((len(seeds), len(steps)), np.nan)
    for row, seed in zip(rows, seeds, strict=True):
        row[: len(seed)] = _smoothed([value for _, value in seed], window)
    return steps, np.nanmin(rows, 0).tolist(), np.nanmean(rows, 0).tolist(), np.nanmax(rows, 0).tolist()


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    half = window // 2
    return [float(np.mean(values[max(0, at - half) : at + half + 1])) for at in range(len(values))]


def _styles() -> Iterator[dict[str, Any]]:
    """Ten colours, then the same with dashes."""
    return ({"color": f"C{at % 10}", "linestyle": dash} for dash in ("-", "--") for at in range(10))


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Write the name of each line at its end, from top to bottom in the order of the ends, none over another.

    Args:
        axes: whose lines have been drawn.
        ends: by name, the last point of the line.
        colors: by name, the line's.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # limits are final after it
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {label: min(1.0, float(to_axes.transform(end)[1])) for label, end in ends.items()}
    order = sorted(heights, key=heights.__getitem__)
    places = apart([heights[label] for label in order], LABEL_HEIGHT)
    for label, place in zip(order, places, strict=True):
        color, last = colors[label], float(to_axes.transform(ends[label])[0])
        axes.annotate(
            label,
            xy=(last, heights[label]),
            xytext=(1.02, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def apart(heights: Sequence[float], distance: float) -> list[float]:
    """Ascending heights, moved as far as they have to be for no two of them to be nearer than ``distance``."""
    upwards = list(accumulate(heights, lambda below, height: max(height, below + distance)))
    downwards = list(accumulate(heights[::-1], lambda above, height: min(height, above - distance)))[::-1]
    return [(up + down) / 2 for up, down in zip(upwards, downwards, strict=True)]


def draw_basins(found: Mapping[str, Runs], labels: Sequence[str], metric: str, file: Path) -> bool:
    """The validation metric over the learning rate, at the weight decay at which rates were compared.

    Axes for each optimizer, with the lines of the others in grey: lines through the tuning runs (seed 0), dots where
    other seeds were run there. The range that is within 5 % of the best is shaded.

    Returns:
        Whether there is anything to draw.
    """
    shown = {label: found[label] for label in labels if label in found and len(found[label].rates) > 1}
    if not shown:
        return False
    scale = TO_PERCENT.get(metric, 1)
    lines = {
        label: [(lr, value * scale) for lr, value in sorted(mine.rates.items()) if math.isfinite(value)]
        for label, mine in shown.items()
    }
    with plt.rc_context(STYLE):
        figure, every = grid(len(shown), A_ROW, 2.2, 1.9, share=True)
        for axes, (label, mine) in zip(every, shown.items(), strict=True):
            axes.set_xscale("log")
            for line in lines.values():
                axes.plot(*_columns(line), color="0.85", linewidth=0.8)
            dots = [(lr, value * scale) for lr, value in mine.other_seeds if math.isfinite(value)]
            axes.plot(*_columns(dots), "o", markersize=2.5, alpha=0.5, color="C0")
            axes.plot(*_columns(lines[label]), marker="o", markersize=2.5, linewidth=1.3, color="C0")
            if mine.basin is not None:
                axes.axvspan(mine.basin.low, mine.basin.high, color="C0", alpha=0.12, linewidth=0)
            axes.set_title(label, fontsize=8)
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel(f"valid {metric}" + " [%]" * (metric in TO_PERCENT), fontsize=9)
        figure.tight_layout()
        save(figure, file)
    return True


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def training_loss(made: Record) -> Points:
    return [(step, loss) for step, loss in made["curve"]]


def gradient_norms(of: int) -> Lines:
    """A column of the record's ``gradients``; nothing for parameters that have none, such as frozen ones."""

    def points(made: Record) -> Points:
        norms = [(row[0], norm) for row in made.get("gradients", []) for norm in row[of : of + 1]]
        return norms if any(norm for _, norm in norms) else []

    return points


def evaluations(name: str) -> Lines:
    """What was measured on the way, such as ``"valid accuracy"``."""
    return lambda made: [(each["step"], each[name]) for each in made["evaluations"] if name in each]


def draw_maps(
    found: Mapping[str, Runs], labels: Sequence[str], metric: str, file: Path, *, higher_is_better: bool
) -> None:
    """The validation metric of every tuning run, by learning rate and weight decay; the best has a frame."""
    shown = [label for label in labels if label in found]
    scale = TO_PERCENT.get(metric, 1) * (1 if higher_is_better else -1)
    with plt.rc_context(STYLE):
        figure, every = grid(len(shown), A_ROW, 2.9, 2.3)
        for axes, label in zip(every, shown, strict=True):
            scores = found[label].scores
            rates, decays = (sorted(set(values)) for values in zip(*scores, strict=True))
            values = [[scores.get((lr, decay), math.nan) * scale for decay in decays] for lr in rates]
            axes.imshow(values, cmap="viridis", aspect="auto", origin="lower")
            for row, lr in enumerate(rates):
                for column, decay in enumerate(decays):
                    if (lr, decay) in scores:
                        value = values[row][column]
                        text = f"{value:.3g}" if math.isfinite(value) else "✗"
                        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white", bbox=_BACK)
            at = decays.index(found[label].best[1]), rates.index(found[label].best[0])
            axes.add_patch(Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, fill=False, color="red", linewidth=1.5))
            axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays], fontsize=7)
            axes.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates], fontsize=7)
            axes.set_title(label, fontsize=8)
            axes.set_xlabel("weight decay", fontsize=7)
            axes.set_ylabel("learning rate", fontsize=7)
        figure.tight_layout()
        save(figure, file)


_BACK = {"facecolor": "black", "alpha": 0.35, "edgecolor": "none", "pad": 1.0}
