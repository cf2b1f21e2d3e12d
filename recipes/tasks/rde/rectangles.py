"""The rectangle depth estimation (RDE) data set: grey rectangles on top of each other; how high does each lie?

After section 5.2 of the paper, which shows examples but gives no generator. What it leaves open is decided so that the
picture determines the answer: a rectangle's height is one more than that of the highest rectangle that it visibly lies
on, and pictures in which that cannot be seen are drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAPER_SIZE = 128
SIDES = (24, 64)  # shortest and longest side of a rectangle, in pixels of a picture of PAPER_SIZE
FEWEST_VISIBLE = 32  # pixels that a rectangle shows at least, in a picture of PAPER_SIZE
DARKEST = 0.2  # grey of the darkest rectangle; the ground is 0, the brightest rectangle 1

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Pictures:
    """Pictures and what is to be found in them.

    Attributes:
        grey: float32 [N, size, size], 0 to 1.
        owner: uint8 [N, size, size]: the rectangle that each pixel shows, from 1; 0 is the ground.
        height: uint8 [N, rectangles + 1]: by owner; 0 for the ground.
    """

    grey: NDArray[np.float32]
    owner: NDArray[np.uint8]
    height: NDArray[np.uint8]

    def depth(self) -> NDArray[np.float32]:
        """The target: each pixel's height as a share of the greatest possible one, float32 [N, size, size]."""
        flat = np.take_along_axis(self.height, self.owner.reshape(len(self.owner), -1), axis=1)
        return (flat.reshape(self.owner.shape) / self.rectangles).astype(np.float32)

    @property
    def rectangles(self) -> int:
        """How many there are in each picture, which is also the greatest possible height."""
        return int(self.height.shape[1]) - 1

    def correct(self, prediction: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether every rectangle of a picture has its height: the mean over its visible pixels is off by less than
        half a level (paper C.1).

        Args:
            prediction: [N, size, size], in units of :meth:`depth`.

        Returns:
            [N]
        """
        cells = (np.arange(len(self.height))[:, None, None] * self.height.shape[1] + self.owner).ravel()
        pixels = np.bincount(cells, minlength=self.height.size).reshape(self.height.shape)
        sums = np.bincount(cells, prediction.ravel(), minlength=self.height.size).reshape(self.height.shape)
        levels = self.rectangles * sums[:, 1:] / pixels[:, 1:]
        return np.asarray((np.abs(levels - self.height[:, 1:]) < 0.5).all(axis=1))


def draw(count: int, size: int, rectangles: int, seed: int) -> Pictures:
    """Draw pictures.

    Args:
        count: how many.
        size: side in pixels.
        rectangles: in each picture, 1 to 255.
        seed: the same seed gives the same pictures.
    """
    random = np.random.default_rng(seed)
    grey = np.empty((count, size, size), np.float32)
    owner = np.empty((count, size, size), np.uint8)
    height = np.empty((count, rectangles + 1), np.uint8)
    shades = np.linspace(DARKEST, 1.0, rectangles, dtype=np.float32)
    for index in range(count):
        while True:
            boxes = _boxes(random, size, rectangles)
            owner[index] = paint(boxes, size)
            found = heights(owner[index], boxes)
            if found is not None:
                break
        height[index] = found
        grey[index] = np.concatenate(([0.0], random.permutation(shades)))[owner[index]]
    return Pictures(grey, owner, height)


def _boxes(random: np.random.Generator, size: int, rectangles: int) -> NDArray[np.int64]:
    """Top, left, bottom, right of each rectangle, the last one on top; inside of the picture."""
    shortest, longest = (round(side * size / PAPER_SIZE) for side in SIDES)
    sides = random.integers(shortest, longest + 1, (rectangles, 2))
    corners = random.integers(0, size - sides + 1)
    return np.concatenate((corners, corners + sides), axis=1)


def paint(boxes: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """The rectangle that each pixel shows, as in :class:`Pictures`."""
    owner = np.zeros((size, size), np.uint8)
    for index, (top, left, bottom, right) in enumerate(boxes, 1):
        owner[top:bottom, left:right] = index
    return owner


def heights(owner: NDArray[np.uint8], boxes: NDArray[np.int64]) -> NDArray[np.uint8] | None:
    """Each rectangle's height, None if the picture does not tell.

    Args:
        owner: the rectangle that each pixel shows, as in :class:`Pictures`.
        boxes: top, left, bottom, right of each rectangle, the last one on top; ends are exclusive.

    That is where a rectangle shows too little of itself, where two touch without overlapping, so that they look as if
    one lay on the other, and where nothing lies on anything, so that there is nothing to be found out.
    """
    kinds = len(boxes) + 1
    fewest = max(1, FEWEST_VISIBLE * owner.size // PAPER_SIZE**2)
    if np.bincount(owner.ravel(), minlength=kinds)[1:].min() < fewest:
        return None
    touch = np.zeros((kinds, kinds), bool)
    for one, other in ((owner[1:], owner[:-1]), (owner[:, 1:], owner[:, :-1])):
        touch[one, other] = touch[other, one] = True
    top, left, bottom, right = boxes.T
    overlap = (top[:, None] < bottom) & (top < bottom[:, None]) & (left[:, None] < right) & (left < right[:, None])
    touch = touch[1:, 1:]
    if (touch & ~overlap).any():
        return None
    found = np.zeros(kinds, np.uint8)
    for index in range(len(boxes)):
        found[index + 1] = 1 + max(found[1 : index + 1][touch[index, :index]], default=0)
    return found if found.max() > 1 else None
