"""Landscape: one parameter on a function with three local minima (paper, Figure 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recipes.machinery import vision
from recipes.machinery.record import Outcome, class_name

if TYPE_CHECKING:
    from recipes.machinery.run import Run

METRIC = "value"
HIGHER_IS_BETTER = False
commands = vision.commands

START = -4.0
# (where, depth, width) of each minimum. Gradient descent is thrown over the first, whose walls are steep, and stays in
# the second, whose walls are not.
MINIMA = ((-2.0, 0.5, 0.1), (0.0, 0.3, 0.35), (4.0, 2.0, 1.2))
SLOPE = 0.02  # of the parabola that leads from START to the wide minimum


def landscape(x: Tensor) -> Tensor:
    """The function's values, of the shape of ``x``."""
    value = SLOPE * (x - MINIMA[-1][0]).square()
    for where, depth, width in MINIMA:
        value = value - depth * torch.exp(-(((x - where) / width) ** 2) / 2)
    return value


class Point(nn.Module):
    """Where the descent is."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([START]))

    def forward(self) -> Tensor:
        return landscape(self.x).sum()


def train(run: Run) -> Outcome:
    """Descend; metrics: the function's ``value`` where the descent ends, and that ``place``. There is no sampling, so
    both splits have the same."""
    training = vision.Training(**run.settings["train"])
    point = Point()
    optimizer = vision.create_optimizer(point, run.settings.optimizer)
    scheduler = vision.schedule(optimizer, training, training.epochs)
    path = [START]
    for step in range(1, training.epochs + 1):
        value = point()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        run.step(step, training.epochs, value.item())
        path.append(round(point.x.item(), 5))
    found = {"value": point().item(), "place": point.x.item()}
    metrics = {f"{split} {name}": value for split in ("valid", "test") for name, value in found.items()}
    return Outcome(metrics, class_name(optimizer), {"path": path})
