"""The Triton kernel for tensors on an accelerator: what it takes, and how it is called.

Three launches update all tensors of a param group, however many (``_triton.py``), and nothing waits for the device.
What the kernels have to know of the tensors lies in tables on the device, which are copied there when they change: the
layout with the shapes, the addresses where a tensor has moved, and the counts of steps where they are not those that
the kernels have counted themselves. Triton comes with torch where there is a device for it; without it everything
works, with more launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sing_plugins.kernels.cpu import HOSTS, Layout, are_entries, in_rows, moments, rows_of, rule
from sing_plugins.lookahead import SLOW

__all__ = ["HOSTS", "Kernel", "missing", "takes", "takes_counter", "takes_entries"]

IS_DEFAULT = False  # has run in Triton's interpreter, and was compiled for GPUs, but was not run on one
UNIT = 16384  # entries at most that one program takes the statistics of
BLOCK = 1024  # entries that one program updates
_NO_HOST = -1
_AS_DUE = 2  # merge where the device finds that it is due


@functools.cache
def library() -> ModuleType | None:
    """The kernels, or None; :func:`missing` says why."""
    return None if missing() else _load()


@functools.cache
def missing() -> str:
    """Why there is no kernel for any device; empty if there may be one."""
    try:
        _load()
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return ""


@functools.cache
def missing_on(device: torch.device) -> str:
    """Why there is no kernel for a device; empty if one has run there, which is tried once."""
    if missing():
        return missing()
    group = {"centralize": True, "centralize_rows_of_one": False, "normalize": True}
    try:
        Kernel().standardize([torch.ones(1, device=device)], group, "", 1e-8)
    except Exception as error:  # of Triton, of the compilers that it calls, of the driver: whichever they raise
        return f"Triton cannot be used on {device}: {error}"
    return ""


@functools.cache
def _load() -> ModuleType:
    from sing_plugins.kernels import _triton  # imports Triton, which takes time

    return _triton


@functools.cache
def _is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(tensor: Tensor) -> bool:
    """Whether the kernel can work on a tensor."""
    return (tensor.is_cuda or _is_interpreted()) and in_rows(tensor) and not missing_on(tensor.device)


def takes_entries(tensor: Tensor) -> bool:
    """The same of a tensor that has the shape and the strides of one that is taken."""
    return (tensor.is_cuda or _is_interpreted()) and are_entries(tensor)


def takes_counter(count: Tensor, param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the kernel can count a parameter's steps in a tensor, on the CPU or on the parameter's device."""
    return count.dtype is torch.float32 and (_is_on_host(count, group) or count.device == param.device)


def _is_on_host(count: Tensor, group: dict[str, Any]) -> bool:
    return count.is_cpu and not group.get("capturable")


class _Options(NamedTuple):
    """What the kernels do; by itself, that they write the divided gradient."""

    centralize: bool
    normalize: bool
    eps: float
    host: int = _NO_HOST
    lr: float | Tensor = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    softplus_beta: float | None = None
    relative: bool = False
    momentum: float = 0.0
    maximize: bool = False
    alpha: float = 0.0
    merge: bool | Tensor = False


