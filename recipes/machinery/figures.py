"""The figures that every task has: training curves, and the tuning as a map of learning rate and weight decay.

They are SVG files, the same to the byte for the same records and the same version of matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recipes.machinery.tables import TO_PERCENT, Record, Runs

STYLE: Any = {
    "svg.hashsalt": "sing-plugins",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MAPS_A_ROW = 4

Points = list[tuple[float, float]]
Lines = Callable[[Record], Points]


def save(figure: Figure, file: Path) -> None:
    """Write a figure, with nothing in it that depends on the day or the machine."""
    figure.savefig(file, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)


def grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes, each ``width`` by ``height`` inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_axis_off()
    return figure, flat[:count]


def draw_curves(found: Mapping[str, Runs], labels: Sequence[str], name: str, file: Path, points: Lines) -> None:
    """A value over the steps, for each optimizer at its best learning rate and weight decay; one line a seed.

    Args:
        found: as recipes.machinery.tables.runs returns it.
        labels: of the optimizers.
        name: of the value; the training loss has a logarithmic scale if it is never below zero.
        file: to be written.
        points: the steps and values of a record.
    """
    lines = {label: [points(made) for made in found[label].chosen] for label in labels if label in found}
    with plt.rc_context(STYLE):
        figure, (axes,) = grid(1, 1, 7.0, 3.6)
        for index, (label, seeds) in enumerate(lines.items()):
            for number, seed in enumerate(seeds):
                steps, values = zip(*seed, strict=True) if seed else ((), ())
                style: dict[str, Any] = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--"}
                axes.plot(steps, values, linewidth=0.9, alpha=0.8, label="" if number else label, **style)
        if name == "training loss" and all(
            value > 0 for seeds in lines.values() for seed in seeds for _, value in seed
        ):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        save(figure, file)


def training_loss(made: Record) -> Points:
    return [(step, loss) for step, loss in made["curve"]]


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
        figure, every = grid(len(shown), MAPS_A_ROW, 2.9, 2.3)
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
