"""What the networks see and answer (the paper's Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from recipes.machinery.figures import STYLE, grid, save
from recipes.machinery.runs import Runs

SHOWN = ("adamw", "sing_adamw")


def draw(found: Mapping[str, Runs], folder: Path) -> dict[str, str]:
    """Input, truth and predictions of the first test pictures; file name → caption."""
    panels: dict[str, Any] = {}
    for label in SHOWN:
        if label in found and "panels" in found[label].chosen[0]:
            panels[label] = found[label].chosen[0]["panels"]
    if not panels:
        return {}
    any_panel = next(iter(panels.values()))
    columns = {
        "input": any_panel["input"],
        "truth": any_panel["truth"],
        **{label: panel["prediction"] for label, panel in panels.items()},
    }
    rows = len(any_panel["input"])
    with plt.rc_context(STYLE):
        figure, axes = grid(rows * len(columns), len(columns), 1.5, 1.5)
        for index, axis in enumerate(axes):
            row, (title, pictures) = index // len(columns), list(columns.items())[index % len(columns)]
            axis.imshow(pictures[row], cmap="gray" if title == "input" else "viridis", vmin=0, vmax=1)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=8)
        save(figure, folder / "panels.svg")
    return {"panels.svg": "The first test pictures: input, truth, and predictions with seed 0"}
