"""RDE: a ViT tells how high each rectangle of a picture lies (paper, section 5.2). Through timm and Accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from recipes.machinery import vision
from recipes.machinery.data import made_of, temporary
from recipes.tasks.rde import rectangles
from recipes.tasks.rde.rectangles import Pictures

if TYPE_CHECKING:
    from recipes.machinery.record import Outcome
    from recipes.machinery.run import Run

METRIC = "accuracy"
HIGHER_IS_BETTER = True
ON_THE_WAY = "valid accuracy"  # of what is measured during training, what is drawn
commands = vision.commands
PANELS = 4  # pictures whose prediction is kept for the figure


@dataclass(frozen=True)
class Data:
    """The table ``[data]``: the pictures' ``size`` and number of ``rectangles``, and how many are in each split."""

    size: int
    rectangles: int
    train: int
    valid: int
    test: int
    seed: int = 0

    def load(self, folder: Path) -> dict[str, Pictures]:
        """Draw the pictures, or take those that were drawn before; by split."""
        file = folder / "rde" / f"{made_of(self, rectangles.__file__)}.npz"
        if file.exists():
            with np.load(file) as arrays:
                drawn = Pictures(arrays["grey"], arrays["owner"], arrays["height"])
        else:
            drawn = rectangles.draw(self.train + self.valid + self.test, self.size, self.rectangles, self.seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial_file = temporary(file)
            with partial_file.open("wb") as content:
                np.savez(content, grey=drawn.grey, owner=drawn.owner, height=drawn.height)
            partial_file.replace(file)
        ends = (0, self.train, self.train + self.valid, self.train + self.valid + self.test)
        return {
            split: Pictures(drawn.grey[a:b], drawn.owner[a:b], drawn.height[a:b])
            for split, a, b in zip(("train", "valid", "test"), ends, ends[1:], strict=False)
        }


class DepthViT(nn.Module):
    """A ViT without class token, each of whose output tokens becomes a patch of the answer.

    Args:
        size: of the pictures.
        patch: of the patches.
        name: of the timm model.
        options: of the timm model.
    """

    def __init__(self, size: int, patch: int, name: str, **options: Any) -> None:
        super().__init__()
        self.vit = timm.create_model(
            name,
            img_size=size,
            patch_size=patch,
            in_chans=1,
            num_classes=0,
            global_pool="",
            class_token=False,
            **options,
        )
        width: Any = self.vit.num_features
        self.head = nn.Linear(width, patch * patch)
        self.patch = patch

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, size, size] → [N, size, size]."""
        count, size, _ = pictures.shape
        side = size // self.patch
        patches: Tensor = self.head(self.vit(pictures.unsqueeze(1)))
        patches = patches.reshape(count, side, side, self.patch, self.patch)
        return patches.transpose(2, 3).reshape(count, size, size)


def train(run: Run) -> Outcome:
    """Train and evaluate; metrics: ``mse``, and ``accuracy`` (every rectangle of a picture right)."""
    data = Data(**run.settings["data"])
    pictures = data.load(run.data)
    sets = {split: _tensors(part) for split, part in pictures.items()}
    return vision.fit(
        run,
        partial(DepthViT, data.size, **run.settings["model"]),
        sets["train"],
        _loss,
        _measure,
        {split: sets[split] for split in ("valid", "test")},
        partial(_panels, pictures["test"]),
    )


def _tensors(pictures: Pictures) -> vision.Tensors:
    arrays = (pictures.grey, pictures.depth(), pictures.owner, pictures.height)
    return vision.Tensors(*map(torch.from_numpy, arrays))


def _loss(model: nn.Module, batch: vision.Batch) -> Tensor:
    grey, depth, *_ = batch
    return nn.functional.mse_loss(model(grey), depth)


def _measure(model: nn.Module, batch: vision.Batch) -> dict[str, Tensor]:
    grey, depth, owner, height = batch
    prediction = model(grey).float()
    right = Pictures(*(part.cpu().numpy() for part in (grey, owner, height))).correct(prediction.cpu().numpy())
    return {
        "accuracy": torch.from_numpy(right).to(grey.device),
        "mse": (prediction - depth).square().mean(dim=(1, 2)),
    }


@torch.no_grad()
def _panels(pictures: Pictures, model: nn.Module) -> dict[str, Any]:
    """The first test pictures, the truth and the prediction."""
    grey = torch.from_numpy(pictures.grey[:PANELS])
    prediction = model(grey.to(next(model.parameters()).device)).cpu()
    shown = {"input": grey, "truth": torch.from_numpy(pictures.depth()[:PANELS]), "prediction": prediction}
    return {
        name: [[[round(v, 3) for v in row] for row in one] for one in part.tolist()] for name, part in shown.items()
    }
