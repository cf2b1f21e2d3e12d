"""A record as one figure: the steps of all optimizers, and how SING's grows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.timing import Row
from recipes.machinery.figures import STYLE, save

CURVES = {"parameters": "parameters", "tensors": "tensors of 2.56 million in all", "threads": "threads (20 million)"}


def draw(record: Mapping[str, Any], file: Path) -> None:
    """Draw ratios to AdamW fused, with their quartiles."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.5, 7.5), layout="constrained")
        places = figure.add_gridspec(2, len(CURVES), height_ratios=(2.2, 1))
        if steps := _measured(record, "step"):
            _steps(steps, figure.add_subplot(places[0, :]))
        for column, (curve, title) in enumerate(CURVES.items()):
            rows = [row for row in _measured(record, "scaling") if row["curve"] == curve]
            if rows:
                _curve(rows, curve, title, figure.add_subplot(places[1, column]))
        save(figure, file)


def _measured(record: Mapping[str, Any], section: str) -> list[Row]:
    return [row for row in record["sections"].get(section, ()) if "ratio" in row]


def _steps(measured: list[Row], axes: Axes) -> None:
    names = list(dict.fromkeys(row["optimizer"] for row in measured))
    models = list(dict.fromkeys(row["model"] for row in measured))
    for number, model in enumerate(models):
        rows = [row for row in measured if row["model"] == model]
        shift = 0.6 * ((number + 0.5) / len(models) - 0.5)
        at = [names.index(row["optimizer"]) + shift for row in rows]
        values, errors = _with_errors(rows)
        axes.errorbar(values, at, xerr=errors, fmt="o", markersize=3.5, linewidth=1, label=model)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3, which="both")
    axes.set_xlabel("time of a step / AdamW fused")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _curve(rows: list[Row], curve: str, title: str, axes: Axes) -> None:
    values, errors = _with_errors(rows)
    axes.errorbar([row["at"] for row in rows], values, yerr=errors, fmt="o-", markersize=3.5, linewidth=1)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xscale("log", base=2 if curve == "threads" else 10)
    if curve == "threads":
        axes.set_xticks([row["at"] for row in rows], [row["at"] for row in rows])
    axes.set_xlabel(title)
    axes.set_ylabel("SING / AdamW fused", fontsize=8)


def _with_errors(rows: list[Row]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far below and above them the quartiles are."""
    lows, medians, highs = ([row["ratio"][k] for row in rows] for k in range(3))
    below = [median - low for low, median in zip(lows, medians, strict=True)]
    above = [high - median for median, high in zip(medians, highs, strict=True)]
    return medians, [below, above]
