"""Draw size.svg, and write the table of size.md: how large a step is in tensors of different sizes.

    python docs/size.py

The step is the first one of a tensor whose gradient has entries of one magnitude, which is what an average entry gets.
Adam's is the learning rate, in a tensor of any size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

import matplotlib.pyplot as plt
import numpy as np
import torch

from recipes.machinery.figures import STYLE, grid, label_ends, save
from recipes.summarize import insert, markdown_table
from sing_plugins import SING

FOLDER = Path(__file__).parent
SIZES = {
    64: "a bias of width 64",
    384: "a bias or LayerNorm of ViT-S",
    4_096: "64 × 64",
    147_456: "384 × 384",
    589_824: "384 × 1,536",
    23_440_896: "BERT's embeddings",
}
DRAWN: dict[str, dict[str, Any]] = {
    "softplus_beta=50": {},
    "softplus_relative=0.065": {"softplus_relative": 0.065},
    "softplus_relative=0.25": {"softplus_relative": 0.25},
    "softplus_relative=1": {"softplus_relative": 1.0},
    "Adam; softplus_beta=none": {"softplus_beta": None},
}


def step(entries: int, **options: Any) -> float:
    """The size of an entry's first step, at a learning rate of 1."""
    weight = torch.zeros(entries, requires_grad=True)
    weight.grad = torch.ones(entries)
    SING([weight], lr=1.0, **options).step()
    return float(weight.detach().abs().mean())


def table() -> list[list[str]]:
    """The header, and a row for each size."""
    rows = [["entries", "β √v̂", "step, as a share of Adam's", "norm of the step / lr", "that of Adam's"]]
    for entries, what in SIZES.items():
        share, root = step(entries), entries**0.5
        rows.append([f"{entries:,} ({what})", f"{50 / root:.2g}", f"{share:.3f}", f"{share * root:.1f}", f"{root:.1f}"])
    return rows


def draw(file: Path) -> None:
    """The steps of all settings over the number of entries."""
    sizes = [int(size) for size in np.geomspace(10, 1e7, 25)]
    with plt.rc_context(STYLE):
        figure, (axes,) = grid(1, 1, 6.0, 3.4)
        ends, colors = {}, {}
        for index, (label, options) in enumerate(DRAWN.items()):
            steps = [step(size, **options) for size in sizes]
            axes.plot(sizes, steps, color=f"C{index}", linewidth=1.4)
            ends[label], colors[label] = (sizes[-1], steps[-1]), f"C{index}"
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("entries of the tensor")
        axes.set_ylabel("step of an average entry / learning rate")
        label_ends(axes, ends, colors)
        save(figure, file)


if __name__ == "__main__":
    draw(FOLDER / "size.svg")
    page = FOLDER / "size.md"
    page.write_text(insert(page.read_text(), markdown_table(table())))
