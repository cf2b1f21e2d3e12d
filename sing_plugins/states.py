"""The state of SING's parameters: the count of their steps, their host's tensors, and what rounding took from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sing_plugins.hosts import HOSTS
from sing_plugins.sharded import distributed_like, local
from sing_plugins.standardize import is_dtensor, working_dtype
from sing_plugins.update import COMPENSATION

_CPU = torch.device("cpu")


def complete(params: Sequence[Tensor], group: Mapping[str, Any], every: Mapping[Tensor, Any]) -> list[dict[str, Any]]:
    """The states of parameters; makes what is missing of them.

    Args:
        params: of one device and dtype.
        group: their param group.
        every: the optimizer's states, by parameter, which makes an empty one for a parameter that has none.
    """
    host, working = HOSTS[group["host"]], working_dtype(params[0])
    device, zeros = _home(params[0], group), _zeros(params[0], group)
    states = []
    for param in params:
        state: dict[str, Any] = every[param]
        if "step" not in state:
            state["step"] = counter(0, device)
            for name, value in host.init_state(local(param).to(working), group).items():
                state[name] = _like(param, name, value, group)
        elif state["step"].device != device:  # loaded onto another, or capturable since
            state["step"] = state["step"].to(device)
        for name, kept_in in zeros.items():
            if name not in state:
                state[name] = _like(param, name, torch.zeros_like(local(param), dtype=kept_in), group)
        if COMPENSATION not in zeros:
            state.pop(COMPENSATION, None)
        states.append(state)
    return states


def is_complete(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether :func:`complete` would find all of a parameter's state where it has to be."""
    if "step" not in state or not _zeros(param, group).keys() <= state.keys():
        return False
    return bool(state["step"].device == _home(param, group))


def needed(param: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The tensors of a parameter's state and their shapes, once it has made a step."""
    weight = torch.empty(param.shape, device="meta")
    state = {"step": counter(0), **HOSTS[group["host"]].init_state(weight, group)}
    return {name: value.shape for name, value in state.items()}


def restore_precision(
    groups: Iterable[Mapping[str, Any]], every: Mapping[Tensor, Any], state_dict: Mapping[str, Any]
) -> None:
    """Take float32 state as it was saved: Optimizer.load_state_dict casts it to the parameter's dtype.

    Args:
        groups: the optimizer's param groups.
        every: its states, by parameter, as they were loaded.
        state_dict: from which.
    """
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for saved_id, param in zip(saved_ids, params, strict=False):
        if working_dtype(param) == param.dtype:
            continue
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and key not in ("step", COMPENSATION):
                every[param][key] = value.to(param.device, working_dtype(param), copy=True)


def counter(step: float, device: torch.device = _CPU) -> Tensor:
    """A count of steps, whatever the default dtype and device of the script: bfloat16 counts to 256."""
    return torch.tensor(float(step), dtype=torch.float32, device=device)


def _home(param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """The device of a parameter's count of steps."""
    return param.device if group["capturable"] else _CPU


def _zeros(param: Tensor, group: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """What a parameter's state has besides, as its group is now: tensors that are zeros at first, and their dtypes."""
    working = working_dtype(param)
    zeros = dict.fromkeys(HOSTS[group["host"]].later(group), working)
    if group["kahan_sum"] and param.dtype != working:
        zeros[COMPENSATION] = param.dtype
    return zeros


def _like(param: Tensor, name: str, value: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A host's state as it is kept: sharded as its parameter is."""
    if not is_dtensor(param):
        return value
    return distributed_like(param, value, HOSTS[group["host"]].without_dim.get(name))
