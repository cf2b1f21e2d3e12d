"""SWAG: a pretrained model chooses how a text goes on (paper, Table 4). Through Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recipes.machinery import trainer
from recipes.tasks.swag.train import SCRIPT

if TYPE_CHECKING:
    from recipes.machinery.config import Settings
    from recipes.machinery.record import Outcome
    from recipes.machinery.run import Run

METRIC = "accuracy"
HIGHER_IS_BETTER = True


def train(run: Run) -> Outcome:
    """Run recipes/tasks/swag/train.py with the run's configuration."""
    return trainer.train(run, SCRIPT)


def commands(settings: Settings, data: Path) -> list[list[str]]:
    """The command line of recipes/tasks/swag/train.py."""
    return trainer.commands(SCRIPT, settings, data)
