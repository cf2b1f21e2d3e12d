"""The compiled kernel for tensors in the memory of the CPU: what it takes, and how it is called.

It is plain C behind ctypes (``_cpu.c``), so that one build serves every torch and every Python. Without it everything
works, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sing_plugins.lookahead import SLOW
from sing_plugins.standardize import has_centre

IS_DEFAULT = True
ABI = 3  # _cpu.c's sing_abi
_ADDRESSES = ("param", "first", "second", "slow", "step", "grad")
_FIELDS = (*_ADDRESSES, "rows", "columns", "centred", "decays", "row")
_UNIT = ("tensor", "begin", "end", "first", "last")

# Host -> its number in _cpu.c, and the names of its moments.
HOSTS = {"adamw": (0, ("exp_avg", "exp_avg_sq")), "adabelief": (1, ("exp_avg", "exp_avg_var")), "sgd": (2, ())}
_SGD_MOMENTUM, _SGD_NESTEROV, _NO_HOST = 3, 4, -1

_ALONE = 1 << 17  # a step of fewer entries is done before other threads have begun
Layout = tuple[bool, bool, bool]  # whether rows are centred, whether those of one entry are, whether all is decayed

_PLAIN = (Tensor, nn.Parameter)  # a subclass may keep its entries elsewhere


class _Options(ctypes.Structure):
    _REALS = ("lr", "weight_decay", "eps", "beta1", "beta2", "softplus_beta", "momentum", "alpha")
    _WHOLE = ("host", "softplus", "relative", "normalize", "maximize", "merge")
    _fields_ = [(name, ctypes.c_double) for name in _REALS] + [(name, ctypes.c_int64) for name in _WHOLE]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel, or None; :func:`missing` says why."""
    return None if missing() else _load()


@functools.cache
def missing() -> str:
    """Why the kernel cannot be used; empty if it can."""
    try:
        abi = _load().sing_abi()
    except StopIteration:
        return "it was not compiled: reinstall sing-plugins where there is a C compiler"
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded: {error}"
    return "" if abi == ABI else "it was compiled from another version: reinstall sing-plugins"


@functools.cache
def _load() -> ctypes.CDLL:
    found = next(path for path in sorted(Path(__file__).parent.glob("_cpu.*")) if path.suffix in (".so", ".pyd"))
    loaded = ctypes.CDLL(str(found))
    address, whole = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in {
        "sing_abi": [],
        "sing_instruction_sets": [],
        "sing_units": [address, whole, address],
        "sing_shared": [address, address, whole, whole, address, address, whole],
        "sing_step": [address, address, whole, whole, address, address, address, whole],
        "sing_count": [address, whole],
    }.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = whole
    return loaded


@functools.cache
def instruction_set() -> int:
    """The best of ``_cpu.c``'s that this processor has."""
    return int(_load().sing_instruction_sets())


def takes(tensor: Tensor) -> bool:
    """Whether the kernel can work on a tensor."""
    return tensor.is_cpu and in_rows(tensor)


def takes_entries(tensor: Tensor) -> bool:
    """The same of a tensor that has the shape and the strides of one that is taken."""
    return tensor.is_cpu and are_entries(tensor)


def in_rows(tensor: Tensor) -> bool:
    """Whether a tensor is its own float32 entries, row by row one after the other in memory: what kernels work on."""
    return are_entries(tensor) and _are_in_rows(tensor.shape, tensor.stride())


def are_entries(tensor: Tensor) -> bool:
    """Whether a tensor is its own float32 entries, however they lie."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


def takes_counter(count: Tensor, param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the kernel can count a parameter's steps in a tensor."""
    return count.dtype is torch.float32 and count.is_cpu


