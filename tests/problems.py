"""Parameters and gradients that the optimizer tests share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (7,),
    (6, 5),
    (4, 1),
    (1, 8),
    (5, 4, 3),
    (4, 3, 3, 3),
    (2, 3, 2, 2, 2),
    (0, 3),
    (3, 0),
    (0,),
)


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    """One parameter of each shape, 0-d to 5-d and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(steps: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Iterator[list[Tensor]]:
    """For each step a gradient of each shape, of scales that differ by tensor and step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        yield [
            (torch.randn(s, generator=generator, dtype=torch.float64) * 10.0 ** ((i + step) % 5 - 2)).to(dtype)
            for i, s in enumerate(SHAPES)
        ]


def learning_rate(step: int) -> float:
    """A rate that changes at every step."""
    return 0.02 * (1.1 + math.cos(step / 7))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_gradients(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


class MatricesOnly(torch.optim.SGD):
    """Refuses some parameters of a model when it is built, as Muon does, which old torches do not have."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        if any(param.dim() != 2 for group in self.param_groups for param in group["params"]):
            raise ValueError("matrices only")
