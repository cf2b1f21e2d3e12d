"""What is refused, and with which words: gradients, state dicts, and optimizers that cannot be wrapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sing_plugins.lookahead import PHASE, SLOW
from sing_plugins.options import shown
from sing_plugins.standardize import is_dtensor

ParamGroup = dict[str, Any]


def check_gradient(param: Tensor, grad: Tensor) -> None:
    """Raise for a gradient that cannot be standardized, or that its parameter cannot be updated with.

    Raises:
        RuntimeError: sparse or complex gradient; one on another device, or sharded where the parameter is not.
    """
    if param.device != grad.device:
        raise RuntimeError(f"A parameter on {param.device} has its gradient on {grad.device}. Move it there.")
    if is_dtensor(param) != is_dtensor(grad):
        kinds = [f"{type(tensor).__name__}, {tuple(tensor.shape)}" for tensor in (param, grad)]
        raise RuntimeError(f"Of a parameter and its gradient ({'; '.join(kinds)}) only one is sharded.")
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"SING does not support sparse gradients (layout {grad.layout}): the mean and the norm are those of the "
            "dense tensor. Use sparse=False in the embedding, or give that parameter an optimizer of its own."
        )
    if grad.is_complex():
        raise RuntimeError(
            f"SING does not support complex gradients (dtype {grad.dtype}). "
            "Hold the parameter as torch.view_as_real of it."
        )


def check_dtype(param: Tensor) -> None:
    """Raise for a gradient of another dtype than its parameter's, in whose place no other gradient can be put.

    Raises:
        RuntimeError: the dtypes differ.
    """
    if param.grad is not None and param.grad.dtype != param.dtype:
        raise RuntimeError(
            f"A parameter of {param.dtype} has a gradient of {param.grad.dtype}, which a wrapped optimizer may not "
            "take. Give it one of the parameter's dtype, or use SING with a host of its own."
        )


def check_saved_by(saved: str | None, host: str, *aliases: str) -> None:
    """Raise for a state dict that another optimizer has saved.

    Args:
        saved: the host in the state dict, None if it is not one of SING's.
        host: the host of the optimizer that loads it.
        aliases: what the host was called in state dicts of earlier versions.

    Raises:
        ValueError: they differ.
    """
    if saved not in (host, *aliases):
        whose = f"SING with the host {saved!r}" if saved else "an optimizer without SING"
        raise ValueError(
            f"Invalid state_dict: it was saved by {whose}, but this is SING with the host {host!r}. Load it into what "
            "has saved it, or start with a new optimizer state: moments of other gradients would mislead this one."
        )


def check_saved_group(
    saved: Mapping[str, Any], defaults: ParamGroup, prefix: str, check: Callable[[ParamGroup], None]
) -> None:
    """Raise for a param group without a learning rate, with options that are not accepted, or with an impossible phase.

    Args:
        saved: the group in a state dict.
        defaults: the optimizer's, of what an earlier version has not saved.
        prefix: of our keys.
        check: raises for options that are not accepted.

    Raises:
        ValueError: says that it is in the state dict.
    """
    if "lr" in defaults and "lr" not in saved:
        raise ValueError("Invalid state_dict: a param group has no 'lr'.")
    group = {**defaults, **saved}
    try:
        check(group)
    except ValueError as error:
        raise ValueError(f"Invalid state_dict: in a param group: {error}") from error
    period, phase = group[prefix + "lookahead_k"], group[prefix + PHASE]
    if not 0 <= phase < (period or math.inf):
        raise ValueError(
            f"Invalid state_dict: a param group's {prefix + PHASE} is {phase!r}. Accepted: the steps since Lookahead's "
            f"last merge, fewer than {prefix}lookahead_k={period!r}."
        )


def check_saved_state(
    state_dict: Mapping[str, Any],
    groups: list[ParamGroup],
    needed: Callable[[Tensor, ParamGroup], Mapping[str, torch.Size]],
    optional: Sequence[str] = (SLOW,),
) -> None:
    """Raise for a state that is not the parameters' own: truncated, with too much, or of other shapes.

    Args:
        state_dict: what is loaded; torch compares the numbers of its groups and parameters.
        groups: the param groups of the optimizer that loads it.
        needed: the tensors, and their shapes, that the state of a parameter of a group has once it has made a step.
        optional: the tensors of the parameter's shape that it may have.

    Raises:
        ValueError: says which parameter's state it is, and what is wrong with it.
    """
    saved, known = state_dict["state"], set()
    for saved_group, group in zip(state_dict["param_groups"], groups, strict=False):
        for key, param in zip(saved_group["params"], group["params"], strict=False):
            known.add(key)
            state = saved.get(key, {})
            if not isinstance(state, Mapping):
                raise ValueError(f"Invalid state_dict: the state of parameter {key} is {state!r}. Accepted: a dict.")
            shapes = dict.fromkeys(optional, param.shape)
            if set(state) - set(optional):
                shapes.update(needed(param, group))
            for name, shape in shapes.items():
                if name not in state and name not in optional:
                    raise ValueError(f"Invalid state_dict: the state of parameter {key} lacks {name!r}.")
                if name in state and getattr(state[name], "shape", shape) != shape:
                    raise ValueError(
                        f"Invalid state_dict: {name} of parameter {key} has the shape {tuple(state[name].shape)}, but "
                        f"{tuple(shape)} belongs to this optimizer's parameter, of shape {tuple(param.shape)}."
                    )
    known.update(key for group in state_dict["param_groups"] for key in group["params"])
    if set(saved) - known:
        surplus = sorted(map(str, set(saved) - known))
        raise ValueError(f"Invalid state_dict: it has states of parameters that are in no group: {surplus[:3]}.")


def check_wrappable(optimizer: object) -> None:
    """Raise for an optimizer that cannot be put behind standardization.

    Raises:
        TypeError: not an optimizer, or its step cannot be wrapped; says why.
    """
    kind = type(optimizer)
    name = kind.__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Invalid optimizer: {shown(optimizer)}. Accepted: a torch.optim.Optimizer instance.")
    for reason, applies in _UNWRAPPABLE.items():
        if applies(optimizer):
            raise TypeError(f"Invalid optimizer: {name} cannot be wrapped: {reason}.")


def _requires_closure(optimizer: Optimizer) -> bool:
    import inspect

    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


_UNWRAPPABLE: dict[str, Callable[[Optimizer], bool]] = {
    "it already standardizes gradients": lambda o: getattr(o, "standardizes_gradients", False),
    "its step calls the closure by itself, so it would see gradients that are not standardized": _requires_closure,
    "it wants sparse gradients": lambda o: isinstance(o, torch.optim.SparseAdam),
    "it takes the gradient during backward": lambda o: hasattr(o, "fused_backward") or hasattr(o, "optimizer_dict"),
    "it needs second-order gradients": lambda o: getattr(o, "is_second_order", False) or hasattr(o, "set_hessian"),
    "it switches the weights with train() and eval(), which Lookahead would not follow": (
        lambda o: callable(getattr(o, "train", None)) and callable(getattr(o, "eval", None))
    ),
    "it is itself a wrapper; wrap the optimizer inside it, then apply that wrapper": (
        lambda o: type(o).__name__ in ("AcceleratedOptimizer", "Lookahead", "SAM")
    ),
}
