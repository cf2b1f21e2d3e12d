"""What tuning tries next, and how good what it tried was: the paper's procedure (section 5.1), see recipes/tune.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from recipes.machinery.config import task_module

LR_SHARE = 5 / 8  # of the budget

T = TypeVar("T", float, tuple[float, float])
Point = tuple[float, float]  # learning rate, weight decay
Scores = Mapping[Point, "float | None"]  # higher is better; None while it runs


@dataclass(frozen=True)
class Grid:
    """What is tried for one optimizer.

    Attributes:
        lr: the learning rates, tried from the middle outwards.
        weight_decay: the weight decays.
        first_weight_decay: the one with which learning rates are compared.
        budget: number of runs in all.
    """

    lr: Sequence[float]
    weight_decay: Sequence[float]
    first_weight_decay: float
    budget: int

    @property
    def lr_budget(self) -> int:
        return math.ceil(self.budget * LR_SHARE)


def next_points(grid: Grid, scores: Scores) -> list[Point] | None:
    """The points to try now: none while runs that decide are going on, None where the tuning is over.

    Args:
        grid: what is tried.
        scores: of what was tried or is being tried.
    """
    rates = {lr: score for (lr, decay), score in scores.items() if decay == grid.first_weight_decay}
    lrs = _next(from_the_middle(grid.lr), rates, grid.lr_budget)
    if lrs is not None:
        return [(lr, grid.first_weight_decay) for lr in lrs]
    lr = best(rates)
    decays = {decay: score for (rate, decay), score in scores.items() if rate == lr}
    by_distance = sorted(grid.weight_decay, key=lambda decay: abs(_log(decay) - _log(grid.first_weight_decay)))
    chosen = _next(by_distance, decays, grid.budget - len(rates) + 1)
    return None if chosen is None else [(lr, decay) for decay in chosen]


def _next(values: Sequence[float], scores: Mapping[float, float | None], budget: int) -> list[float] | None:
    """As :func:`next_points` for one axis."""
    left = budget - len(scores)
    missing = [value for value in values if value not in scores][: max(0, left)]
    if missing:
        return missing
    if None in scores.values():
        return []
    at = best(scores)
    if left > 0 and len(scores) > 1 and at in (min(scores), max(scores)) and at > 0:
        return [beyond(at, up=at == max(scores))]
    return None


def best(scores: Mapping[T, float | None]) -> T:
    """What has the highest score; of equals, the smallest."""
    return min(scores, key=lambda value: (-_known(scores[value]), value))


def _known(score: float | None) -> float:
    return -math.inf if score is None else score


def from_the_middle(values: Sequence[float]) -> list[float]:
    """Sorted by the distance from the middle of the list; of equals, the lower one first."""
    middle = (len(values) - 1) / 2
    return [value for _, value in sorted(enumerate(values), key=lambda pair: (abs(pair[0] - middle), pair[0]))]


def beyond(value: float, *, up: bool) -> float:
    """The next value of the paper's grids: …, 1e-3, 5e-3, 1e-2, 5e-2, …"""
    is_five = f"{value:e}".startswith("5")
    return times(value, (2.0 if is_five else 5.0) if up else (0.2 if is_five else 0.5))


def times(value: float, factor: float) -> float:
    """The product, as it is written."""
    return float(f"{value * factor:.6g}")


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def score(made: Mapping[str, Any]) -> float:
    """What is tuned for: the task's metric on the validation set; the worst possible if the run diverged."""
    task = task_module(made["task"])
    value = made["metrics"].get(f"valid {task.METRIC}")
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(value) if task.HIGHER_IS_BETTER else -float(value)
