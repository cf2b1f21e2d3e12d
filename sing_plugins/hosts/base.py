"""What a host is, and the arithmetic that hosts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sing_plugins.standardize import norm, widest

Group = Mapping[str, Any]
State = dict[str, Any]
Tensors = list[Tensor]


@dataclass(frozen=True)
class Host:
    """An optimizer's update rule.

    Attributes:
        name: as in ``SING(host=name)``.
        defaults: the hyper-parameters that only this host has, with their defaults.
        init_state: the host's own tensors for one parameter (without ``step``), from a working-precision parameter.
        update: changes parameters and states in place from standardized gradients. Called with lists of equal length
            and at least one entry, all of one device and dtype, after weight decay and after ``step`` was counted. Of
            sharded tensors these are the parts that one rank has; sums over a whole one go through its ``totals``.
        later: the names of the tensors of zeros, of the parameter's shape, that a group's options ask for besides, in a
            step that may not be the first one: schedules may raise a momentum from 0 in mid-run.
        without_dim: of a state that lacks one of the parameter's dimensions, that dimension, from the last one (-1).
        softplus: whether the host has a denominator for softplus to calibrate.
        without_default: further hyper-parameters, which a param group has only where they are given and not zero, so
            that a schedule which finds one in the defaults does not switch it on.
    """

    name: str
    defaults: Mapping[str, Any]
    init_state: Callable[[Tensor, Group], State]
    update: Callable[[Tensors, Tensors, list[State], Group, Totals], None]
    softplus: bool = True
    without_default: tuple[str, ...] = ()
    later: Callable[[Group], tuple[str, ...]] = lambda group: ()
    without_dim: Mapping[str, int] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the hyper-parameters that only this host has."""
        return (*self.defaults, *self.without_default)


class Totals:
    """Sums over whole tensors, of which an update may have parts; here it has all of them.

    Args:
        params: the parameters.

    Attributes:
        shapes: of the whole tensors.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.shapes = [param.shape for param in params]

    def of(self, sums: Tensors, numbers: Sequence[int], dims: Sequence[int]) -> Tensors:
        """Complete sums over one dimension.

        Args:
            sums: over the parts.
            numbers: for each sum the number of its tensor.
            dims: for each sum the dimension of that tensor, from the last one (-1).
        """
        return sums

    def norms(self, tensors: Tensors) -> Tensors:
        """The Euclidean norm of each tensor that the update has a part of, in their order."""
        return list(map(norm, tensors))


def column(states: Sequence[State], key: str) -> Tensors:
    """The tensors that a list of states keeps under one key."""
    return [state[key] for state in states]


def move(
    params: Tensors,
    first_moments: Tensors,
    second_moments: Tensors,
    states: list[State],
    group: Group,
    shapes: Sequence[torch.Size],
) -> None:
    """``p ← p - lr · m̂ / √v̂``, with a denominator that is safe to divide by (:func:`calibrate`)."""
    beta1, beta2 = group["betas"]
    steps = torch.stack(column(states, "step"))
    roots = list(torch._foreach_sqrt(second_moments))
    # Corrections in double precision: in float32 they alone cost 5e-6.
    if group["capturable"]:
        counts = steps.to(widest(steps.device))
        torch._foreach_mul_(roots, list((1 - beta2**counts).rsqrt().unbind()))
        denoms = calibrate(roots, group, shapes)
        torch._foreach_mul_(denoms, list(((beta1**counts - 1) / group["lr"]).unbind()))
        torch._foreach_addcdiv_(params, first_moments, denoms)
        return
    taken = steps.tolist()  # one look at all counters
    torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in taken])
    sizes = [-group["lr"] / (1 - beta1**step) for step in taken]
    torch._foreach_addcdiv_(params, first_moments, calibrate(roots, group, shapes), sizes)


def sharpness(group: Group, shapes: Sequence[torch.Size]) -> list[float] | None:
    """The β of each tensor's softplus; None where softplus is off.

    Args:
        group: the options.
        shapes: of the whole tensors. With ``softplus_relative``, β is that times the root of the number of entries.
    """
    relative = group["softplus_relative"]
    beta = group["softplus_beta"] if relative is None else relative
    return None if beta is None else [beta * in_proportion(group, shape) ** 0.5 for shape in shapes]


def in_proportion(group: Group, shape: torch.Size) -> int:
    """By what squares of entries are multiplied where a host's constants meet them.

    Args:
        group: the options.
        shape: of the whole tensor.

    Returns:
        With ``softplus_relative`` the number of entries, which makes the mean square of a gradient of norm 1 one; else
        one, for squares as they are.
    """
    return 1 if group["softplus_relative"] is None else shape.numel()


def calibrate(roots: Tensors, group: Group, shapes: Sequence[torch.Size]) -> Tensors:
    """The roots, softened; without softplus, with ``eps`` added, which changes ``roots``."""
    betas = sharpness(group, shapes)
    if betas is not None:
        return soften(roots, betas)
    torch._foreach_add_(roots, group["eps"])
    return roots


def soften(roots: Tensors, betas: list[float]) -> Tensors:
    """Softplus calibration ``ln(1 + e^(βx)) / β`` of non-negative ``x`` (paper section 3.1, Tong et al. 2022).

    Written as ``x + ln(1 + e^(-βx)) / β``, which cannot overflow and has no threshold beyond which it would be replaced
    by ``x``.
    """
    calibrated = torch._foreach_mul(roots, [-beta for beta in betas])
    torch._foreach_exp_(calibrated)
    torch._foreach_add_(calibrated, 1.0)
    torch._foreach_log_(calibrated)  # log1p takes six times as long on the CPU, and what it saves is lost next to x
    torch._foreach_div_(calibrated, betas)
    torch._foreach_add_(calibrated, roots)
    return list(calibrated)
