"""A step of SING, whoever updates the weights: gather, check, standardize, update, merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from sing_plugins.batches import Batch, Live, gradient, params_of
from sing_plugins.checks import ParamGroup, check_gradient
from sing_plugins.kernels import Kernels, implementation_of
from sing_plugins.lookahead import SLOW, Lookahead
from sing_plugins.nonfinite import is_skipped, looks
from sing_plugins.options import AUTO, FOREACH, FUSED, LOOP, OPTIONS
from sing_plugins.sharded import Wanted, local, shards, standardized
from sing_plugins.sharding import WholeTensors
from sing_plugins.standardize import is_dtensor, standardize

# So many entries, or one tensor, are updated by one series of multi-tensor calls, whose temporaries are copies of them.
FOREACH_BLOCK = 1 << 24


class Standardizing(Optimizer):
    """An optimizer that standardizes gradients and is surrounded by Lookahead: SING, and any host that is wrapped.

    A step fails before it has changed anything, or leaves this: gradients are the user's, Lookahead's slow weights are
    those from before the step, and what had been updated stays updated.
    """

    standardizes_gradients = True  # which nobody should do twice
    _prefix: ClassVar[str] = ""  # of our keys in the param groups
    _can_be_traced: ClassVar[bool] = False
    _option_names: ClassVar[tuple[str, ...]] = tuple(OPTIONS)  # those keys that are checked
    _eps: ClassVar[str] = "eps"  # the key of what is added to the norm

    _lookahead: Lookahead
    _whole: WholeTensors
    _kernels: Kernels
    _accepted: dict[int, list[Any]]  # options of each param group when they were checked

    def __getstate__(self) -> dict[str, Any]:
        self._lookahead.settle(self.param_groups)
        return {**super().__getstate__(), "_whole": self._whole}

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's; with Lookahead's slow weights and phase in it."""
        self._lookahead.settle(self.param_groups)
        return super().state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_whole" not in vars(self):
            self._whole = WholeTensors()
            self._whole.declare(self.param_groups)
        self._begin()
        self._lookahead.trust(self.param_groups)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param group; its own hyper-parameters are checked like the constructor's.

        Raises:
            ValueError: as the constructor, before anything is changed.
        """
        if "_whole" not in vars(self):  # the constructor adds its groups so
            self._whole = WholeTensors()
            self._begin()
        self._add_param_group(param_group)
        self._whole.declare(self.param_groups[-1:])

    def _begin(self) -> None:
        """Build what is not in a state dict."""
        self._lookahead, self._kernels, self._accepted = Lookahead(self._prefix), Kernels(), {}

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
            RuntimeError: sparse or complex gradients, flat pieces of tensors, or entries that are not finite, if that
                was asked for. No parameter has been changed then.
            ValueError: an option in a param group that is not accepted; the same.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and self._can_be_traced:
            self._traced_step()
            return loss
        self._check_groups()
        self._whole.check(self.param_groups)
        live = self._with_shards([(group, self._batches(group)) for group in self.param_groups])
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._check_capture(live)  # before anything looks at the device, which would end the capture
        if is_skipped(live, self.param_groups, self._prefix):
            return loss
        lookahead, state = self._lookahead, self.state
        starting = [p for group, batches in live for p in lookahead.begin(group, params_of(batches), state)]
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
                lookahead.give_up(params_of(batches))
            raise
        lookahead.end((group, params_of(batches)) for group, batches in live)
        return loss

    def _traced_step(self) -> None:
        """Make a step under torch.compile, if ``_can_be_traced``."""
        raise NotImplementedError

    def _check_groups(self) -> None:
        """Check options that were changed since the last step, so that a late group's cannot fail after the first's."""
        if torch.compiler.is_compiling():
            return
        for number, group in enumerate(self.param_groups):
            options = [
                id(value) if isinstance(value := group.get(name), Tensor) else value for name in self._option_names
            ]
            if self._accepted.get(number) != options:
                numbers = {name: value for name, value in group.items() if not isinstance(value, Tensor)}
                self._check_group(numbers)  # a tensor on a device is not waited for
                self._accepted[number] = options

    def _check_group(self, group: ParamGroup) -> None:
        """Raise for an option that is not accepted.

        Raises:
            ValueError: as the constructor.
        """
        raise NotImplementedError

    def _add_param_group(self, param_group: ParamGroup) -> None:
        raise NotImplementedError

    def _slow_weight(self, param: Tensor) -> Tensor:
        return param.clone()

    def _lacks_state(self, param: Tensor, group: ParamGroup) -> bool:
        """Whether an update would make some of a parameter's state, or move it to another device."""
        return False  # a host's that is wrapped is the host's affair

    def _step_host(self, live: Live) -> None:
        """Make the step of a host that updates all groups at once."""

    def _check_capture(self, live: Live) -> None:
        """Raise for a step that a graph of the device would repeat wrongly, before anything is changed.

        Raises:
            RuntimeError: says what to do.
        """
        for group, batches in live:
            if looks(group, self._prefix):
                raise RuntimeError(
                    f"Invalid nonfinite: {group[self._prefix + 'nonfinite']!r}, but a step is being captured into a "
                    "graph of the device, which cannot decide. Accepted: 'propagate'."
                )
            if not group.get("capturable", False):
                raise RuntimeError(
                    "Invalid capturable: False, but a step is being captured into a graph of the device, which would "
                    "repeat this step's count, bias correction and phase of Lookahead for ever. Give capturable=True."
                )
            lacks_state = any(self._lacks_state(param, group) for param in params_of(batches))
            if lacks_state or not self._lookahead.goes_on(group, params_of(batches), self.state):
                raise RuntimeError(
                    "A step is being captured into a graph of the device, but some state does not exist yet, and the "
                    "graph would make it anew each time. Make one step with all gradients before, as in torch's notes "
                    "on CUDA graphs."
                )

    def _update(self, batch: Batch, group: ParamGroup, merge: bool | Tensor) -> None:
        """Update tensors where the host updates one batch after the other, then merge their slow weights if due."""
        if merge is not False:
            slow = [local(self.state[param][SLOW]) for param in batch.params]
            self._lookahead.merge(group, list(map(local, batch.params)), slow, merge)

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
        sizes: Counter[object] = Counter()
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None or not param.numel():
                continue
            implementation = implementation_of(param, grad, asked, host)
            key: object = (implementation, param.device)
            if implementation != FUSED:
                check_gradient(param, grad)
                mesh = getattr(param, "device_mesh", None)
                if mesh is not None:  # what tensors of a mesh communicate, they communicate together
                    implementation = FOREACH
                key = position if implementation == LOOP else (param.device, param.dtype, mesh)
                sizes[key] += local(param).numel()
                key = key, sizes[key] // FOREACH_BLOCK
            if key not in batches:
                batches[key] = Batch(implementation, [])
            batches[key].params.append(param)
        return list(batches.values())

    def _with_shards(self, live: Live) -> Live:
        """Add the shards to the batches of sharded tensors, of all groups together: that is the communication."""
        sharded = [(group, batch) for group, batches in live for batch in batches if is_dtensor(batch.params[0])]
        if not sharded:
            return live
        found = iter(shards([self._wanted(batch.params, group) for group, batch in sharded]))
        return [
            (group, [batch._replace(shards=next(found)) if is_dtensor(batch.params[0]) else batch for batch in batches])
            for group, batches in live
        ]

    def _wanted(self, params: list[Tensor], group: ParamGroup) -> Wanted:
        centralize, rows_of_one, normalize = (
            group[self._prefix + name] for name in ("centralize", "centralize_rows_of_one", "normalize")
        )
        return Wanted(params, centralize, rows_of_one, normalize or looks(group, self._prefix))

    def _standardized(self, batch: Batch, group: ParamGroup) -> list[Tensor]:
        """The standardized gradients; of sharded tensors, this rank's parts."""
        if batch.shards is not None:
            return standardized(batch.shards, group[self._prefix + "normalize"], group[self._eps])
        grads = [gradient(param) for param in batch.params]
        if batch.implementation == FUSED:
            kernel = self._kernels[grads[0].device.type]
            return kernel.standardize(grads, group, self._prefix, group[self._eps])
        return self._standardize(grads, group)

    def _standardize(self, grads: list[Tensor], group: ParamGroup) -> list[Tensor]:
        return standardize(
            grads,
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
