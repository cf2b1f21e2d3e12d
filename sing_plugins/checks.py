"""What is refused, and with which words: hyper-parameters, gradients, and parameters that are pieces of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sing_plugins.standardize import is_dtensor

ParamGroup = dict[str, Any]

# With torch 2.9 sharded norms are off and Adafactor's factored moments become NaN without an error; 2.10 to 2.13 were
# not tested.
DTENSOR_SINCE = (2, 14)


def _real(low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (low < value if open_low else low <= value) and value < high

    return accepts


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_real(0.0, 1.0), value))


def _learning_rate(value: Any) -> bool:
    return value.dim() == 0 and bool(value >= 0) if isinstance(value, Tensor) else _real()(value)


def _fraction(value: Any) -> bool:
    return _real(0.0, 1.0, open_low=True)(value) or (value == 1 and not isinstance(value, bool))


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# hyper-parameter: (the values that are accepted, the same in words)
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_learning_rate, "a finite number >= 0 or a 0-d tensor (Tensor lr must be 1-element)"),
    "betas": (_pair, "two numbers in [0, 1)"),
    "eps": (_real(open_low=True), "a finite number > 0"),
    "norm_eps": (_real(open_low=True), "a finite number > 0"),
    "weight_decay": (_real(), "a finite number >= 0"),
    "momentum": (_real(0.0, 1.0), "a number in [0, 1)"),
    "nesterov": (_flag, "True or False"),
    "decay_rate": (_real(open_low=True), "a finite number > 0"),
    "clip_threshold": (_real(open_low=True), "a finite number > 0"),
    "softplus_beta": (_or_none(_real(open_low=True)), "a finite number > 0, or None to switch softplus off"),
    "centralize": (_flag, "True or False"),
    "normalize": (_flag, "True or False"),
    "centralize_rows_of_one": (_flag, "True or False"),
    "decay_all": (_flag, "True or False"),
    "lookahead_k": (_or_none(_count), "a whole number of steps >= 1, or None to switch Lookahead off"),
    "lookahead_alpha": (_fraction, "a number in (0, 1]"),
    "maximize": (_flag, "True or False"),
    "foreach": (_or_none(_flag), "True, False or None (choose the faster)"),
}


def check_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise for the first hyper-parameter with a value that is not accepted; names without a check pass.

    Raises:
        ValueError: names the argument, its value and what is accepted.
    """
    for name, (accepts, words) in CHECKS.items():
        if prefix + name in options and not accepts(options[prefix + name]):
            value = options[prefix + name]
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else value
            raise ValueError(f"Invalid {name}: {shown!r}. Accepted: {words}.")