@functools.lru_cache(4096)
def _are_in_rows(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether entries lie without gaps and overlaps, those of one row (index of the first dimension) together.

    The order within a row may be any: channels-last tensors are in rows.
    """
    expected, dims = 1, range(1, len(shape))
    for dim in sorted(dims, key=stride.__getitem__):
        if shape[dim] != 1:
            if stride[dim] != expected:
                return False
            expected *= shape[dim]
    return not shape or shape[0] == 1 or stride[0] == expected


class Kernel:
    """The kernel for one optimizer: keeps the layout of its param groups' tensors from step to step."""

    def __init__(self) -> None:
        self._tables: dict[int, _Table] = {}

    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        group: dict[str, Any],
        merge: bool | Tensor,
    ) -> None:
        """Count, standardize, decay, update and, where it is due, merge Lookahead's slow weights, in place.

        Args:
            params, grads: those that ``kernels.implementation_of`` calls fused, no two parameters of the same memory.
            states: those that ``kernels.takes_state`` has accepted.
            group: the options.
            merge: whether Lookahead is due.
        """
        table = self._table(params, group, (group["centralize"], group["centralize_rows_of_one"], group["decay_all"]))
        merge = bool(merge)
        pointed = {"step": "step", **dict(zip(("first", "second"), moments(group), strict=False))}
        if merge:
            pointed["slow"] = SLOW
        table.run(
            _options(group, merge),
            param=params,
            grad=grads,
            **{field: [state[name] for state in states] for field, name in pointed.items()},
        )
        table.count()
        torch.autograd.graph.increment_version(params)

    def standardize(self, grads: list[Tensor], group: dict[str, Any], prefix: str, eps: float) -> list[Tensor]:
        """As :func:`sing_plugins.standardize.standardize`, for gradients that :func:`takes` has accepted.

        Args:
            grads: the gradients.
            group: the options, with ``prefix`` before their names.
            prefix: of the keys in the param group.
            eps: added to the norm.
        """
        table = self._table(
            grads, group, (group[prefix + "centralize"], group[prefix + "centralize_rows_of_one"], False)
        )
        standardized = [torch.empty_like(grad) for grad in grads]
        options = _Options(host=_NO_HOST, normalize=group[prefix + "normalize"], eps=eps)
        table.run(options, param=standardized, grad=grads)
        return standardized

    def _table(self, tensors: list[Tensor], group: object, layout: Layout) -> _Table:
        key = [tensor.shape for tensor in tensors], layout
        table = self._tables.get(id(group))
        if table is None or table.key != key:
            table = self._tables[id(group)] = _Table(*key)
        return table


def moments(group: dict[str, Any]) -> tuple[str, ...]:
    """The names of the moments that a group's host keeps, the first one first."""
    return ("momentum_buffer",) if group.get("momentum") else HOSTS[group["host"]][1]


def rule(group: dict[str, Any]) -> tuple[int, float | None, bool]:
    """The number of a group's update rule in ``_cpu.c``, the sharpness of its softplus, and whether that is relative.

    Without softplus, the sharpness is None. A relative one is to be multiplied by the root of a tensor's size.
    """
    number, relative = HOSTS[group["host"]][0], group["softplus_relative"]
    if group.get("momentum"):
        return (_SGD_NESTEROV if group["nesterov"] else _SGD_MOMENTUM), None, False
    if number not in (HOSTS["adamw"][0], HOSTS["adabelief"][0]):
        return number, None, False
    return (number, group["softplus_beta"], False) if relative is None else (number, relative, True)


def _options(group: dict[str, Any], merge: bool) -> _Options:
    host, beta, relative = rule(group)
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    return _Options(
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        beta1=beta1,
        beta2=beta2,
        softplus_beta=beta or 0.0,
        momentum=group.get("momentum", 0.0),
        alpha=group["lookahead_alpha"],
        host=host,
        softplus=beta is not None,
        relative=relative,
        normalize=group["normalize"],
        maximize=group["maximize"],
        merge=merge,
    )


class Rows(NamedTuple):
    """What the statistics of a tensor are taken of: rows, if they are centred, else all entries as one row."""

    rows: int
    columns: int
    centred: bool
    decays: bool


