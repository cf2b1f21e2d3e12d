"""Digits: a deep network without residual connections, in which AdamW's loss spikes. Through timm and Accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from recipes.machinery import vision
from recipes.machinery.vision import Tensors

if TYPE_CHECKING:
    from recipes.machinery.record import Outcome
    from recipes.machinery.run import Run

METRIC = "accuracy"
HIGHER_IS_BETTER = True
ON_THE_WAY = "valid accuracy"  # of what is measured during training, what is drawn
commands = vision.commands

PIXELS, DIGITS, BRIGHTEST = 64, 10, 16.0


@dataclass(frozen=True)
class Data:
    """The table ``[data]``.

    Attributes:
        valid: pictures for validation.
        test: pictures for the test.
        repeat: how often each training picture is seen in an epoch.
        seed: of the split.
    """

    valid: int
    test: int
    repeat: int
    seed: int = 0

    def load(self) -> dict[str, Tensors]:
        """Pixels from 0 to 1 and labels, by split."""
        pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
        pixels = pixels.float() / BRIGHTEST
        rest, test = vision.hold_out(len(labels), self.test, self.seed)
        kept, valid = vision.hold_out(len(rest), self.valid, self.seed + 1)
        parts = {"train": rest[kept].repeat(self.repeat), "valid": rest[valid], "test": test}
        return {split: Tensors(pixels[part], labels[part]) for split, part in parts.items()}


def network(depth: int, width: int) -> nn.Sequential:
    """``depth`` times linear, LayerNorm, ReLU, and a linear layer to ten classes."""
    widths = [PIXELS, *[width] * depth]
    blocks = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.Linear(width, DIGITS))


def train(run: Run) -> Outcome:
    """Train and evaluate; metrics: ``accuracy`` and ``loss`` (without label smoothing)."""
    sets = Data(**run.settings["data"]).load()
    smoothing = run.settings["loss"]["label_smoothing"]

    def loss(model: nn.Module, batch: vision.Batch) -> Tensor:
        pixels, labels = batch
        return nn.functional.cross_entropy(model(pixels), labels, label_smoothing=smoothing)

    held_out = {split: sets[split] for split in ("valid", "test")}
    return vision.fit(run, partial(network, **run.settings["model"]), sets["train"], loss, _measure, held_out)


def _measure(model: nn.Module, batch: vision.Batch) -> dict[str, Tensor]:
    pixels, labels = batch
    answers = model(pixels)
    return {
        "accuracy": (answers.argmax(dim=1) == labels).double(),
        "loss": nn.functional.cross_entropy(answers, labels, reduction="none"),
    }
