"""CIFAR100 as torchvision reads it, and Fashion-MNIST, which stands in for it, out of Debian's package."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR100  # type: ignore[import-untyped]

from recipes.machinery.data import Download, fetch, filled, read_deb

# The sha256 is the one that Keras and torchvision's prototypes have recorded; the download itself was not tried here.
ARCHIVE = Download(
    ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)
PACKAGE = Download.debian(
    "d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures.

    Attributes:
        pixels: uint8 [N, C, S, S].
        labels: int64 [N].
    """

    pixels: Tensor
    labels: Tensor


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


def fashion_mnist(folder: Path) -> Path:
    """Debian's package.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    return fetch(PACKAGE, folder)


def read_fashion_mnist(folder: Path) -> tuple[Pictures, Pictures]:
    """The training and the test set, one channel.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    files = {
        Path(name).name.removesuffix("-ubyte.gz"): idx(gzip.decompress(content))
        for name, content in read_deb(fashion_mnist(folder), lambda name: name.endswith("-ubyte.gz"))
    }
    train, test = (
        Pictures(files[f"{part}-images-idx3"].unsqueeze(1), files[f"{part}-labels-idx1"].long())
        for part in ("train", "t10k")
    )
    return train, test


def idx(content: bytes) -> Tensor:
    """The bytes of an IDX file: two zeros, the type, the number of axes; the axes' lengths (big-endian); the values.

    Raises:
        ValueError: it is no IDX file of bytes, or cut off.
    """
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"Not an IDX file of unsigned bytes: it begins with {content[:3]!r}.")
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin], ">u4").tolist()
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).view(shape)


SOURCES = {
    "cifar100": Source(read_cifar100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashion-mnist": Source(read_fashion_mnist, 10, (0.2860,), (0.3530,)),
}
