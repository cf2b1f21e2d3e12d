"""AdaBelief (Zhuang et al. 2020), without rectification: the variance of the gradient replaces its second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from sing_plugins.hosts.base import Group, Host, State, Tensors, Totals, column, in_proportion, move


def init_state(param: Tensor, group: Group) -> State:
    return {"exp_avg": torch.zeros_like(param), "exp_avg_var": torch.zeros_like(param)}


def update(params: Tensors, grads: Tensors, states: list[State], group: Group, totals: Totals) -> None:
    beta1, beta2 = group["betas"]
    exp_avgs, exp_avg_vars = column(states, "exp_avg"), column(states, "exp_avg_var")
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    residuals = torch._foreach_sub(grads, exp_avgs)
    torch._foreach_mul_(exp_avg_vars, beta2)
    torch._foreach_addcmul_(exp_avg_vars, residuals, residuals, value=1 - beta2)
    # The algorithm keeps this eps in its state, where it grows to eps / (1 - beta2).
    torch._foreach_add_(exp_avg_vars, [group["eps"] / in_proportion(group, shape) for shape in totals.shapes])
    move(params, exp_avgs, exp_avg_vars, states, group, totals.shapes)


HOST = Host("adabelief", {"betas": (0.9, 0.999)}, init_state, update)
