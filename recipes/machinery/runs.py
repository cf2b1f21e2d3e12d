"""The runs of a configuration's optimizers, and what can be read off them, with the rules of recipes/README.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from recipes.machinery import config, record
from recipes.machinery.config import Settings
from recipes.machinery.search import Point, best, score

BASIN_SHARE = (
    0.95  # of its own best validation metric, that an optimizer reaches with a learning rate as good as the best
)
STABLE_SHARE = 0.5  # the same, with a stable one

Record = Mapping[str, Any]


class Basin(NamedTuple):
    """A range of good learning rates; whether it goes on beyond what was tried."""

    low: float
    high: float
    is_open: bool


@dataclass(frozen=True)
class Runs:
    """The runs of one optimizer.

    Attributes:
        settings: as the configuration has them.
        records: those with these settings, but for learning rate, weight decay and seed.
    """

    settings: Settings
    records: Sequence[Record]

    @cached_property
    def scores(self) -> dict[Point, float]:
        """Of the tuning runs, which are those with seed 0; higher is better."""
        return {point_of(made): score(made) for made in self.records if made["seed"] == 0}

    @cached_property
    def best(self) -> Point:
        return best(self.scores)

    @cached_property
    def chosen(self) -> list[Record]:
        """The runs with the best learning rate and weight decay, by seed."""
        return sorted(
            (made for made in self.records if point_of(made) == self.best), key=lambda made: int(made["seed"])
        )

    @property
    def rates(self) -> dict[float, float]:
        """The scores by learning rate, at the weight decay at which rates were compared."""
        first = self.settings.optimizer["weight_decay"]
        return {lr: value for (lr, decay), value in self.scores.items() if decay == first}

    @property
    def is_best_rate_at_edge(self) -> bool:
        """Whether a learning rate beyond those that were tried might be better."""
        return len(self.rates) > 1 and self.best[0] in (min(self.rates), max(self.rates))

    @property
    def highest_stable_rate(self) -> float | None:
        """The highest rate with at least half of the optimizer's best validation metric, if higher is better."""
        top = max(self.scores.values())
        return max((lr for lr, value in self.rates.items() if value >= STABLE_SHARE * top > 0), default=None)

    @property
    def other_seeds(self) -> list[tuple[float, float]]:
        """Learning rate and score of the runs at that weight decay that are not the tuning's."""
        first = self.settings.optimizer["weight_decay"]
        return [
            (lr, score(made))
            for made in self.records
            if made["seed"]
            for lr, decay in [point_of(made)]
            if decay == first
        ]

    @property
    def basin(self) -> Basin | None:
        """The learning rates with at least 95 % of the best validation metric among :attr:`rates`.

        That is read off straight lines between them over the logarithm of the rate; for metrics of which higher is
        better. None where fewer than two were tried.
        """
        rates = sorted(self.rates)
        top = max(self.rates.values(), default=-math.inf)
        if len(rates) < 2 or not top > 0:
            return None
        good = BASIN_SHARE * top
        values = [max(self.rates[lr], 0.0) for lr in rates]
        peak = values.index(top)
        low = _crossing(rates[peak::-1], values[peak::-1], good)
        high = _crossing(rates[peak:], values[peak:], good)
        return Basin(low, high, is_open=low == rates[0] or high == rates[-1])

    def metric(self, split: str, name: str) -> list[float]:
        """Of the chosen runs, by seed; those that diverged have none."""
        return [made["metrics"][f"{split} {name}"] for made in self.chosen if made["metrics"]]


def read_runs(task: str, name: str, folder: Path | None = None) -> dict[str, Runs]:
    """The runs of each optimizer that has any, in the configuration's order.

    Args:
        task: one of :data:`recipes.machinery.config.TASKS`.
        name: of the configuration.
        folder: with a folder of records for each task, instead of ``recipes/tasks/TASK/results``.
    """
    records = record.read_all(task, name, folder)
    found = {}
    for label in config.labels(task, name):
        settings = config.load(task, name, label)
        mine = [
            made
            for made in records
            if made["label"] == label and made["stem"] == settings.at(*point_of(made), seed=made["seed"]).stem
        ]
        if mine:
            found[label] = Runs(settings, mine)
    return found


def _crossing(rates: Sequence[float], values: Sequence[float], good: float) -> float:
    """Where, going from the first rate on, the value falls below what is good; else the last rate."""
    for (lr, value), (further, lower) in pairwise(zip(rates, values, strict=True)):
        if lower < good:
            return float(lr * (further / lr) ** ((value - good) / (value - lower)))
    return rates[-1]


def point_of(made: Record) -> Point:
    return made["optimizer"]["lr"], made["optimizer"]["weight_decay"]
