"""SING in front of any torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sing_plugins.batches import Live
from sing_plugins.checks import (
    ParamGroup,
    check_dtype,
    check_saved_by,
    check_saved_group,
    check_saved_state,
    check_wrappable,
)
from sing_plugins.nonfinite import SKIPPED
from sing_plugins.options import OPTIONS, PROPAGATE, check_options, plain
from sing_plugins.sharded import distributed_like
from sing_plugins.step import Standardizing

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
    nonfinite: str = PROPAGATE,
) -> Wrapped:
    """Put standardization in front of, and Lookahead around, any ``torch.optim.Optimizer`` instance.

    The optimizer sees standardized gradients and is otherwise left alone: its denominator has no softplus and its
    weight decay is its own (Algorithm 2: "the OPTIMIZER function can be any optimizer"). For the paper's full recipe
    with AdamW, AdaBelief, Adafactor or SGD use :class:`sing_plugins.SING`.

    Args:
        optimizer: the host. Do not step it yourself afterwards; its param groups and state are shared.
        centralize, normalize, lookahead_k, lookahead_alpha, centralize_rows_of_one, nonfinite: as in
            :class:`sing_plugins.SING`.
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
        "nonfinite": nonfinite,
    }
    options = {name: plain(value) for name, value in options.items()}
    check_options(options)
    options |= {"lookahead_step": 0, SKIPPED: 0, "host": _identity(optimizer)}
    return Wrapped(optimizer, {PREFIX + name: value for name, value in options.items()})


def _identity(host: Optimizer) -> str:
    """A host's class and the package that it comes from: other packages have other optimizers of the same name."""
    package, is_package, _ = type(host).__module__.partition(".")
    return f"{package}.{type(host).__name__}" if is_package else type(host).__name__


class Wrapped(Standardizing):
    """An optimizer behind standardization and Lookahead; made by :func:`wrap`.

    torch's global step hooks and those of this optimizer see it step, with the user's gradients; hooks that were
    registered on the host itself see the host step, with standardized ones.

    Attributes:
        host: the optimizer that was wrapped. ``param_groups`` and ``state`` are the host's own.
    """

    host: Optimizer
    _prefix = PREFIX
    _eps = PREFIX + "norm_eps"
    _option_names = tuple(PREFIX + name for name in OPTIONS)

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
        self._lookahead.settle(self.param_groups)
        return {"host": self.host, "defaults": self.defaults, "_whole": self._whole}

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

    def _check_group(self, group: ParamGroup) -> None:
        check_options(group, PREFIX)

    def _add_param_group(self, param_group: ParamGroup) -> None:
        # Keys with our prefix override the options of `wrap`.
        if isinstance(param_group, dict):
            ours = [name for name in param_group if name.startswith(PREFIX)]
            param_group.update({name: plain(param_group[name]) for name in ours})
            self._check_group({**self.defaults, **param_group})
        self.host.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """The host's state dict, with Lookahead's slow weights and phase in it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._lookahead.settle(self.param_groups)
        state_dict = self.host.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict that a wrapped optimizer of the same class has saved.

        Raises:
            ValueError: another optimizer has saved it, or the host without SING, or it is truncated or another model's.
                Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for group in state_dict["param_groups"]:
            check_saved_by(group.get(PREFIX + "host"), self.defaults[PREFIX + "host"], type(self.host).__name__)
            check_saved_group(group, self.defaults, PREFIX, self._check_group)
        check_saved_state(state_dict, self.param_groups, lambda param, group: {})  # the rest is the host's to know
        self.host.load_state_dict(state_dict)
        for group in self.param_groups:
            group[PREFIX + "host"] = self.defaults[PREFIX + "host"]
        self._complete_groups()
        self._lookahead.trust(self.param_groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _step_host(self, live: Live) -> None:
        grads = {}
        try:
            for group, batches in live:
                for batch in batches:
                    for param, grad in zip(batch.params, self._standardized(batch, group), strict=True):
                        check_dtype(param)
                        grads[param], substitute = param.grad, grad.to(param.dtype)
                        if batch.shards is not None:
                            substitute = distributed_like(param, substitute)
                        # Some hosts clip in place, which must not reach what standardization left as it was.
                        param.grad = substitute.clone() if substitute is param.grad else substitute
            _step(self.host)
        finally:
            for param, own in grads.items():
                param.grad = own


def _step(host: Optimizer) -> None:
    """Step without torch's global hooks, which see the optimizer that the user steps."""
    by_scheduler = hasattr(vars(host).get("step"), "_wrapped_by_lr_sched")
    step = getattr(type(host).step, "__wrapped__", None) if getattr(type(host).step, "hooked", False) else None
    if step is None or ("step" in vars(host) and not by_scheduler):  # replaced by somebody, who knows why
        host.step()
        return
    host._opt_called = True  # type: ignore[attr-defined]  # what a scheduler of the host looks for
    args: Any = (host,)
    kwargs: Any = {}
    for pre_hook in host._optimizer_step_pre_hooks.values():
        args, kwargs = pre_hook(host, args, kwargs) or (args, kwargs)
    step(*args, **kwargs)
    for post_hook in host._optimizer_step_post_hooks.values():
        post_hook(host, args, kwargs)
