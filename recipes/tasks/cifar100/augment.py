"""Random crops, flips and rotations of a whole batch at once, on the device where the batch is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


@dataclass(frozen=True)
class Augmentation:
    """The table ``[augment]``, in the order in which it is applied; what comes from outside of a picture is 0.

    Attributes:
        padding: pixels by which a picture is moved at most, in each direction.
        flip: whether every other picture, on average, is mirrored, left to right.
        rotation: degrees by which a picture is turned at most.
    """

    padding: int = 0
    flip: bool = False
    rotation: float = 0.0


def augment(pictures: Tensor, options: Augmentation) -> Tensor:
    """Change each picture in a way of its own, drawn from torch's global generator.

    Args:
        pictures: [N, C, S, S], floating point.
        options: how much.

    Returns:
        Like ``pictures``; each pixel is one of the old ones (nearest neighbour), or 0.
    """
    count, size, device = len(pictures), pictures.shape[-1], pictures.device
    shift = torch.randint(-options.padding, options.padding + 1, (count, 2), device=device)
    mirrored = (torch.rand(count, device=device) < 0.5) & options.flip
    angle = (2 * torch.rand(count, device=device) - 1) * math.radians(options.rotation)
    return move(pictures, shift * 2 / size, mirrored, angle)


def move(pictures: Tensor, shift: Tensor, mirrored: Tensor, angle: Tensor) -> Tensor:
    """Crop, then mirror, then turn about the centre.

    Args:
        pictures: [N, C, S, S], floating point.
        shift: [N, 2]; where the crop lies, to the right and down, in units of half a picture.
        mirrored: [N], bool.
        angle: [N], radians, anticlockwise.
    """
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack((cos, -sin, none, sin, cos, none), dim=1).view(-1, 2, 3).to(pictures.dtype)
    # For each new pixel the place, x and y from -1 to 1, where it was before.
    place = affine_grid(turn, list(pictures.shape), align_corners=False)
    in_crop = (place.abs() <= 1).all(dim=-1).unsqueeze(1)
    mirror = torch.stack((1 - 2.0 * mirrored, torch.ones_like(angle)), dim=1)
    place = place * mirror[:, None, None] + shift[:, None, None]
    moved = grid_sample(pictures, place.to(pictures.dtype), mode="nearest", align_corners=False)
    return moved * in_crop
