"""Adafactor (Shazeer and Stern 2018) with an explicit lr: no relative step, no scaling by the parameter's RMS.

That is how the paper ran it (appendix C.1). The second moment of a tensor of two or more dimensions is kept as a row
and a column average over its last two dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sing_plugins.hosts.base import Group, Host, State, Tensors, Totals, sharpness, soften

EPS_SQUARE = 1e-30  # added to the squared gradient, as in Adafactor itself; SING's `eps` guards the norm


def init_state(param: Tensor, group: Group) -> State:
    if param.dim() < 2:
        return {"exp_avg_sq": torch.zeros_like(param)}
    row, column = param.shape[:-1], param.shape[:-2] + param.shape[-1:]
    return {"exp_avg_sq_row": param.new_zeros(row), "exp_avg_sq_col": param.new_zeros(column)}


def update(params: Tensors, grads: Tensors, states: list[State], group: Group, totals: Totals) -> None:
    roots = _roots([grad.square() + EPS_SQUARE for grad in grads], states, group, totals)
    betas = sharpness(group, totals.shapes)
    denoms = roots if betas is None else soften(roots, betas)
    changes = [grad / denom for grad, denom in zip(grads, denoms, strict=True)]
    of_all = zip(params, changes, totals.norms(changes), totals.shapes, states, strict=True)
    for param, change, length, shape, state in of_all:
        rms = length / shape.numel() ** 0.5
        change.mul_(group["lr"] / (rms / group["clip_threshold"]).clamp_(min=1.0))
        if group.get("momentum"):
            change = state["exp_avg"].lerp_(change, 1 - group["momentum"])
        param.sub_(change)


def _roots(squares: Tensors, states: list[State], group: Group, totals: Totals) -> Tensors:
    """The roots of the second moments, once these have taken in the squares."""
    decays = [_decay(state, square, group) for state, square in zip(states, squares, strict=True)]
    factored = [at for at, shape in enumerate(totals.shapes) if len(shape) > 1]
    rows = [squares[at].sum(dim=-1) for at in factored]
    columns = [squares[at].sum(dim=-2) for at in factored]
    sums = iter(totals.of(rows + columns, factored * 2, [-1] * len(rows) + [-2] * len(columns)))
    for key, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
        for at in factored:
            states[at][key].lerp_(next(sums) / totals.shapes[at][dim], decays[at])
    of_rows = [states[at]["exp_avg_sq_row"].sum(dim=-1, keepdim=True) for at in factored]
    for at, total in zip(factored, totals.of(of_rows, factored, [-2] * len(factored)), strict=True):
        row = states[at]["exp_avg_sq_row"] / (total / totals.shapes[at][-2])
        squares[at] = row.sqrt().unsqueeze(-1) * states[at]["exp_avg_sq_col"].sqrt().unsqueeze(-2)
    for at in set(range(len(squares))) - set(factored):
        squares[at] = states[at]["exp_avg_sq"].lerp_(squares[at], decays[at]).sqrt()
    return squares


def _decay(state: State, square: Tensor, group: Group) -> float | Tensor:
    if not group["capturable"]:
        return float(state["step"].item() ** -group["decay_rate"])
    decay: Tensor = state["step"] ** -group["decay_rate"]
    return decay.to(square.dtype)


def later(group: Group) -> tuple[str, ...]:
    return ("exp_avg",) if group.get("momentum") else ()


HOST = Host(
    "adafactor",
    {"decay_rate": 0.8, "clip_threshold": 1.0},
    init_state,
    update,
    without_default=("momentum",),
    later=later,
    without_dim={"exp_avg_sq_row": -1, "exp_avg_sq_col": -2},
)
