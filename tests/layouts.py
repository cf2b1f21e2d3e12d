"""Tensors as they may lie in memory, and gradients for them, for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def unaligned(tensor: Tensor) -> Tensor:
    """Begins four bytes after where anything would like to begin."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def gradients(params: list[nn.Parameter], steps: int, seed: int = 1) -> Iterator[list[Tensor]]:
    """Of scales and means that differ by tensor and step, in the layout of their parameters."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn = [torch.randn(p.shape, generator=generator) * 10.0 ** ((i + step) % 5 - 3) for i, p in enumerate(params)]
        shifted = [grad + (i % 3) * grad.abs().mean() for i, grad in enumerate(drawn)]
        yield [torch.empty_like(param).copy_(grad) for param, grad in zip(params, shifted, strict=True)]