class Kernel:
    """The kernel for one optimizer: keeps the layout of its param groups' tensors from step to step."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, torch.device], _Table] = {}
        self._captured: list[object] = []

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
            params, grads: those that ``kernels.implementation_of`` calls fused, of one device, no two parameters of the
                same memory.
            states: those that ``kernels.takes_state`` has accepted. Steps are counted where their counters are, on the
                CPU or on the device.
            group: the options. A learning rate that is a tensor on the device is read there.
            merge: whether Lookahead is due; where that is a tensor, the kernel looks at it.
        """
        host, softplus_beta, relative = rule(group)
        options = _Options(
            centralize=group["centralize"],
            normalize=group["normalize"],
            eps=group["eps"],
            host=host,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            betas=group.get("betas", (0.0, 0.0)),
            softplus_beta=softplus_beta,
            relative=relative,
            momentum=group.get("momentum", 0.0),
            maximize=group["maximize"],
            alpha=group["lookahead_alpha"],
            merge=merge,
        )
        with _on(params[0].device):
            table = self._table(
                params, group, (group["centralize"], group["centralize_rows_of_one"], group["decay_all"])
            )
            counts, kept = [state["step"] for state in states], zip(("first", "second"), moments(group), strict=False)
            table.point(
                param=_addresses(params),
                grad=_addresses(grads),
                step=table.counters(counts, [_is_on_host(count, group) for count in counts]),
                # Also between merges: a table that changes is a table that is copied.
                slow=_addresses([state.get(SLOW, param) for param, state in zip(params, states, strict=True)]),
                **{field: _addresses([state[name] for state in states]) for field, name in kept},
            )
            self._run(table, options)
            table.count()
        torch.autograd.graph.increment_version(params)

    def standardize(self, grads: list[Tensor], group: dict[str, Any], prefix: str, eps: float) -> list[Tensor]:
        """As :func:`sing_plugins.standardize.standardize`, for gradients that :func:`takes` has accepted.

        Args:
            grads: the gradients, of one device.
            group: the options, with ``prefix`` before their names.
            prefix: of the keys in the param group.
            eps: added to the norm.
        """
        centralize, rows_of_one = group[prefix + "centralize"], group[prefix + "centralize_rows_of_one"]
        with _on(grads[0].device):
            table = self._table(grads, group, (centralize, rows_of_one, False))
            standardized = [torch.empty_like(grad) for grad in grads]
            table.point(param=_addresses(standardized), grad=_addresses(grads))
            self._run(table, _Options(centralize, group[prefix + "normalize"], eps))
        return standardized

    def _run(self, table: _Table, options: _Options) -> None:
        """Launch the kernels on the current device, which is the table's."""
        if _is_captured(table.device):
            self._captured.append(table.memory())  # a CUDA graph finds it where it is now, whenever it is replayed
        kernels, lr, merge, (beta1, beta2) = _load(), options.lr, options.merge, options.betas
        lr_is_there = isinstance(lr, Tensor) and lr.device == table.device
        has_statistics, has_softplus = options.centralize or options.normalize, options.softplus_beta is not None
        tables, statistics = (table.addresses, table.layout), (table.sums, table.squares, table.means)
        if has_statistics:
            kernels.statistics[(table.units,)](*tables, table.tensor_of_unit, *statistics, chunk=table.chunk)
        kernels.factors[(table.tensors,)](
            *tables,
            *statistics,
            table.factors,
            lr if lr_is_there else float(lr),
            float(options.weight_decay),
            float(options.eps),
            *_in_two(beta1),
            *_in_two(beta2),
            float(options.softplus_beta) if options.softplus_beta is not None else 1.0,
            host=options.host,
            lr_is_there=lr_is_there,
            statistics_are_there=has_statistics,
            relative=options.relative,
            normalize=options.normalize,
            maximize=options.maximize,
        )
        kernels.update[(table.blocks,)](
            *tables,
            table.tensor_of_block,
            table.means,
            table.factors,
            1.0 - beta1,
            float(beta2),
            1.0 - beta2,
            float(options.momentum),
            float(options.alpha),
            merge.to(table.device, torch.int32) if isinstance(merge, Tensor) else table.factors,
            host=options.host,
            softplus=has_softplus,
            merge=_AS_DUE if isinstance(merge, Tensor) else int(merge),
            block=BLOCK,
        )

    def _table(self, tensors: list[Tensor], group: object, layout: Layout) -> _Table:
        place, key = (id(group), tensors[0].device), ([tensor.shape for tensor in tensors], layout)
        table = self._tables.get(place)
        if table is None or table.key != key:
            table = self._tables[place] = _Table(*key, tensors[0].device)
        return table


