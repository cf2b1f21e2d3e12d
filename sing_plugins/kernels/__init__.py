"""Which implementation updates a tensor: the compiled kernel, torch's multi-tensor functions, or one after the other.

========== =============================================================================================
fused      The compiled kernel: CPU, float32, every host but Adafactor. Statistics, then one pass.
foreach    All tensors of a group, device and dtype at once, by ``torch._foreach_*``.
loop       The same arithmetic, one tensor after the other: on the CPU a tensor stays in the cache.
========== =============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from sing_plugins.kernels import cpu
from sing_plugins.options import AUTO, FOREACH, FUSED, LOOP


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
    if asked in (AUTO, FUSED):
        if cpu.library() is not None and (host is None or host in cpu.HOSTS) and cpu.takes_gradient(param, grad):
            return FUSED
        asked = FOREACH if asked == FUSED or param.device.type in _get_foreach_kernels_supported_devices() else LOOP
    return asked
