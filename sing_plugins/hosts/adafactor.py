"""Adafactor (Shazeer and Stern 2018) with an explicit lr: no relative step, no scaling by the parameter's RMS.

That is how the paper ran it (appendix C.1). The second moment of a tensor of two or more dimensions is kept as a row
and a column average over its last two dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sing_plugins.hosts.base import Group, Host, State, Tensors, calibrate
from sing_plugins.standardize import norm, sharded_like

EPS_SQUARE = 1e-30  # added to the squared gradient, as in Adafactor itself; SING's `eps` guards the norm


def init_state(param: Tensor, group: Group) -> State:
    if param.dim() < 2:
        return {"exp_avg_sq": torch.zeros_like(param)}
    row, column = param.shape[:-1], param.shape[:-2] + param.shape[-1:]
    return {"exp_avg_sq_row": param.new_zeros(row), "exp_avg_sq_col": param.new_zeros(column)}


def update(params: Tensors, grads: Tensors, states: list[State], group: Group) -> None:
    for param, grad, state in zip(params, grads, states, strict=True):
        decay = (state["step"] if group["capturable"] else state["step"].item()) ** -group["decay_rate"]
        change = grad / _denominator(grad.square() + EPS_SQUARE, decay, state, group)
        change = sharded_like(param, change)
        rms = norm(change) / change.numel() ** 0.5
        change.mul_(group["lr"] / (rms / group["clip_threshold"]).clamp_(min=1.0))
        if group.get("momentum"):
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param)
            change = state["exp_avg"].lerp_(change, 1 - group["momentum"])
        param.sub_(change)


def _denominator(square: Tensor, decay: float | Tensor, state: State, group: Group) -> Tensor:
    if isinstance(decay, Tensor):
        decay = decay.to(square.dtype)
    if square.dim() < 2:
        root = state["exp_avg_sq"].lerp_(square, decay).sqrt()
    else:
        row = state["exp_avg_sq_row"].lerp_(square.mean(dim=-1), decay)
        column = state["exp_avg_sq_col"].lerp_(square.mean(dim=-2), decay)
        row = row / row.mean(dim=-1, keepdim=True)
        root = row.sqrt().unsqueeze(-1) * column.sqrt().unsqueeze(-2)
    return root if group["softplus_beta"] is None else calibrate([root], group)[0]


HOST = Host("adafactor", {"decay_rate": 0.8, "clip_threshold": 1.0}, init_state, update, without_default=("momentum",))