class _Table:
    """Addresses and layout of tensors, and room for their statistics, on their device.

    Args:
        shapes: of the tensors, none of them empty.
        layout: see :func:`sing_plugins.kernels.cpu.rows_of`.
        device: of the tensors.
    """

    def __init__(self, shapes: list[torch.Size], layout: Layout, device: torch.device) -> None:
        self.key, self.device, self.chunk, self.tensors = (shapes, layout), device, UNIT, len(shapes)
        divided = [rows_of(shape, layout) for shape in shapes]
        chunks = [-(-of.columns // UNIT) for of in divided]
        each = [max(1, UNIT // of.columns) for of in divided]
        units = [-(-of.rows // rows) * count for of, rows, count in zip(divided, each, chunks, strict=True)]
        blocks = [-(-of.rows * of.columns // BLOCK) for of in divided]
        fields = {
            "rows": [of.rows for of in divided],
            "columns": [of.columns for of in divided],
            "each": each,
            "chunks": chunks,
            "units": units,
            "unit": _starts(units),
            "row": _starts([of.rows for of in divided]),
            "block": _starts(blocks),
            "centred": [int(of.centred) for of in divided],
            "decays": [int(of.decays) for of in divided],
        }
        kernels = _load()
        self.layout = self._there(_interleaved(kernels.LAYOUT, fields, units))
        self.units, self.tensor_of_unit = sum(units), self._there(_repeated(units))
        self.blocks, self.tensor_of_block = sum(blocks), self._there(_repeated(blocks))
        self.sums = torch.empty(self.units, dtype=torch.float64, device=device)
        self.squares = torch.empty_like(self.sums)
        self.means = torch.empty(sum(of.rows for of in divided), dtype=torch.float32, device=device)
        self.factors = torch.empty(len(shapes), len(kernels.FACTORS), dtype=torch.float32, device=device)

        self.addresses = self.layout[:0]
        self._sent: array[int] | None = None
        self._pinned: list[Tensor] = []
        self._counts = self.factors[:0]
        self._counted: list[float] | None = None  # what _counts has become; None if a step failed on the way
        self._counters: list[ctypes.c_float] = []
        self._counters_at: list[int] = []

    def point(self, **addresses: Sequence[int]) -> None:
        """Let the kernels find tensors.

        Args:
            addresses: those of each field, ``param`` at least.
        """
        entries = _interleaved(_load().ADDRESSES, addresses, addresses["param"])  # unused ones are addresses as well
        if entries != self._sent:
            self._sent, self.addresses = entries, self._there(entries)

    def counters(self, counts: list[Tensor], on_host: list[bool]) -> list[int]:
        """Where the device counts the steps of each tensor.

        Those on the host have a copy there, which the kernels count on by themselves: it is only made anew when the
        counts on the host are not what it must have become.
        """
        addresses = _addresses(counts)
        if not any(on_host):
            self._counters_at, self._counters = [], []
            return addresses
        hosts = [address for address, is_here in zip(addresses, on_host, strict=True) if is_here]
        if hosts != self._counters_at:
            self._counters_at, self._counters = hosts, [ctypes.c_float.from_address(address) for address in hosts]
        now = [counter.value for counter in self._counters]
        if now != self._counted:
            self._counts = self._there(array("f", now))
        self._counted = None
        copies = iter(range(self._counts.data_ptr(), self._counts.data_ptr() + 4 * len(now), 4))
        return [next(copies) if is_here else at for at, is_here in zip(addresses, on_host, strict=True)]

    def count(self) -> None:
        """Count a step on the host too."""
        for counter in self._counters:
            counter.value += 1
        self._counted = [counter.value for counter in self._counters]

    def memory(self) -> object:
        """All that the kernels are given, and what it is copied from."""
        return self, self.addresses, self._counts, list(self._pinned)

    def _there(self, values: array[Any] | Tensor) -> Tensor:
        """A copy on the device, which is made when its turn has come there; the host goes on."""
        if isinstance(values, array):
            values = torch.frombuffer(values, dtype={"q": torch.int64, "f": torch.float32}[values.typecode])
        if self.device.type == "cpu":
            return values.clone()
        pinned = values.pin_memory()  # torch keeps it until the copy is made
        if _is_captured(self.device):
            self._pinned.append(pinned)
        return pinned.to(self.device, non_blocking=True)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _in_two(value: float) -> tuple[float, float]:
    """A number as the sum of two that are exact, or nearly, in float32."""
    most = ctypes.c_float(value).value
    return most, value - most


def _starts(sizes: list[int]) -> list[int]:
    return list(accumulate(sizes[:-1], initial=0))


def _repeated(counts: list[int]) -> Tensor:
    """Each index as often as is said."""
    indices, counted = torch.arange(len(counts), dtype=torch.int32, device="cpu"), torch.tensor(counts, device="cpu")
    return torch.repeat_interleave(indices, counted)


def _interleaved(names: Sequence[str], fields: Mapping[str, Sequence[int]], default: Sequence[int]) -> array[int]:
    """The fields of each tensor one after the other.

    Args:
        names: of the fields, in their order.
        fields: the values for all tensors, by name.
        default: those of a field that is left out.
    """
    entries = array("q", bytes(8 * len(names) * len(default)))
    for position, name in enumerate(names):
        entries[position :: len(names)] = array("q", fields.get(name, default))
    return entries
