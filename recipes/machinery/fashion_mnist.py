"""Fashion-MNIST, 70,000 grey pictures of clothes in 10 classes, out of Debian's package."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.machinery.data import Download, fetch, read_deb

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


def prepare(folder: Path) -> Path:
    """Debian's package.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    return fetch(PACKAGE, folder)


def read(folder: Path) -> tuple[Pictures, Pictures]:
    """The training and the test set, one channel.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    files = {
        Path(name).name.removesuffix("-ubyte.gz"): idx(gzip.decompress(content))
        for name, content in read_deb(prepare(folder), lambda name: name.endswith("-ubyte.gz"))
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
