"""ImageNet: a ResNet classifies photographs, by FFCV's recipe (paper, section 5.1). Through timm and Accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from recipes.machinery import vision
from recipes.tasks.imagenet.data import Data

if TYPE_CHECKING:
    from recipes.machinery.record import Outcome
    from recipes.machinery.run import Run

METRIC = "accuracy"
HIGHER_IS_BETTER = True
ON_THE_WAY = "valid accuracy"  # of what is measured during training, what is drawn: the paper's Figure 3
commands = vision.commands

FEWEST_BLURRED = 16  # channels of what is blurred; the first convolution, which sees the image, is left as it is


class Blur(nn.Module):
    """A binomial filter of 3x3 on each channel, with zeros around: it keeps a strided convolution from aliasing.

    Args:
        channels: how many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(line, line).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[N, channels, H, W], and so is the result."""
        kernel: Tensor = self.kernel  # type: ignore[assignment]
        return conv2d(maps, kernel.to(maps.dtype), padding=1, groups=maps.shape[1])


def blur_strided(module: nn.Module) -> None:
    """Put a blur in front of every strided convolution with at least :data:`FEWEST_BLURRED` input channels."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= FEWEST_BLURRED:
            setattr(module, name, nn.Sequential(Blur(child.in_channels), child))
        else:
            blur_strided(child)


@dataclass(frozen=True)
class Model:
    """The table ``[model]``.

    Attributes:
        name: of the timm model.
        blur: whether strided convolutions see a blurred input.
    """

    name: str
    blur: bool = True

    def build(self, classes: int) -> nn.Module:
        """The model, with random weights."""
        model: nn.Module = timm.create_model(self.name, num_classes=classes, zero_init_last=False)
        if self.blur:
            blur_strided(model)
        return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Evaluation:
    """The table ``[evaluation]``.

    Attributes:
        flip_average: whether the scores are the mean of an image's and its mirror image's.
    """

    flip_average: bool = False

    def __call__(self, model: nn.Module, batch: vision.Batch) -> dict[str, Tensor]:
        """For each image of a batch whether its class is found, and the cross-entropy."""
        images, labels = batch
        views = [images, images.flip(-1)] if self.flip_average else [images]
        scores = torch.stack([model(view).float() for view in views]).mean(dim=0)
        return {"accuracy": scores.argmax(dim=1) == labels, "loss": cross_entropy(scores, labels, reduction="none")}


def train(run: Run) -> Outcome:
    """Train and evaluate; metrics: ``accuracy`` (top 1) and ``loss`` (cross-entropy without smoothing)."""
    settings = run.settings
    data, model = Data(**settings["data"]), Model(**settings["model"])
    loss, evaluation = partial(_loss, nn.CrossEntropyLoss(**settings["loss"])), Evaluation(**settings["evaluation"])
    sets = data.load(run.data)
    return vision.fit(run, partial(model.build, data.classes), sets.pop("train"), loss, evaluation, sets)


def _loss(criterion: nn.Module, model: nn.Module, batch: vision.Batch) -> Tensor:
    images, labels = batch
    loss: Tensor = criterion(model(images), labels)
    return loss
