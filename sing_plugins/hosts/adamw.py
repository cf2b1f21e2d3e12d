"""AdamW (Loshchilov and Hutter 2019): the paper's main host."""

from __future__ import annotations

import torch
from torch import Tensor

from sing_plugins.hosts.base import Group, Host, State, Tensors, Totals, column, move


def init_state(param: Tensor, group: Group) -> State:
    return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}


def update(params: Tensors, grads: Tensors, states: list[State], group: Group, totals: Totals) -> None:
    beta1, beta2 = group["betas"]
    exp_avgs, exp_avg_sqs = column(states, "exp_avg"), column(states, "exp_avg_sq")
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    move(params, exp_avgs, exp_avg_sqs, states, group, totals.shapes)


HOST = Host("adamw", {"betas": (0.9, 0.999)}, init_state, update)
