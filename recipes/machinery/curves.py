"""Values over the steps of the trainings: the loss, norms of gradients, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from recipes.machinery.figures import STYLE, Points, grid, label_ends, save
from recipes.machinery.runs import Record, Runs

FAR = 4.0  # times the lowest final loss: above the figure
SMOOTHED = 9  # points of a training curve that are averaged
BEGINNING = 0.05  # of a training, in which the loss falls from wherever the weights began
LOSS, NORM, NORM_OF_LAYERNORMS = "training loss", "norm of the gradients", "norm of the gradients of LayerNorms"
OF_BATCH = {LOSS, NORM, NORM_OF_LAYERNORMS}

Lines = Callable[[Record], Points]


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
