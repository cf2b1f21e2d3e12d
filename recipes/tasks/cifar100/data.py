"""CIFAR100 as torchvision reads it, and Fashion-MNIST, which stands in for it."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets import CIFAR100  # type: ignore[import-untyped]

from recipes.machinery import fashion_mnist
from recipes.machinery.data import Download, fetch, filled
from recipes.machinery.fashion_mnist import Pictures

# The sha256 is the one that Keras and torchvision's prototypes have recorded; the download itself was not tried here.
ARCHIVE = Download(
    ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)


@dataclass(frozen=True)
class Source:
    """A data set of small pictures.

    Attributes:
        read: from the folder of all data sets, the training and the test set; fetches what is not there.
        classes: how many there are.
        mean: of each channel of the training set, of pixels from 0 to 1.
        std: likewise, the standard deviation.
    """

    read: Callable[[Path], tuple[Pictures, Pictures]]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def cifar100(folder: Path) -> Path:
    """CIFAR100's folder as torchvision lays it out, which may have been there before.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    target = folder / str(CIFAR100.base_folder)

    def unpack(making: Path) -> Path:
        with tarfile.open(fetch(ARCHIVE, folder)) as files:
            files.extractall(making, filter="data")
        return making / target.name

    return filled(target, unpack)


def read_cifar100(folder: Path) -> tuple[Pictures, Pictures]:
    """The training and the test set. torchvision checks the md5 of each pickle before it opens it.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`, or the files are not CIFAR100's.
    """
    files = cifar100(folder)
    try:
        train, test = (CIFAR100(folder, train=train) for train in (True, False))
    except RuntimeError as error:
        raise SystemExit(
            f"{files} does not hold CIFAR100's files, by their md5. Remove it; it is made again."
        ) from error
    return _channels_first(train.data, train.targets), _channels_first(test.data, test.targets)


def _channels_first(pixels: NDArray[np.uint8], labels: list[int]) -> Pictures:
    """[N, S, S, C] → [N, C, S, S]."""
    return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


SOURCES = {
    "cifar100": Source(read_cifar100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashion-mnist": Source(fashion_mnist.read, 10, (0.2860,), (0.3530,)),
}
