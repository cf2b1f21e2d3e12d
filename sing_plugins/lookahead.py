"""Lookahead (Zhang et al. 2019) around an optimizer: its slow weights, its phase, and changes from outside.

Slow weights live in the optimizer's state, the phase and the options in its param groups, so that a state dict has all
of them. What is kept here besides is how each step left the weights. Where a step finds them otherwise, somebody else
has changed them (restored a checkpoint, merged an adapter, replaced a tensor), and slow weights from before would pull
them back: they begin anew at what was found.

A change is told by the tensor's version counter, which every operation on it raises, and by its address. That costs no
look at the entries, on any device. Operations on ``tensor.data`` or through NumPy leave no trace in either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sing_plugins.messages import say
from sing_plugins.standardize import in_one_piece

SLOW = "lookahead_params"
PHASE = "lookahead_step"

_Mark = tuple[int, int]


class Lookahead:
    """The Lookahead of one optimizer.

    Args:
        prefix: what the keys of its options in the param groups begin with.
    """

    def __init__(self, prefix: str = "") -> None:
        self._k, self._alpha, self._phase = prefix + "lookahead_k", prefix + "lookahead_alpha", prefix + PHASE
        self._left: dict[Tensor, _Mark | None] = {}
        self._counts: dict[int, Tensor] = {}  # of a param group that is capturable, by its id: its phase

    def trust(self, groups: list[dict[str, Any]]) -> None:
        """Take the weights that the next step finds for those that belong to the state, as after loading it.

        Weights and state are loaded one after the other, in whichever order.
        """
        self._left = {param: None for group in groups for param in group["params"]}

    def drop(self, group: dict[str, Any], state: Mapping[Tensor, Any]) -> None:
        """Forget a group's slow weights and phase: the next step begins a cycle."""
        group[self._phase] = 0
        self._counts.pop(id(group), None)
        for param in group["params"]:
            if param in state:
                state[param].pop(SLOW, None)

    def begin(self, group: dict[str, Any], params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> list[Tensor]:
        """Prepare a step: drop the slow weights of a Lookahead that is off, or that belong to other weights.

        The phase of a group that is ``capturable`` is counted by a tensor on the device of its first parameter.

        Args:
            group: the param group.
            params: those of its parameters that are about to be updated.
            state: the optimizer's.

        Returns:
            The parameters whose slow weights are to begin at the weights that they have now.
        """
        if group[self._k] is None:
            self.drop(group, state)
            return []
        self._place(group)
        starting = self._starting(group, params, state)
        changed = sum(SLOW in state.get(param, ()) for param in starting)
        if changed:
            say(f"the weights of {changed} tensors were changed since the last step. {_GOES_ON}", once=True)
        return starting

    def goes_on(self, group: dict[str, Any], params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """Whether :meth:`begin` would find all that a group needs where it has to be; changes nothing."""
        if group[self._k] is None:
            return True
        return (not group.get("capturable") or id(group) in self._counts) and not self._starting(group, params, state)

    def _starting(self, group: dict[str, Any], params: Iterable[Tensor], state: Mapping[Tensor, Any]) -> list[Tensor]:
        return [
            param
            for param in params
            if SLOW not in state.get(param, ()) or self._left.get(param, _NEVER) not in (None, _mark(param))
        ]

    def is_due(self, group: dict[str, Any]) -> bool | Tensor:
        """Count a step of the group's cycle; whether its slow weights are merged now, which the device may know."""
        period = group[self._k]
        if period is None or id(group) in self._counts:
            return self.count(group, self.phase(group))
        step = group[self._phase] + 1
        group[self._phase] = step if step < period else 0
        return bool(step >= period)

    def phase(self, group: dict[str, Any]) -> int | Tensor:
        """How many steps a group has made since its last merge, as it is counted."""
        phase: int | Tensor = self._counts.get(id(group), group[self._phase])
        return phase

    def settle(self, groups: Iterable[dict[str, Any]]) -> None:
        """Write phases that tensors count into the param groups; waits for their device."""
        for group in groups:
            group[self._phase] = int(self.phase(group))

    def count(self, group: dict[str, Any], phase: int | Tensor) -> bool | Tensor:
        """Count a step with a tensor; whether slow weights are merged now, which the device knows."""
        if group[self._k] is None or not isinstance(phase, Tensor):
            return False
        due: Tensor = phase.add_(1) >= group[self._k]
        phase.masked_fill_(due, 0)
        return due

    def merge(self, group: dict[str, Any], weights: list[Tensor], slow: list[Tensor], due: bool | Tensor) -> None:
        """``slow ← slow + alpha (w - slow)``, then ``w ← slow``, in place, for tensors of one device and dtype.

        Args:
            group: the param group.
            weights: the fast weights.
            slow: the slow ones.
            due: what :meth:`is_due` has said. Where that is a tensor, nobody looks at it.
        """
        if isinstance(due, Tensor) and torch.compiler.is_compiling():  # which makes one kernel of it
            # Numbers as vectors of one: torch 2.7's inductor does not write the slow weight of a number back.
            both = zip(map(torch.atleast_1d, weights), map(torch.atleast_1d, slow), strict=True)
            for weight, other in both:
                merged = other.lerp(weight.to(other.dtype), group[self._alpha])
                other.copy_(torch.where(due, merged, other))
                weight.copy_(torch.where(due, merged, weight))
        elif isinstance(due, Tensor):
            (all_fast, fast), (all_slow, slow_too) = in_one_piece(weights), in_one_piece(slow)
            merged, due = all_slow.lerp(all_fast, group[self._alpha]), due.to(weights[0].device, non_blocking=True)
            torch._foreach_copy_(slow, _chosen(due, merged, all_slow, slow_too))
            torch._foreach_copy_(weights, _chosen(due, merged, all_fast, fast))
        elif due:
            fast = [weight.to(other.dtype) for weight, other in zip(weights, slow, strict=True)]
            torch._foreach_lerp_(slow, fast, group[self._alpha])
            torch._foreach_copy_(weights, slow)

    def _place(self, group: dict[str, Any]) -> None:
        if not group.get("capturable"):
            if id(group) in self._counts:
                group[self._phase] = int(self._counts.pop(id(group)))
        elif group["params"]:
            device, phase = group["params"][0].device, self.phase(group)
            if not isinstance(phase, Tensor):
                phase = torch.tensor(phase, device="cpu")
            if id(group) not in self._counts or phase.device != device:
                self._counts[id(group)] = phase.to(device)

    def end(self, updated: Iterable[tuple[dict[str, Any], Iterable[Tensor]]]) -> None:
        """Note how a step has left the weights.

        Args:
            updated: the param groups, each with the tensors that the step has updated.
        """
        groups = []
        for group, params in updated:
            groups.append(group)
            if group[self._k] is not None:
                self._left.update((param, _mark(param)) for param in params)
        if len(self._left) > sum(len(group["params"]) for group in groups):  # those that have left are not kept alive
            kept = {param for group in groups for param in group["params"]}
            self._left = {param: mark for param, mark in self._left.items() if param in kept}

    def give_up(self, params: Iterable[Tensor]) -> None:
        """Note that a step failed and may have moved weights, which is no change from outside then."""
        self._left.update(dict.fromkeys(params))


_NEVER: _Mark = (-1, -1)  # of a parameter whose state somebody has put there by hand
_GOES_ON = "Lookahead goes on from what they are now, not from its slow weights."


def _chosen(due: Tensor, merged: Tensor, memory: Tensor, parts: list[Tensor]) -> list[Tensor]:
    torch.where(due, merged, memory, out=memory)
    return parts


def _mark(param: Tensor) -> _Mark:
    return param._version, param.data_ptr()  # which is 0 for a DTensor: where its shard lies is its engine's affair