def check_gradient(grad: Tensor) -> None:
    """Raise for a gradient that cannot be standardized.

    Raises:
        RuntimeError: sparse or complex gradient.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"SING does not support sparse gradients (layout {grad.layout}): the mean and the norm are those of the "
            "dense tensor. Use sparse=False in the embedding, or give that parameter an optimizer of its own."
        )
    if grad.is_complex():
        raise RuntimeError(
            f"SING does not support complex gradients (dtype {grad.dtype}). "
            "Hold the parameter as torch.view_as_real of it."
        )


def check_saved_by(saved: str | None, host: str) -> None:
    """Raise for a state dict that another optimizer has saved.

    Args:
        saved: the host in the state dict, None if it is not one of SING's.
        host: the host of the optimizer that loads it.

    Raises:
        ValueError: they differ.
    """
    if saved != host:
        whose = f"SING with the host {saved!r}" if saved else "an optimizer without SING"
        raise ValueError(
            f"Invalid state_dict: it was saved by {whose}, but this is SING with the host {host!r}. Load it into what "
            "has saved it, or start with a new optimizer state: moments of other gradients would mislead this one."
        )


class WholeTensors:
    """Guards an optimizer against parameters that are flat pieces of tensors: their norm would silently be wrong.

    FSDP1 and ZeRO-3 mark the pieces. ZeRO-1 and ZeRO-2 only put a flat partition in the place of a group's
    parameters, so the shapes that were declared are kept and compared once, before the next step.
    """

    _declared: list[list[torch.Size]]
    _checked: bool

    def declare(self, groups: Iterable[ParamGroup]) -> None:
        self._declared = [[param.shape for param in group["params"]] for group in groups]
        self._checked = False

    def check_whole(self, groups: list[ParamGroup]) -> None:
        """Raise if a parameter is not the whole tensor that it was, is a piece of it, or is sharded by an old torch.

        Raises:
            RuntimeError: says which sharding was found and what works instead.
        """
        if self._checked:
            return
        params = [param for group in groups for param in group["params"]]
        flattened = [param for param in params if getattr(param, "_fsdp_flattened", False)]
        if any(getattr(param, "_is_flat_param", False) for param in params) or (
            flattened and all(param.dim() < 2 for param in flattened)  # NO_SHARD has the mark but whole shapes
        ):
            raise RuntimeError(_SHARDED.format("FullyShardedDataParallel (FSDP1)"))
        if any(hasattr(param, "ds_id") for param in params):
            raise RuntimeError(_SHARDED.format("DeepSpeed ZeRO-3"))
        if any(map(is_dtensor, params)) and _torch_release() < DTENSOR_SINCE:
            raise RuntimeError(
                f"SING is right on sharded tensors (DTensor) with torch {'.'.join(map(str, DTENSOR_SINCE))} and later, "
                f"but torch {torch.__version__} is installed, whose arithmetic on them is wrong or was not tested. "
                "Update torch, or use DDP or ZeroRedundancyOptimizer."
            )
        shapes = [[param.shape for param in group["params"]] for group in groups]
        if shapes != self._declared:
            raise RuntimeError(
                _SHARDED.format("something that replaced the optimizer's parameters (DeepSpeed ZeRO-1/2 does)")
                + " To add parameters, use add_param_group."
            )
        self._checked = True


def _torch_release() -> tuple[int, ...]:
    return tuple(int(number) for number in torch.__version__.split(".")[:2])


_SHARDED = (
    "SING needs whole tensors: it divides each tensor's gradient by the norm of that tensor, but the parameters here "
    "are flat pieces made by {}. Training on would silently be wrong. Use DDP, FSDP2 (fully_shard; in Accelerate and "
    "Trainer fsdp_version 2), ZeroRedundancyOptimizer, or FSDP1 with NO_SHARD and use_orig_params=True."
)


def check_wrappable(optimizer: object) -> None:
    """Raise for an optimizer that cannot be put behind standardization.

    Raises:
        TypeError: not an optimizer, or its step cannot be wrapped; says why.
    """
    kind = type(optimizer)
    name = kind.__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"wrap() takes a torch.optim.Optimizer instance, got {name}.")
    for reason, applies in _UNWRAPPABLE.items():
        if applies(optimizer):
            raise TypeError(f"{name} cannot be wrapped: {reason}.")


def _requires_closure(optimizer: Optimizer) -> bool:
    import inspect

    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


_UNWRAPPABLE: dict[str, Callable[[Optimizer], bool]] = {
    "it already standardizes gradients": lambda o: isinstance(o, WholeTensors),
    "its step calls the closure by itself, so it would see gradients that are not standardized": _requires_closure,
    "it wants sparse gradients": lambda o: isinstance(o, torch.optim.SparseAdam),
    "it takes the gradient during backward": lambda o: hasattr(o, "fused_backward") or hasattr(o, "optimizer_dict"),
    "it needs second-order gradients": lambda o: getattr(o, "is_second_order", False) or hasattr(o, "set_hessian"),
    "it switches the weights with train() and eval(), which Lookahead would not follow": (
        lambda o: callable(getattr(o, "train", None)) and callable(getattr(o, "eval", None))
    ),
    "it is itself a wrapper; wrap the optimizer inside it, then apply that wrapper": (
        lambda o: type(o).__name__ in ("AcceleratedOptimizer", "Lookahead", "SAM")
    ),
}
