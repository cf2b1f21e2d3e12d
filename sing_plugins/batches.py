"""The tensors of a step, in batches that one call takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

from torch import Tensor

from sing_plugins.checks import ParamGroup
from sing_plugins.sharded import Shard


class Batch(NamedTuple):
    """Tensors that one call updates.

    Attributes:
        implementation: see :mod:`sing_plugins.kernels`.
        params: the parameters, of one device and dtype; of one mesh, if they are sharded.
        shards: this rank's parts of their gradients, if they are sharded.
    """

    implementation: str
    params: list[Tensor]
    shards: list[Shard] | None = None


Live = list[tuple[ParamGroup, list[Batch]]]


def params_of(batches: list[Batch]) -> Iterator[Tensor]:
    return (param for batch in batches for param in batch.params)


def gradient(param: Tensor) -> Tensor:
    return cast(Tensor, param.grad)  # batches hold no parameter without
