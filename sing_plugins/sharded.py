"""Arithmetic on sharded tensors (DTensors): each rank works on its own shard, and sums are added up over the ranks.

What a tensor's standardization has to know of its other shards are two kinds of sums: of each row, where rows are split
across ranks, and of all squares. Those of all tensors of a mesh are added up together, by one all-reduce for each of
the mesh's dimensions that tensors are split over. There is no other communication, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sing_plugins.hosts.base import Totals
from sing_plugins.standardize import divide, has_centre, in_one_piece, norms, widest, working_dtype


class Shard(NamedTuple):
    """This rank's part of a gradient, and what standardization has to know of the whole.

    Attributes:
        grad: the part.
        mean: of the rows that it has; None where nothing is centralized.
        norm: of the whole centralized gradient; None where it is not wanted.
    """

    grad: Tensor
    mean: Tensor | None
    norm: Tensor | None


class Wanted(NamedTuple):
    """What is to be known of the gradients of some parameters: options as in a param group, and whether norms are."""

    params: Sequence[Tensor]
    centralize: bool
    rows_of_one: bool
    norms: bool


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a tensor that is none is its own."""
    if not hasattr(tensor, "to_local"):
        return tensor
    part: Tensor = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # that of a collective that goes on


def distributed_like(param: Tensor, part: Tensor, without: int | None = None) -> Tensor:
    """A DTensor of this rank's part, cut as a parameter is.

    Args:
        param: the parameter.
        part: of the parameter's shape on this rank, but for the dimension that is left out.
        without: a dimension that it does not have, counted from the last one (-1).
    """
    from torch.distributed.tensor import DTensor, Replicate

    spec: Any = param
    shape, stride, placements = spec.shape, spec.stride(), spec.placements
    if without is not None:
        left_out = len(shape) + without
        shape = torch.Size(size for dim, size in enumerate(shape) if dim != left_out)
        stride = torch.empty(shape, device="meta").stride()
        placements = [Replicate() if _dim(place) == left_out else _moved(place, left_out) for place in spec.placements]
    return DTensor.from_local(part, spec.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def shards(wanted: Sequence[Wanted]) -> list[list[Shard]]:
    """The parts of all gradients, with statistics of the whole ones.

    Args:
        wanted: parameters with gradients, all of them DTensors.

    Returns:
        For each of ``wanted`` the shards of its parameters.
    """
    params = [param for of in wanted for param in of.params]
    options = [of for of in wanted for _ in of.params]
    grads = [_settled(param) for param in params]

    centred = [
        of.centralize and has_centre(param.shape, of.rows_of_one) for param, of in zip(params, options, strict=True)
    ]
    rows = [param for param, has in zip(params, centred, strict=True) if has]
    sums = [_row_sums(grad) for grad, has in zip(grads, centred, strict=True) if has]
    totals = iter(add_up(sums, rows, [cuts(param, lambda dim: dim > 0) for param in rows]))
    means = [
        (next(totals) / (param.numel() // param.shape[0])).to(working_dtype(grad)) if has else None
        for param, grad, has in zip(params, grads, centred, strict=True)
    ]

    divided = [at for at, of in enumerate(options) if of.norms]
    squares = [norms([_less(grads[at].to(working_dtype(grads[at])), means[at])])[0].square() for at in divided]
    picked = [params[at] for at in divided]
    lengths: list[Tensor | None] = [None] * len(params)
    for at, total in zip(divided, add_up(squares, picked, [cuts(param) for param in picked]), strict=True):
        lengths[at] = total.sqrt()

    found = iter(map(Shard, grads, means, lengths))
    return [[next(found) for _ in of.params] for of in wanted]


def standardized(parts: Sequence[Shard], normalize: bool, eps: float) -> list[Tensor]:
    """The standardized gradients' parts that this rank has, as :func:`sing_plugins.standardize.standardize`.

    Args:
        parts: of one device and working dtype.
        normalize: divide by the norm, which is there then.
        eps: added to the norm.
    """
    memory, result = in_one_piece([part.grad for part in parts])
    for part, whole in zip(result, parts, strict=True):
        if whole.mean is not None:
            part.sub_(whole.mean)
    if normalize:
        divide(memory, result, [part.norm for part in parts if part.norm is not None], eps)
    return result


class ShardedTotals(Totals):
    """Sums over whole tensors of which each rank has a part."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params)
        self._params = params

    def of(self, sums: list[Tensor], numbers: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
        params = [self._params[number] for number in numbers]
        over = [cuts(param, (param.dim() + dim).__eq__) for param, dim in zip(params, dims, strict=True)]
        return _as(sums, add_up(sums, params, over))

    def norms(self, tensors: list[Tensor]) -> list[Tensor]:
        squares = [length.square() for length in norms(tensors)]
        over = [cuts(param) for param in self._params]
        return _as(tensors, [total.sqrt() for total in add_up(squares, self._params, over)])


def cuts(param: Tensor, along: Callable[[int], bool] = lambda dim: True) -> frozenset[int]:
    """The dimensions of a parameter's mesh over which it is split along a dimension that ``along`` accepts."""
    spec: Any = param
    sizes = enumerate(zip(map(_dim, spec.placements), spec.device_mesh.shape, strict=True))
    return frozenset(of_mesh for of_mesh, (dim, size) in sizes if dim is not None and along(dim) and size > 1)


def add_up(values: Sequence[Tensor], params: Sequence[Tensor], over: Sequence[Collection[int]]) -> list[Tensor]:
    """Add up sums over the ranks: one all-reduce for each dimension of each mesh.

    Args:
        values: the sums of this rank's parts.
        params: the parameters, all of them DTensors, on whose meshes they are.
        over: for each value the dimensions of its mesh over which the ranks have different parts.

    Returns:
        The values of the whole, in float64 where the device has it.
    """
    import torch.distributed as dist

    totals = [value.to(widest(value.device)) for value in values]
    meshes: list[Any] = [param.device_mesh for param in params]  # type: ignore[attr-defined]
    for mesh in dict.fromkeys(meshes):
        for dim in range(mesh.ndim):
            split = [at for at, own in enumerate(meshes) if own == mesh and dim in over[at]]
            if split:
                together, parts = in_one_piece([totals[at] for at in split])
                dist.all_reduce(together, group=mesh.get_group(dim))
                for at, part in zip(split, parts, strict=True):
                    totals[at] = part
    return totals


def _as(values: Sequence[Tensor], totals: Sequence[Tensor]) -> list[Tensor]:
    return [total.to(value.dtype) for value, total in zip(values, totals, strict=True)]


def _settled(param: Tensor) -> Tensor:
    """This rank's part of a gradient, which may be a sum that the ranks have not added up yet, or cut otherwise."""
    grad: Any = param.grad
    placements = param.placements  # type: ignore[attr-defined]
    return local(grad if grad.placements == placements else grad.redistribute(placements=placements))


def _row_sums(grad: Tensor) -> Tensor:
    return grad.sum(dim=tuple(range(1, grad.dim())), keepdim=True, dtype=widest(grad.device))


def _less(grad: Tensor, mean: Tensor | None) -> Tensor:
    return grad if mean is None else grad - mean


def _dim(placement: Any) -> int | None:
    """The dimension that a placement splits. A strided shard says no to ``is_shard``, but has one as well."""
    return getattr(placement, "dim", None)


def _moved(placement: Any, left_out: int) -> Any:
    """A placement on a tensor that lacks a dimension."""
    dim = _dim(placement)
    if dim is None or dim < left_out:
        return placement
    strides = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim - 1, **strides)
