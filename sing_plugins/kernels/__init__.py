"""Which implementation updates a tensor: a kernel of ours, torch's multi-tensor functions, or one after the other.

========== =============================================================================================
fused      A kernel: float32, every host but Adafactor. On the CPU compiled C, on CUDA devices Triton's, which is not
           the default there before it has run on one.
foreach    All tensors of a group, device and dtype at once, by ``torch._foreach_*``.
loop       The same arithmetic, one tensor after the other: on the CPU a tensor stays in the cache.
========== =============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from sing_plugins.kernels import accelerator, cpu
from sing_plugins.lookahead import SLOW
from sing_plugins.options import AUTO, FOREACH, FUSED, LOOP

# Kind of device -> the module of its kernel: IS_DEFAULT, HOSTS, library, takes, takes_counter and Kernel.
_MODULES: dict[str, ModuleType] = {"cpu": cpu, "cuda": accelerator}


class Kernel(Protocol):
    """A kernel for one optimizer; see :class:`sing_plugins.kernels.cpu.Kernel`."""

    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        group: dict[str, Any],
        merge: bool | Tensor,
    ) -> None: ...

    def standardize(self, grads: list[Tensor], group: dict[str, Any], prefix: str, eps: float) -> list[Tensor]: ...


class Kernels(dict[str, Kernel]):
    """The kernels of one optimizer, by the kind of device that they are for."""

    def __missing__(self, kind: str) -> Kernel:
        self[kind] = _MODULES[kind].Kernel()
        return self[kind]


def takes_state(param: Tensor, state: dict[str, Any], group: dict[str, Any], merge: bool | Tensor) -> bool:
    """Whether the kernel of a parameter's device can update its state, where :func:`implementation_of` is fused."""
    if not _MODULES[param.device.type].takes_counter(state["step"], param, group):
        return False
    names, layout, shape, device = cpu.moments(group), param.stride(), param.shape, param.device
    for name in (*names, SLOW) if merge is not False else names:
        tensor = state.get(name)
        if (
            type(tensor) is not Tensor
            or tensor.dtype is not torch.float32
            or tensor.stride() != layout
            or tensor.shape != shape
            or tensor.device != device
        ):
            return False
    return True


def asked_for(group: Mapping[str, Any]) -> str:
    """The implementation that a param group of SING's wants."""
    if group["implementation"] == AUTO and group["foreach"] is not None:
        return FOREACH if group["foreach"] else LOOP
    return str(group["implementation"])


def implementation_of(param: Tensor, grad: Tensor, asked: str, host: str | None = None) -> str:
    """The implementation that updates a tensor. What the kernel does not take, another does.

    Args:
        param: the tensor.
        grad: its gradient.
        asked: what is wanted.
        host: the host's name; None where only the standardization is at stake.
    """
    if asked not in (AUTO, FUSED):
        return asked
    kernel = _MODULES.get(param.device.type)
    if (
        kernel is not None
        and (asked == FUSED or kernel.IS_DEFAULT)
        and (host is None or host in kernel.HOSTS)
        and kernel.library() is not None
        and kernel.takes(param)
        and kernel.takes_entries(grad)
        and grad.stride() == param.stride()
    ):
        return FUSED
    return FOREACH if asked == FUSED else of_torch(param.device)


def of_torch(device: torch.device) -> str:
    """The faster one of those that need no kernel."""
    return FOREACH if device.type in _get_foreach_kernels_supported_devices() else LOOP
