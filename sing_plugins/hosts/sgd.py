"""SGD with momentum, classical or Nesterov. It has no denominator, so softplus does not apply."""

from __future__ import annotations

import torch
from torch import Tensor

from sing_plugins.hosts.base import Group, Host, State, Tensors, Totals, column


def init_state(param: Tensor, group: Group) -> State:
    return {}


def update(params: Tensors, grads: Tensors, states: list[State], group: Group, totals: Totals) -> None:
    momentum = group["momentum"]
    if momentum:
        buffers = column(states, "momentum_buffer")
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
    if isinstance(group["lr"], Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, group["lr"]))
    else:
        torch._foreach_add_(params, grads, alpha=-group["lr"])


def later(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


HOST = Host("sgd", {"momentum": 0.9, "nesterov": False}, init_state, update, softplus=False, later=later)
