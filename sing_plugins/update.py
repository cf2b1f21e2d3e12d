"""The update of tensors by torch's functions, once their gradients are standardized and their states exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sing_plugins.hosts import HOSTS, Totals
from sing_plugins.lookahead import SLOW, Lookahead
from sing_plugins.standardize import working_dtype

COMPENSATION = "kahan_compensation"  # what rounding took from a weight, where kahan_sum keeps it


def apply(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    totals: Totals,
    merge: bool | Tensor,
    lookahead: Lookahead,
) -> None:
    """Count, decay, update and, where it is due, merge Lookahead's slow weights, in place.

    Args:
        params: of one device and dtype.
        grads: the standardized gradients.
        states: all that the parameters need.
        group: the options.
        totals: of the whole tensors.
        merge: whether Lookahead is due.
        lookahead: that one.
    """
    dtype = working_dtype(params[0])
    low_precision, compensates = params[0].dtype != dtype, COMPENSATION in states[0]
    grads = [grad.to(dtype) for grad in grads]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    weights = [param.to(dtype) for param in params]
    if compensates:
        torch._foreach_add_(weights, [state[COMPENSATION].to(dtype) for state in states])
    torch._foreach_add_([state["step"] for state in states], 1.0)
    lr = group["lr"].reshape(()) if group["capturable"] and isinstance(group["lr"], Tensor) else float(group["lr"])
    if group["weight_decay"]:
        decayed = [weight for weight in weights if weight.dim() > 1 or group["decay_all"]]
        if decayed:
            torch._foreach_mul_(decayed, 1 - lr * group["weight_decay"])
    HOSTS[group["host"]].update(weights, grads, states, {**group, "lr": lr}, totals)
    if merge is not False:
        lookahead.merge(group, weights, [state[SLOW] for state in states], merge)
    if low_precision:
        torch._foreach_copy_(params, weights)
    if compensates:
        lost = torch._foreach_sub(weights, [param.to(dtype) for param in params])
        torch._foreach_copy_([state[COMPENSATION] for state in states], lost)
