"""The descents on the landscape (the paper's Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from recipes.machinery.figures import STYLE, grid, save
from recipes.machinery.runs import Runs
from recipes.tasks.landscape.task import landscape


def draw(found: Mapping[str, Runs], folder: Path) -> dict[str, str]:
    """Where each descent was after each step; file name → caption."""
    x = torch.linspace(-5, 7, 601)
    with plt.rc_context(STYLE):
        figure, every = grid(len(found), 2, 3.6, 2.6)
        for axes, (label, runs) in zip(every, found.items(), strict=True):
            made = next(made for made in runs.records if made["optimizer"]["lr"] == runs.settings.optimizer["lr"])
            path = torch.tensor(made["panels"]["path"])
            axes.plot(x, landscape(x), color="0.6", linewidth=1)
            axes.plot(path, landscape(path), ".-", markersize=4, linewidth=0.5)
            axes.plot(path[-1:], landscape(path[-1:]), "*", color="red", markersize=9)
            axes.set_title(f"{label}, lr {made['optimizer']['lr']:g}", fontsize=8)
        figure.tight_layout()
        save(figure, folder / "path.svg")
    return {"path.svg": "Where each descent was after each step; it ends at the star"}
