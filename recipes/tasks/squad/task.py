"""SQuAD: a pretrained model answers questions by a part of a text (paper, Table 4). Through Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recipes.machinery import trainer
from recipes.tasks.squad.train import SCRIPT

if TYPE_CHECKING:
    from recipes.machinery.config import Settings
    from recipes.machinery.record import Outcome
    from recipes.machinery.run import Run

METRIC = "f1"
HIGHER_IS_BETTER = True


def train(run: Run) -> Outcome:
    """Run recipes/tasks/squad/train.py with the run's configuration."""
    return trainer.train(run, SCRIPT)


def commands(settings: Settings, data: Path) -> list[list[str]]:
    """The command line of recipes/tasks/squad/train.py."""
    return trainer.commands(SCRIPT, settings, data)
