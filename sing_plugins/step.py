"""A step of SING, whoever updates the weights: gather, check, standardize, update, merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from sing_plugins.checks import ParamGroup, check_gradient
from sing_plugins.lookahead import SLOW, Lookahead
from sing_plugins.sharding import WholeTensors
from sing_plugins.standardize import standardize

Batch = list[Tensor]
Live = list[tuple[ParamGroup, list[Batch]]]


class Standardizing(Optimizer):
    """An optimizer that standardizes gradients and is surrounded by Lookahead: SING, and any host that is wrapped.

    A step fails before it has changed anything, or leaves this: gradients are the user's, Lookahead's slow weights are
    those from before the step, and what had been updated stays updated.
    """

    standardizes_gradients = True  # which nobody should do twice
    _prefix: ClassVar[str] = ""  # of our keys in the param groups
    _eps: ClassVar[str] = "eps"  # the key of what is added to the norm

    _lookahead: Lookahead
    _whole: WholeTensors

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_whole": self._whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_whole" not in vars(self):
            self._whole = WholeTensors()
            self._whole.declare(self.param_groups)
        self._lookahead = Lookahead(self._prefix)
        self._lookahead.trust(self.param_groups)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group; its own hyper-parameters are checked like the constructor's.

        Raises:
            ValueError: as the constructor, before anything is changed.
        """
        if "_whole" not in vars(self):  # the constructor adds its groups so
            self._whole, self._lookahead = WholeTensors(), Lookahead(self._prefix)
        self._add_param_group(param_group)
        self._whole.declare(self.param_groups[-1:])

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
        self._whole.check(self.param_groups)
        live: Live = [(group, list(_batches(group))) for group in self.param_groups]
        for param in _params(live):
            check_gradient(_gradient(param))
        lookahead, state = self._lookahead, self.state
        starting = [p for group, batches in live for p in lookahead.begin(group, chain.from_iterable(batches), state)]
        begun = {param: (param._version, self._slow_weight(param)) for param in starting}
        try:
            self._step_host(live)
            for param, (_, weight) in begun.items():  # not before: hosts take an empty state for an unseen parameter
                state[param][SLOW] = weight
            for group, batches in live:
                is_due = lookahead.is_due(group)
                for batch in batches:
                    self._update(batch, group)
                    if is_due:
                        lookahead.merge(group, batch, state)
        except BaseException:
            for param, (version, weight) in begun.items():
                if state.get(param) or param._version != version:  # the host has seen it
                    state[param][SLOW] = weight
            lookahead.give_up(_params(live))
            raise
        lookahead.end(live)
        return loss

    def _add_param_group(self, param_group: ParamGroup) -> None:
        raise NotImplementedError

    def _slow_weight(self, param: Tensor) -> Tensor:
        return param.clone()

    def _step_host(self, live: Live) -> None:
        """Make the step of a host that updates all groups at once."""

    def _update(self, params: Batch, group: ParamGroup) -> None:
        """Update tensors of one device and dtype, where the host updates one batch after the other."""

    def _standardized(self, params: Batch, group: ParamGroup) -> list[Tensor]:
        return standardize(
            [_gradient(param) for param in params],
            centralize=group[self._prefix + "centralize"],
            normalize=group[self._prefix + "normalize"],
            eps=group[self._eps],
            rows_of_one=group[self._prefix + "centralize_rows_of_one"],
        )


def sync_lookahead(optimizer: Any) -> None:
    """Let Lookahead begin anew at the weights that the next step finds.

    Call it after weights were changed from outside in a way that leaves no trace in a tensor's version counter, such as
    ``parameter.data.copy_(…)``; other changes are noticed (see :mod:`sing_plugins.lookahead`). It is no method since
    programs written for timm's Lookahead, timm's ``train.py`` among them, call one of this name after every epoch.

    Args:
        optimizer: one of SING's, or what a framework has put around it.

    Raises:
        TypeError: there is none of SING's in it.
    """
    inner = optimizer
    while not isinstance(inner, Standardizing):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(f"Invalid optimizer: {type(optimizer).__name__}. Accepted: an optimizer of SING's.")
    for group in inner.param_groups:
        inner._lookahead.drop(group, inner.state)


def _batches(group: ParamGroup) -> Iterator[Batch]:
    """The group's parameters that have a gradient with entries, in lists that one multi-tensor call can take."""
    params = [param for param in group["params"] if param.grad is not None and param.numel()]
    batches: dict[object, Batch] = {}
    for position, param in enumerate(params):
        foreach = group.get("foreach")
        if foreach is None:
            foreach = param.device.type in _get_foreach_kernels_supported_devices()
        mesh = getattr(param, "device_mesh", None)  # DTensors of different meshes cannot share a call
        key = (param.device, param.dtype, mesh) if foreach else position
        batches.setdefault(key, []).append(param)
    yield from batches.values()


def _params(live: Live) -> Iterator[Tensor]:
    return (param for _, batches in live for batch in batches for param in batch)


def _gradient(param: Tensor) -> Tensor:
    return cast(Tensor, param.grad)  # batches hold no parameter without
