"""Steps whose gradients have entries that are infinite or not a number: what ``nonfinite`` makes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sing_plugins.batches import Batch, Live, gradient
from sing_plugins.checks import ParamGroup
from sing_plugins.messages import say
from sing_plugins.options import PROPAGATE, RAISE

SKIPPED = "skipped_steps"


def looks(group: ParamGroup, prefix: str) -> bool:
    """Whether a param group's gradients are looked at before a step."""
    return bool(group[prefix + "nonfinite"] != PROPAGATE)


def is_skipped(live: Live, groups: list[ParamGroup], prefix: str) -> bool:
    """Whether a step is left out, since an entry of a gradient is not finite; counts it in the param groups then.

    All ranks that share sharded tensors say the same: they look at norms that they have added up together.

    Args:
        live: what the step is about to update.
        groups: the optimizer's param groups.
        prefix: what the keys of our options in them begin with.

    Raises:
        RuntimeError: names a tensor, if its group asks for that.
    """
    watched = [(group, batch) for group, batches in live if looks(group, prefix) for batch in batches]
    if not watched:
        return False
    flags = [_are_finite(batch) for _, batch in watched]
    flat = torch.cat([flag.to(flags[0].device) for flag in flags])
    if flat.all():
        return False
    tensors = [(group, param) for group, batch in watched for param in batch.params]
    bad = [tensor for tensor, finite in zip(tensors, flat.tolist(), strict=True) if not finite]
    group, param = min(bad, key=lambda tensor: tensor[0][prefix + "nonfinite"] != RAISE)
    name = _name(groups, group, param)
    found = f"{len(bad)} gradients have entries that are not finite, that of {name} among them."
    if group[prefix + "nonfinite"] == RAISE:
        raise RuntimeError(
            f"{found} Nothing was changed. With nonfinite='skip' such steps are left out, with 'propagate' the "
            "weights take such entries in."
        )
    if not any(group[prefix + SKIPPED] for group in groups):
        say(f"{found} The step was left out; the param groups' {prefix + SKIPPED!r} counts such steps.")
    for group in groups:
        group[prefix + SKIPPED] += 1
    return True


def _are_finite(batch: Batch) -> Tensor:
    """Of each tensor of a batch, whether all entries of its gradient are finite."""
    if batch.shards is not None:
        lengths = [shard.norm for shard in batch.shards if shard.norm is not None]
    else:
        lengths = list(torch._foreach_norm([gradient(param) for param in batch.params], math.inf))
    return torch.stack(lengths).isfinite()


def _name(groups: list[ParamGroup], group: ParamGroup, param: Tensor) -> str:
    position = next(at for at, own in enumerate(group["params"]) if own is param)
    if "param_names" in group:
        return str(group["param_names"][position])
    number = next(at for at, own in enumerate(groups) if own is group)
    return f"parameter {position} of param group {number}, of shape {tuple(param.shape)},"
