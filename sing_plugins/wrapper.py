"""SING in front of any torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from sing_plugins.checks import ParamGroup, WholeTensors, check_gradient, check_options, check_saved_by, check_wrappable
from sing_plugins.optimizer import count_lookahead_step, lookahead_merge
from sing_plugins.standardize import standardize

PREFIX = "sing_"  # our keys in the param groups that we share with the host


def wrap(
    optimizer: Optimizer,
    *,
    centralize: bool = True,
    normalize: bool = True,
    norm_eps: float = 1e-8,
    lookahead_k: int | None = 5,
    lookahead_alpha: float = 0.5,
    centralize_rows_of_one: bool = False,
) -> Wrapped:
    """Put standardization in front of, and Lookahead around, any ``torch.optim.Optimizer`` instance.

    The optimizer sees standardized gradients and is otherwise left alone: its denominator has no softplus and its
    weight decay is its own (Algorithm 2: "the OPTIMIZER function can be any optimizer"). For the paper's full recipe
    with AdamW, AdaBelief, Adafactor or SGD use :class:`sing_plugins.SING`.

    Args:
        optimizer: the host. Do not step it yourself afterwards; its param groups and state are shared.
        centralize, normalize, lookahead_k, lookahead_alpha, centralize_rows_of_one: as in :class:`sing_plugins.SING`.
        norm_eps: added to the gradient's norm; the host's own ``eps`` is the host's.

    Returns:
        An optimizer with the host's param groups and one ordinary state dict.

    Raises:
        TypeError: the optimizer cannot be wrapped (closure-driven, gradients taken during backward, second-order, …).
        ValueError: an option that is not accepted.
    """
    check_wrappable(optimizer)
    options: ParamGroup = {
        "centralize": centralize,
        "normalize": normalize,
        "norm_eps": norm_eps,
        "lookahead_k": lookahead_k,
        "lookahead_alpha": lookahead_alpha,
        "centralize_rows_of_one": centralize_rows_of_one,
    }
    check_options(options)
    options |= {"lookahead_step": 0, "host": type(optimizer).__name__}
    return Wrapped(optimizer, {PREFIX + name: value for name, value in options.items()})


class Wrapped(WholeTensors, Optimizer):
    """An optimizer behind standardization and Lookahead; made by :func:`wrap`.

    Attributes:
        host: the optimizer that was wrapped. ``param_groups`` and ``state`` are the host's own.
    """

    host: Optimizer

    def __init__(self, host: Optimizer, options: ParamGroup) -> None:
        # What Optimizer.__init__ would build belongs to the host; the rest is what unpickling builds.
        self.__setstate__({"host": host, "defaults": {**host.defaults, **options}})

    @property
    def param_groups(self) -> list[ParamGroup]:
        return self.host.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        self.host.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.host.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.host.state = state

    def __getstate__(self) -> dict[str, Any]:
        return {"host": self.host, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._complete_groups()

    def __repr__(self) -> str:
        return f"Wrapped {self.host!r}"

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name.startswith(PREFIX):
                    group.setdefault(name, value)
        self.declare(self.param_groups)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group to the host; keys with the prefix ``sing_`` override the options of :func:`wrap`.

        Raises:
            ValueError: an option that is not accepted, before anything is changed.
        """
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group}, PREFIX)
        self.host.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """The host's state dict, with Lookahead's slow weights and phase in it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.host.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict that a wrapped optimizer of the same class has saved.

        Raises:
            ValueError: another optimizer has saved it, or the host without SING. Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for group in state_dict["param_groups"]:
            check_saved_by(group.get(PREFIX + "host"), self.defaults[PREFIX + "host"])
        self.host.load_state_dict(state_dict)
        self._complete_groups()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let the host update with standardized gradients; ``p.grad`` is what it was afterwards.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: as :meth:`sing_plugins.SING.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_whole(self.param_groups)
        grads = {param: param.grad for group in self.param_groups for param in group["params"]}
        grads = {param: grad for param, grad in grads.items() if grad is not None}
        for grad in grads.values():
            check_gradient(grad)
        first_weights = {
            param: param.clone()
            for group in self.param_groups
            if group[PREFIX + "lookahead_k"] is not None
            for param in group["params"]
            if param in grads and "lookahead_params" not in self.state.get(param, {})
        }
        try:
            for group in self.param_groups:
                _substitute([param for param in group["params"] if param in grads], group)
            self.host.step()
        finally:
            for param, grad in grads.items():
                param.grad = grad
        # Only now: hosts take an empty state for a parameter that they have not seen.
        for param, weight in first_weights.items():
            self.state[param]["lookahead_params"] = weight
        for group in self.param_groups:
            if count_lookahead_step(group, PREFIX):
                for param in group["params"]:
                    if param in grads:
                        slow = self.state[param]["lookahead_params"]
                        lookahead_merge([param], [slow], group[PREFIX + "lookahead_alpha"])
        return loss


def _substitute(params: list[Tensor], group: ParamGroup) -> None:
    """Put the standardized gradient in the place of each parameter's gradient."""
    standardized = standardize(
        [param.grad for param in params if param.grad is not None],
        centralize=group[PREFIX + "centralize"],
        normalize=group[PREFIX + "normalize"],
        eps=group[PREFIX + "norm_eps"],
        rows_of_one=group[PREFIX + "centralize_rows_of_one"],
    )
    for param, grad in zip(params, standardized, strict=True):
        substitute = grad.to(param.dtype)
        # Some hosts clip in place, which must not reach a gradient that standardization left as it was.
        param.grad = substitute.clone() if substitute is param.grad else substitute