def rows_of(shape: torch.Size, layout: Layout) -> Rows:
    """How a tensor is divided, and whether it is decayed."""
    centralize, rows_of_one, decay_all = layout
    centred = centralize and has_centre(shape, rows_of_one)
    rows = shape[0] if centred else 1
    return Rows(rows, shape.numel() // rows, centred, decay_all or len(shape) > 1)


class _Table:
    """Addresses and layout of tensors, and room for their statistics, where the kernel finds them.

    Args:
        shapes: of the tensors.
        layout: whether rows are centred, whether those of one element are, and whether all tensors are decayed.
    """

    def __init__(self, shapes: list[torch.Size], layout: Layout) -> None:
        self.key = shapes, layout
        rows, columns, centred, decays = zip(*(rows_of(shape, layout) for shape in shapes), strict=True)
        self._tensors = array("q", bytes(8 * len(_FIELDS) * len(shapes)))
        self._fill("rows", rows)
        self._fill("columns", columns)
        self._fill("centred", map(int, centred))
        self._fill("decays", map(int, decays))
        self._fill("row", accumulate(rows[:-1], initial=0))

        at = _address(self._tensors), len(shapes)
        units = array("q", bytes(8 * len(_UNIT) * _library().sing_units(*at, None)))
        _library().sing_units(*at, _address(units))
        self._units, self._means = units, array("f", bytes(4 * sum(rows)))
        self._squares = array("d", bytes(8 * (len(units) // len(_UNIT))))
        tensor, begin, end, self._first, _ = (units[k :: len(_UNIT)] for k in range(len(_UNIT)))
        entries = ((e - b) * (columns[t] if centred[t] else 1) for t, b, e in zip(tensor, begin, end, strict=True))
        self._sizes = list(accumulate(entries))

    def run(self, options: _Options, **tensors: Sequence[Tensor]) -> None:
        """Statistics of all gradients, then one pass over what is to be updated, in torch's number of threads.

        Args:
            options: the kernel's.
            tensors: those that each field of addresses is to have, ``param`` and ``grad`` at least.
        """
        addresses = {field: [tensor.data_ptr() for tensor in column] for field, column in tensors.items()}
        for field in _ADDRESSES:
            self._fill(field, addresses.get(field, addresses["param"]))  # what is not used is an address all the same
        given = _address(self._tensors), _address(self._units)
        room, best, kernel = (_address(self._means), _address(self._squares)), instruction_set(), _library()
        parts = _parts(self._sizes, torch.get_num_threads() if self._sizes[-1] >= _ALONE else 1)
        if any(self._first[begin] < begin for begin, _ in parts):
            _in_threads(lambda begin, end: kernel.sing_shared(*given, begin, end, *room, best), parts)
        _in_threads(
            lambda begin, end: kernel.sing_step(*given, begin, end, *room, ctypes.addressof(options), best), parts
        )

    def count(self) -> None:
        """Count a step in the tensors of the field ``step``."""
        _library().sing_count(_address(self._tensors), len(self._tensors) // len(_FIELDS))

    def _fill(self, field: str, values: Iterable[int]) -> None:
        self._tensors[_FIELDS.index(field) :: len(_FIELDS)] = array("q", values)


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, missing()
    return loaded


def _address(memory: array[Any]) -> int:
    return memory.buffer_info()[0]


def _parts(sizes: list[int], count: int) -> list[tuple[int, int]]:
    """Cut units, given by their accumulated sizes, into parts of about the same size."""
    cuts = [bisect_left(sizes, sizes[-1] * part / count) for part in range(count)] + [len(sizes)]
    return [(begin, end) for begin, end in pairwise(cuts) if begin < end and sizes[end - 1]]


def _in_threads(work: Callable[[int, int], object], parts: list[tuple[int, int]]) -> None:
    """Work on all parts at once, one of them in this thread; ctypes lets go of the interpreter's lock meanwhile."""
    others = [_pool(os.getpid(), len(parts)).submit(work, *part) for part in parts[1:]]
    if parts:
        work(*parts[0])
    for other in others:
        other.result()


@functools.lru_cache(2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Its threads live on from step to step; a forked process has none of them and makes its own."""
    return ThreadPoolExecutor(threads, "sing")
