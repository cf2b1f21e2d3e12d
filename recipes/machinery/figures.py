"""The figures of the tuning: the metric over the learning rate, and as a map; what all figures are made of.

They are SVG files, the same to the byte for the same records and the same version of matplotlib, on any processor.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recipes.machinery.runs import Runs
from recipes.machinery.tables import TO_PERCENT

STYLE: Any = {
    "svg.hashsalt": "sing-plugins",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
A_ROW = 4  # axes of a figure that has many
LABEL_HEIGHT = 0.045  # of the height of a figure

# What matplotlib calls a clip path: a hash of all bits of its numbers, the last of which differ between processors.
_CLIP_PATH = re.compile(r"\bp[0-9a-f]{10}\b")

Points = list[tuple[float, float]]


def save(figure: Figure, file: Path) -> None:
    """Write a figure, with nothing in it that depends on the day or the machine."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    names: dict[str, str] = {}
    text = _CLIP_PATH.sub(lambda found: names.setdefault(found[0], f"clip{len(names) + 1}"), drawn.getvalue())
    file.write_text(text, encoding="utf-8")


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
    lines = {label: _over_rates(sorted(mine.rates.items()), metric) for label, mine in shown.items()}
    with plt.rc_context(STYLE):
        figure, every = grid(len(shown), A_ROW, 2.2, 1.9, share=True)
        for axes, (label, mine) in zip(every, shown.items(), strict=True):
            axes.set_xscale("log")
            for line in lines.values():
                axes.plot(*_columns(line), color="0.85", linewidth=0.8)
            dots = _over_rates(mine.other_seeds, metric)
            axes.plot(*_columns(dots), "o", markersize=2.5, alpha=0.5, color="C0")
            axes.plot(*_columns(lines[label]), marker="o", markersize=2.5, linewidth=1.3, color="C0")
            if mine.basin is not None:
                axes.axvspan(mine.basin.low, mine.basin.high, color="C0", alpha=0.12, linewidth=0)
            axes.set_title(label, fontsize=8)
        _save_over_rates(figure, metric, file)
    return True


def draw_transfer(
    every: Mapping[str, Mapping[str, Runs]], names: Sequence[str], labels: Sequence[str], metric: str, file: Path
) -> None:
    """The validation metric over the learning rate in several configurations: whether the best rate stays the same.

    Axes for each optimizer, a line for each configuration in them, its best rate with a ring.

    Args:
        every: by configuration, as recipes.machinery.runs.read_runs returns it.
        names: of the configurations, in the order of the colours.
        labels: of the optimizers.
        metric: of which higher is better.
        file: to be written.
    """
    shown = [label for label in labels if any(label in every.get(name, {}) for name in names)]
    with plt.rc_context(STYLE):
        figure, axes_of = grid(len(shown), A_ROW, 2.6, 2.3, share=True)
        for axes, label in zip(axes_of, shown, strict=True):
            axes.set_xscale("log")
            axes.set_title(label, fontsize=8)
            for at, name in enumerate(names):
                rates = every[name][label].rates if label in every.get(name, {}) else {}
                line = _over_rates(sorted(rates.items()), metric)
                color = plt.colormaps["viridis"](0.9 * at / max(1, len(names) - 1))
                axes.plot(*_columns(line), marker="o", markersize=2.5, linewidth=1.3, color=color, label=name)
                best = sorted(line, key=lambda point: -point[1])[:1]
                axes.plot(*_columns(best), "o", markersize=8, fillstyle="none", color=color)
        axes_of[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _save_over_rates(figure, metric, file)


def _over_rates(values: Iterable[tuple[float, float]], metric: str) -> Points:
    """Learning rates, and the metric as it is shown; without runs that diverged."""
    scale = TO_PERCENT.get(metric, 1)
    return [(lr, value * scale) for lr, value in values if math.isfinite(value)]


def _save_over_rates(figure: Figure, metric: str, file: Path) -> None:
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(f"valid {metric}" + " [%]" * (metric in TO_PERCENT), fontsize=9)
    figure.tight_layout()
    save(figure, file)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


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
