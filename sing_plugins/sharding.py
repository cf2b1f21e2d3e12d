"""Whole tensors or none: what a sharded model may hand to an optimizer that divides by each tensor's norm."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

Shapes = list[list[torch.Size]]  # of the parameters of each group

_SHARDED = (
    "SING needs whole tensors: it divides each tensor's gradient by the norm of that tensor, but the parameters here "
    "are flat pieces made by {}. Training on would silently be wrong. Use DDP, FSDP2 (fully_shard; in Accelerate and "
    "Trainer fsdp_version 2), ZeroRedundancyOptimizer, DeepSpeed's ZeRO stage 0, or FSDP1 with NO_SHARD and "
    "use_orig_params=True."
)


class WholeTensors:
    """Guards an optimizer against parameters that are flat pieces of tensors: their norm would silently be wrong.

    FSDP1 and ZeRO-3 mark the pieces. ZeRO-1 and ZeRO-2 only put a flat partition in the place of a group's
    parameters, so the shapes that the optimizer was given are kept and compared. Whoever flattens may come after the
    first steps; but then, a user may also have appended rows, or taken a parameter out.
    """

    def __init__(self) -> None:
        self._shapes: Shapes = []
        self._trained: Shapes = []  # without what was frozen, which DeepSpeed's copies in float32 leave out
        self._checked: Shapes | None = None

    def declare(self, groups: Iterable[dict[str, Any]]) -> None:
        """Take the shapes of param groups that the optimizer was given in addition to those declared before."""
        for group in groups:
            self._shapes.append([param.shape for param in group["params"]])
            self._trained.append([param.shape for param in group["params"] if param.requires_grad])
        self._checked = None

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Raise if a parameter is not the whole tensor that it was, or is a piece of it.

        Args:
            groups: all param groups of the optimizer.

        Raises:
            RuntimeError: says which sharding was found and what works instead.
        """
        shapes = [[param.shape for param in group["params"]] for group in groups]
        if shapes == self._checked:
            return
        params = [param for group in groups for param in group["params"]]
        flattened = [param for param in params if getattr(param, "_fsdp_flattened", False)]
        if any(getattr(param, "_is_flat_param", False) for param in params) or (
            flattened and all(param.dim() < 2 for param in flattened)  # NO_SHARD has the mark but whole shapes
        ):
            raise RuntimeError(_SHARDED.format("FullyShardedDataParallel (FSDP1)"))
        if any(hasattr(param, "ds_id") for param in params):
            raise RuntimeError(_SHARDED.format("DeepSpeed ZeRO-3"))
        if self._checked is None:
            are_flat = all(_are_others(given, shapes) for given in (self._shapes, self._trained))
        else:
            are_flat = _are_flattened(self._checked, shapes)
        if are_flat:
            raise RuntimeError(
                _SHARDED.format("something that replaced the optimizer's parameters (DeepSpeed ZeRO-1/2 does)")
                + " To add parameters, use add_param_group."
            )
        self._shapes, self._trained, self._checked = list(shapes), list(shapes), shapes


def _are_others(given: Shapes, found: Shapes) -> bool:
    return list(filter(None, given)) != list(filter(None, found))  # DeepSpeed drops empty groups


def _are_flattened(before: Shapes, after: Shapes) -> bool:
    """Whether fewer tensors than before, or of fewer dimensions, have a new one of one dimension among them."""
    if len(before) != len(after):
        before, after = [list(chain(*before))], [list(chain(*after))]
    for old, new in zip(before, after, strict=True):
        is_new = any(len(shape) < 2 and shape not in old for shape in new)
        if is_new and (len(new) < len(old) or _matrices(new) < _matrices(old)):
            return True
    return False


def _matrices(shapes: list[torch.Size]) -> int:
    return sum(len(shape) > 1 for shape in shapes)
