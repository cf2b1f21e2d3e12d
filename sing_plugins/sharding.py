"""Whole tensors or none: what a sharded model may hand to an optimizer that divides by each tensor's norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

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
    first steps.
    """

    def __init__(self) -> None:
        self._shapes: list[list[torch.Size]] = []
        self._checked: list[torch.Size] | None = None

    def declare(self, groups: Iterable[dict[str, Any]]) -> None:
        """Take the shapes of param groups that the optimizer was given in addition to those declared before."""
        self._shapes += [[param.shape for param in group["params"]] for group in groups]
        self._checked = None

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Raise if a parameter is not the whole tensor that it was, or is a piece of it.

        Args:
            groups: all param groups of the optimizer.

        Raises:
            RuntimeError: says which sharding was found and what works instead.
        """
        params = [param for group in groups for param in group["params"]]
        shapes = [param.shape for param in params]
        if shapes == self._checked:
            return
        flattened = [param for param in params if getattr(param, "_fsdp_flattened", False)]
        if any(getattr(param, "_is_flat_param", False) for param in params) or (
            flattened and all(param.dim() < 2 for param in flattened)  # NO_SHARD has the mark but whole shapes
        ):
            raise RuntimeError(_SHARDED.format("FullyShardedDataParallel (FSDP1)"))
        if any(hasattr(param, "ds_id") for param in params):
            raise RuntimeError(_SHARDED.format("DeepSpeed ZeRO-3"))
        given = [group for group in self._shapes if group]  # DeepSpeed drops empty groups
        if [[param.shape for param in group["params"]] for group in groups if group["params"]] != given:
            raise RuntimeError(
                _SHARDED.format("something that replaced the optimizer's parameters (DeepSpeed ZeRO-1/2 does)")
                + " To add parameters, use add_param_group."
            )
        self._checked = shapes
