"""The SING optimizer: checks, state, the skeleton of a step, Lookahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from sing_plugins.checks import ParamGroup, WholeTensors, check_gradient, check_options, check_saved_by
from sing_plugins.hosts import HOSTS
from sing_plugins.standardize import is_dtensor, standardize, working_dtype

# The options that only some hosts have; None in the constructor stands for the host's own default.
HOST_OPTIONS = sorted({option for host in HOSTS.values() for option in host.defaults})

# Param group keys of the optimizer file published with the paper -> ours.
PAPER_KEYS = {"grad_central": "centralize", "grad_norm": "normalize", "la_alpha": "lookahead_alpha"}


class SING(WholeTensors, Optimizer):
    """Standardize every tensor's gradient, then update with a host optimizer (paper, Algorithm 2).

    A step centralizes each gradient (φ), divides it by its norm (Γ), decays the weights, lets the host update them
    with a softplus-calibrated denominator, and every ``lookahead_k`` steps moves them back to the slow weights of
    Lookahead. ``p.grad`` is not changed, no state exists before the first step, and everything that a step needs is
    in :meth:`state_dict`, so that training resumes exactly at any phase of the Lookahead cycle.

    Args:
        params: parameters, named parameters or param groups; read once, so generators are fine.
        lr: learning rate, a float or a 0-d tensor. Usually ten times AdamW's best: the highest that is stable
            (paper C.2). Default 5e-3.
        betas: decay rates of the first and second moment, for the hosts adamw and adabelief. Default (0.9, 0.999).
        eps: added to the gradient's norm (paper, below equation 3); also to the host's denominator where softplus is
            off, and by adabelief to its variance. Default 1e-8.
        weight_decay: decoupled: ``p ← p (1 - lr · weight_decay)`` before the update. Usually a tenth of AdamW's.
            Reaches tensors of more than one dimension only, unless ``decay_all``. Default 0.
        foreach: update all tensors of a group at once (True) or one after the other (False). The default None takes
            the faster: at once on accelerators, one after the other on the CPU, where a tensor stays in the cache.
        maximize: ascend instead of descending.
        host: ``"adamw"``, ``"adabelief"``, ``"adafactor"`` or ``"sgd"``; for any other optimizer see
            :func:`sing_plugins.wrap`.
        momentum: sgd (default 0.9); adafactor's first moment (default 0: none).
        nesterov: sgd (default False).
        decay_rate: adafactor: its second moment decays by ``1 - step**-decay_rate``. Default 0.8.
        clip_threshold: adafactor: largest root mean square of an update before lr. Default 1.
        centralize: φ, for tensors of more than one dimension (equation 2).
        normalize: Γ (equation 3).
        softplus_beta: sharpness of the softplus that replaces ``+ eps`` in the host's denominator, or None for
            ``+ eps``. Default 50. The host sgd has no denominator and does not use it.
        lookahead_k: Lookahead's period in steps, or None for no Lookahead. Default 5.
        lookahead_alpha: the share of the fast weights in a Lookahead merge. Default 0.5.
        centralize_rows_of_one: a tensor whose rows have one element (``n×1``) is not centralized, since its gradient
            would become zero for ever. That deviates from the paper; True restores the paper's rule.
        decay_all: let weight decay reach tensors of zero and one dimension too, as torch.optim.AdamW does. With it
            and the four components off (``centralize=normalize=False, softplus_beta=lookahead_k=None``), the host
            adamw equals torch.optim.AdamW.

    Parameters in float16 and bfloat16 keep their state in float32 and are updated in float32. A zero gradient gives a
    zero update.

    Raises:
        ValueError: a hyper-parameter that is not accepted, or that the host does not have.
        RuntimeError: at a step: sparse or complex gradients, or parameters that are flat pieces of sharded tensors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        host: str = "adamw",
        momentum: float | None = None,
        nesterov: bool | None = None,
        decay_rate: float | None = None,
        clip_threshold: float | None = None,
        centralize: bool = True,
        normalize: bool = True,
        softplus_beta: float | None = 50.0,
        lookahead_k: int | None = 5,
        lookahead_alpha: float = 0.5,
        centralize_rows_of_one: bool = False,
        decay_all: bool = False,
    ) -> None:
        given = {
            "betas": betas,
            "momentum": momentum,
            "nesterov": nesterov,
            "decay_rate": decay_rate,
            "clip_threshold": clip_threshold,
        }
        defaults: ParamGroup = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": False,  # unpickling a torch optimizer adds it to the defaults
            "host": host,
            "centralize": centralize,
            "normalize": normalize,
            "softplus_beta": softplus_beta,
            "lookahead_k": lookahead_k,
            "lookahead_alpha": lookahead_alpha,
            "lookahead_step": 0,
            "centralize_rows_of_one": centralize_rows_of_one,
            "decay_all": decay_all,
            **_host_options(host, {name: value for name, value in given.items() if value is not None}),
        }
        _check_group(defaults, host)
        super().__init__(params, defaults)

    @property
    def host(self) -> str:
        """The name of the host optimizer."""
        return str(self.defaults["host"])

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group; its own hyper-parameters are checked like the constructor's.

        Raises:
            ValueError: as the constructor, before anything is changed.
        """
        if isinstance(param_group, dict):
            _check_group({**self.defaults, **param_group}, self.host)
        super().add_param_group(param_group)
        self.declare(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _adopt_paper_group(group)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for values in self.state.values():
            if "step" in values and not isinstance(values["step"], Tensor):
                values["step"] = torch.tensor(float(values["step"]))
        self.declare(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SING with the same host, or of the optimizer file published with the paper.

        Hyper-parameters are those of the state dict, as in every torch optimizer.

        Raises:
            ValueError: the state dict is another host's or another optimizer's, whose moments are those of gradients
                that were not standardized. Nothing is changed then.
        """
        for group in state_dict["param_groups"]:
            check_saved_by("adamw" if "grad_central" in group else group.get("host"), self.host)
        super().load_state_dict(state_dict)
        self._restore_precision(state_dict)

    def _restore_precision(self, state_dict: dict[str, Any]) -> None:
        """Optimizer.load_state_dict casts state to the parameter's dtype: take float32 state as it was saved."""
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=False):
            if working_dtype(param) == param.dtype:
                continue
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[param][key] = value.to(param.device, working_dtype(param), copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: sparse or complex gradients, or sharded parameters; no parameter has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_whole(self.param_groups)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    check_gradient(param.grad)
        for group in self.param_groups:
            merge = count_lookahead_step(group)
            for params in _batches(group):
                self._update(params, group, merge)
        return loss

    def _update(self, params: list[Tensor], group: ParamGroup, merge: bool) -> None:
        """One step for tensors of one device and dtype."""
        grads = standardize(
            [param.grad for param in params if param.grad is not None],
            centralize=group["centralize"],
            normalize=group["normalize"],
            eps=group["eps"],
            rows_of_one=group["centralize_rows_of_one"],
        )
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        low_precision = working_dtype(params[0]) != params[0].dtype
        weights = [param.float() for param in params] if low_precision else params
        states = [self._state(param, weight, group) for param, weight in zip(params, weights, strict=True)]
        for state in states:
            state["step"] += 1

        lr = float(group["lr"])
        if group["weight_decay"]:
            decayed = [weight for weight in weights if weight.dim() > 1 or group["decay_all"]]
            if decayed:
                torch._foreach_mul_(decayed, 1 - lr * group["weight_decay"])
        HOSTS[group["host"]].update(weights, grads, states, {**group, "lr": lr})
        if low_precision:
            copy_into(params, weights)
        if merge:
            lookahead_merge(params, [state["lookahead_params"] for state in states], group["lookahead_alpha"])

    def _state(self, param: Tensor, weight: Tensor, group: ParamGroup) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state.update(HOSTS[group["host"]].init_state(weight, group))
        if group["lookahead_k"] is not None and "lookahead_params" not in state:
            state["lookahead_params"] = weight.clone()
        return state


def count_lookahead_step(group: ParamGroup, prefix: str = "") -> bool:
    """Count a step of the group's Lookahead cycle (Zhang et al. 2019); whether its slow weights are merged now."""
    period = group[prefix + "lookahead_k"]
    if period is None:
        return False
    group[prefix + "lookahead_step"] += 1
    if group[prefix + "lookahead_step"] < period:
        return False
    group[prefix + "lookahead_step"] = 0
    return True


def lookahead_merge(params: list[Tensor], slow: list[Tensor], alpha: float) -> None:
    """``slow ← slow + alpha (p - slow)``, then ``p ← slow``, in place."""
    torch._foreach_lerp_(slow, [p.to(s.dtype) for p, s in zip(params, slow, strict=True)], alpha)
    copy_into(params, slow)


def copy_into(params: list[Tensor], values: list[Tensor]) -> None:
    """``p ← value``, in place, whatever their dtypes."""
    if is_dtensor(params[0]):  # has no multi-tensor copy
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    else:
        torch._foreach_copy_(params, values)


def _batches(group: ParamGroup) -> Iterator[list[Tensor]]:
    """The group's parameters that have a gradient with entries, in lists that one multi-tensor call can take."""
    params = [param for param in group["params"] if param.grad is not None and param.numel()]
    batches: dict[object, list[Tensor]] = {}
    for position, param in enumerate(params):
        foreach = group["foreach"]
        if foreach is None:
            foreach = param.device.type in _get_foreach_kernels_supported_devices()
        mesh = getattr(param, "device_mesh", None)  # DTensors of different meshes cannot share a call
        key = (param.device, param.dtype, mesh) if foreach else position
        batches.setdefault(key, []).append(param)
    yield from batches.values()


def _host_options(host: object, given: ParamGroup) -> ParamGroup:
    """The host's own hyper-parameters: its defaults, overridden by what was given."""
    if not isinstance(host, str) or host not in HOSTS:
        raise ValueError(f"Invalid host: {host!r}. Accepted: {', '.join(HOSTS)}; for any other use sing_plugins.wrap.")
    for name in given:
        if name not in HOSTS[host].defaults:
            having = ", ".join(other for other in HOSTS if name in HOSTS[other].defaults)
            raise ValueError(f"Invalid {name}: {given[name]!r}. The host {host!r} has no {name} ({having} have it).")
    return {**HOSTS[host].defaults, **given}


def _check_group(group: ParamGroup, host: str) -> None:
    if group["host"] != host:
        raise ValueError(f"Invalid host: {group['host']!r} in a param group. Accepted: {host!r}, as in all groups.")
    check_options(group)
    if group.get("nesterov") and not group["momentum"]:
        raise ValueError("Invalid nesterov: True with momentum 0. Give a momentum > 0 or leave nesterov out.")
    if not HOSTS[host].softplus and group["softplus_beta"] not in (None, 50.0):
        raise ValueError(
            f"Invalid softplus_beta: {group['softplus_beta']!r}. The host {host!r} has no denominator for softplus; "
            "leave it out."
        )


def _adopt_paper_group(group: ParamGroup) -> None:
    """Turn a param group of the optimizer file published with the paper into one of ours."""
    if "grad_central" not in group:
        return
    for theirs, ours in PAPER_KEYS.items():
        group[ours] = group.pop(theirs)
    beta = float(group.pop("beta_softplus"))
    group["softplus_beta"] = beta if group.pop("softplus") else None
    period = group.pop("la_mergetime")
    group["lookahead_k"] = period if group.pop("lookahead_active") else None
    group["lookahead_step"] = group.pop("la_step", 0)
    group["centralize_rows_of_one"] = True
    group["decay_all"] = False
    group["host"] = "adamw"
