"""CIFAR100: a ResNet classifies small pictures (paper, section 5.1 and appendix C.2). Through timm and Accelerate."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.machinery import vision
from recipes.tasks.cifar100.augment import Augmentation, augment
from recipes.tasks.cifar100.data import SOURCES, Source

if TYPE_CHECKING:
    from recipes.machinery.record import Outcome
    from recipes.machinery.run import Run

METRIC = "accuracy"
HIGHER_IS_BETTER = True
ON_THE_WAY = "valid accuracy"  # of what is measured during training, what is drawn
commands = vision.commands


@dataclass(frozen=True)
class Data:
    """The table ``[data]``.

    Attributes:
        name: of the data set, ``"cifar100"`` or ``"fashion-mnist"``.
        train: how many pictures of the training set are trained with.
        valid: how many others of it are held out for tuning; 0 is accepted.
        seed: of that choice.
    """

    name: str
    train: int
    valid: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ValueError(f"Invalid data.name: {self.name!r}. Accepted: {', '.join(SOURCES)}.")

    @property
    def source(self) -> Source:
        return SOURCES[self.name]

    def load(self, folder: Path) -> dict[str, vision.Tensors]:
        """Pixels and labels by split; the test set is the data set's own, all of it."""
        known, test = self.source.read(folder)
        kept, held_out = vision.hold_out(len(known.labels), self.valid, self.seed, self.train)
        sets = {
            "train": vision.Tensors(known.pixels[kept], known.labels[kept]),
            "valid": vision.Tensors(known.pixels[held_out], known.labels[held_out]),
            "test": vision.Tensors(test.pixels, test.labels),
        }
        return {split: data for split, data in sets.items() if len(data)}


@dataclass(frozen=True)
class Model:
    """The table ``[model]``.

    Attributes:
        name: of a ResNet of timm's.
        stem_stride: of the 3x3 convolution that takes the place of timm's stem and its max-pooling.
        freeze_norm: whether the weights and biases of the normalization layers stay as they are, for every optimizer.
        options: of the timm model.
    """

    name: str
    stem_stride: int = 1
    freeze_norm: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, channels: int, classes: int) -> nn.Module:
        """The model, with random weights.

        Args:
            channels: of a picture.
            classes: how many to tell apart.
        """
        model: Any = timm.create_model(
            self.name, in_chans=channels, num_classes=classes, zero_init_last=False, **self.options
        )
        model.conv1 = nn.Conv2d(channels, model.bn1.num_features, 3, self.stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        if self.freeze_norm:
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.requires_grad_(False)
        network: nn.Module = model
        return network


@dataclass(frozen=True)
class Look:
    """What a model is shown: pixels from 0 to 255 become numbers around 0.

    Attributes:
        source: whose mean and standard deviation are meant.
        augmentation: None for pictures as they are.
    """

    source: Source
    augmentation: Augmentation | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [N, C, S, S] → float32 [N, C, S, S]."""
        pictures = pixels.float() / 255
        if self.augmentation:
            pictures = augment(pictures, self.augmentation)
        mean, std = (pictures.new_tensor(values).view(-1, 1, 1) for values in (self.source.mean, self.source.std))
        return (pictures - mean) / std


def train(run: Run) -> Outcome:
    """Train and evaluate; metrics: ``accuracy`` (top 1) and ``loss`` (cross-entropy without smoothing)."""
    settings = run.settings
    data, model = Data(**settings["data"]), Model(**settings["model"])
    augmentation = Augmentation(**settings["augment"])
    loss = partial(_loss, Look(data.source, augmentation), nn.CrossEntropyLoss(**settings["loss"]))
    sets = data.load(run.data)
    build = partial(model.build, len(data.source.mean), data.source.classes)
    return vision.fit(run, build, sets.pop("train"), loss, partial(_measure, Look(data.source)), sets)


def _loss(look: Look, criterion: nn.Module, model: nn.Module, batch: vision.Batch) -> Tensor:
    pixels, labels = batch
    loss: Tensor = criterion(model(look(pixels)), labels)
    return loss


def _measure(look: Look, model: nn.Module, batch: vision.Batch) -> dict[str, Tensor]:
    pixels, labels = batch
    scores: Tensor = model(look(pixels)).float()
    return {"accuracy": scores.argmax(dim=1) == labels, "loss": cross_entropy(scores, labels, reduction="none")}
