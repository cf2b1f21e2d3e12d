"""A step of SING, whoever updates the weights: gather, check, standardize, update, merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from sing_plugins.checks import ParamGroup, check_gradient
from sing_plugins.kernels import Kernels, implementation_of
from sing_plugins.lookahead import SLOW, Lookahead
from sing_plugins.options import AUTO, FOREACH, FUSED, LOOP
from sing_plugins.sharding import WholeTensors
from sing_plugins.standardize import standardize

# So many entries, or one tensor, are updated by one series of multi-tensor calls, whose temporaries are copies of them.
FOREACH_BLOCK = 1 << 24


class Batch(NamedTuple):
    """Tensors that one call updates.

    Attributes:
        implementation: see :mod:`sing_plugins.kernels`.
        params: the parameters, of one device and dtype.
    """

    implementation: str
    params: list[Tensor]


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
    _kernels: Kernels

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_whole": self._whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_whole" not in vars(self):
            self._whole = WholeTensors()
            self._whole.declare(self.param_groups)
        self._lookahead, self._kernels = Lookahead(self._prefix), Kernels()
        self._lookahead.trust(self.param_groups)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group; its own hyper-parameters are checked like the constructor's.

        Raises:
            ValueError: as the constructor, before anything is changed.
        """
        if "_whole" not in vars(self):  # the constructor adds its groups so
            self._whole, self._lookahead, self._kernels = WholeTensors(), Lookahead(self._prefix), Kernels()
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
        live: Live = [(group, self._batches(group)) for group in self.param_groups]
        lookahead, state = self._lookahead, self.state
        starting = [p for group, batches in live for p in lookahead.begin(group, _params(batches), state)]
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._check_capture(live, starting)
        begun = {param: (param._version, self._slow_weight(param)) for param in starting}
        try:
            self._step_host(live)
            for param, (_, weight) in begun.items():  # not before: hosts take an empty state for an unseen parameter
                state[param][SLOW] = weight
            for group, batches in live:
                is_due = lookahead.is_due(group)
                for batch in batches:
                    self._update(batch, group, is_due)
        except BaseException:
            for param, (version, weight) in begun.items():
                if state.get(param) or param._version != version:  # the host has seen it
                    state[param][SLOW] = weight
            for _, batches in live:
                lookahead.give_up(_params(batches))
            raise
        lookahead.end((group, _params(batches)) for group, batches in live)
        return loss

    def _add_param_group(self, param_group: ParamGroup) -> None:
        raise NotImplementedError

    def _slow_weight(self, param: Tensor) -> Tensor:
        return param.clone()

    def _lacks_state(self, param: Tensor) -> bool:
        """Whether an update would make a parameter's state."""
        return False  # a host's that is wrapped is the host's affair

    def _step_host(self, live: Live) -> None:
        """Make the step of a host that updates all groups at once."""

    def _check_capture(self, live: Live, starting: list[Tensor]) -> None:
        """Raise for a step that a graph of the device would repeat wrongly, before anything is changed.

        Raises:
            RuntimeError: says what to do.
        """
        for group, batches in live:
            if not group.get("capturable", False):
                raise RuntimeError(
                    "Invalid capturable: False, but a step is being captured into a graph of the device, which would "
                    "repeat this step's count, bias correction and phase of Lookahead for ever. Give capturable=True."
                )
            if starting or any(map(self._lacks_state, _params(batches))):
                raise RuntimeError(
                    "A step is being captured into a graph of the device, but some state does not exist yet, and the "
                    "graph would make it anew each time. Make one step with all gradients before, as in torch's notes "
                    "on CUDA graphs."
                )

    def _update(self, batch: Batch, group: ParamGroup, merge: bool | Tensor) -> None:
        """Update tensors where the host updates one batch after the other, then merge their slow weights if due."""
        self._lookahead.merge(group, batch.params, self.state, merge)

    def _implementation(self, group: ParamGroup) -> tuple[str, str | None]:
        """The implementation that is wanted for a group, and the host that it would have to know."""
        return AUTO, None

    def _batches(self, group: ParamGroup) -> list[Batch]:
        """The group's parameters that have a gradient with entries, in lists that one call can take.

        Raises:
            RuntimeError: sparse or complex gradients.
        """
        asked, host = self._implementation(group)
        if asked in (AUTO, FUSED) and torch.compiler.is_compiling():  # which cannot look into a kernel
            asked = FOREACH
        batches: dict[object, Batch] = {}
        entries: Counter[object] = Counter()
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None or not param.numel():
                continue
            implementation = implementation_of(param, grad, asked, host)
            key: object = (implementation, param.device)
            if implementation != FUSED:
                check_gradient(grad)
                mesh = getattr(param, "device_mesh", None)  # DTensors of different meshes cannot share a call
                key = position if implementation == LOOP else (param.device, param.dtype, mesh)
                entries[key] += param.numel()
                key = key, entries[key] // FOREACH_BLOCK
            if key not in batches:
                batches[key] = Batch(implementation, [])
            batches[key].params.append(param)
        return list(batches.values())

    def _standardized(self, batch: Batch, group: ParamGroup) -> list[Tensor]:
        grads, eps = [gradient(param) for param in batch.params], group[self._eps]
        if batch.implementation == FUSED:
            return self._kernels[grads[0].device.type].standardize(grads, group, self._prefix, eps)
        return standardize(
            grads,
            centralize=group[self._prefix + "centralize"],
            normalize=group[self._prefix + "normalize"],
            eps=eps,
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


def _params(batches: list[Batch]) -> Iterator[Tensor]:
    return (param for batch in batches for param in batch.params)


def gradient(param: Tensor) -> Tensor:
    return cast(Tensor, param.grad)  # batches hold no parameter without
