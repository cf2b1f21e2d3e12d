"""Which parameters are frozen and which are decayed: by the type of the module that owns them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from sing_plugins.checks import ParamGroup
from sing_plugins.messages import say

FREEZE = ("layernorm", "norm", "none")
DEFAULT_FREEZE = "layernorm"

# Class names, for the many LayerNorm and RMSNorm classes that are no subclass of torch's.
_LAYER_NORM_CLASS = re.compile(r"layer_?norm|rms_?norm|scale_?norm|layer_?scale", re.IGNORECASE)
_NORM_CLASS = re.compile(r"norm(?!al)", re.IGNORECASE)
_LAYER_NORM_TYPES = tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm") if hasattr(nn, name))
_NORM_TYPES = (*_LAYER_NORM_TYPES, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# LayerScale without a module of its own: ConvNeXt, CaiT and BEiT keep the gain as a bare parameter of the block.
_BARE_LAYER_SCALE = frozenset(
    {"gamma", "gamma_1", "gamma_2", "gamma_1_2", "lambda_1", "lambda_2", "layer_scale_parameter"}
)
_BIAS = re.compile(r"(^|_)bias($|_)", re.IGNORECASE)  # bias, in_proj_bias, bias_hh_l0


def freeze_parameters(model: nn.Module, freeze: str) -> list[str]:
    """Set ``requires_grad=False`` on the parameters of normalization layers (paper, sections 5.3 and 5.4).

    Call it before anything wraps or shards the model.

    Args:
        model: the model whose parameters are frozen in place.
        freeze: ``"layernorm"``: LayerNorm, RMSNorm (in all their spellings) and LayerScale; ``"norm"``: BatchNorm,
            GroupNorm and InstanceNorm too; ``"none"``.

    Returns:
        The names of the parameters that were trainable and are frozen now; tied ones once.

    Raises:
        ValueError: an unknown ``freeze``, nothing would be left to train, or the model is already wrapped in
            DistributedDataParallel, which has fixed its gradients. Nothing is changed then.
    """
    if freeze not in FREEZE:
        raise ValueError(f"Invalid freeze: {freeze!r}. Accepted: {', '.join(FREEZE)}.")
    chosen = {
        name: parameter
        for name, owner, parameter in _owned_parameters(model)
        if parameter.requires_grad and _is_frozen(name, owner, parameter, freeze)
    }
    if chosen and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"Invalid freeze: {freeze!r} for a model that is already wrapped in DistributedDataParallel, which waits "
            "for the gradients of all its parameters. Create the optimizer before wrapping, or pass freeze='none'."
        )
    if chosen and len(chosen) == sum(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Invalid freeze: {freeze!r} would freeze all {len(chosen)} trainable parameters.")
    for parameter in chosen.values():
        parameter.requires_grad_(False)
    return list(chosen)


def exempt_from_decay(model: nn.Module, no_weight_decay: Collection[str] = (), *, decay_all: bool = False) -> list[str]:
    """Names of the trainable parameters that get no weight decay: biases, normalization layers, and the names given.

    Args:
        model: the model.
        no_weight_decay: further parameter names, such as timm's ``model.no_weight_decay()``.
        decay_all: the names given are the only ones.
    """
    return [
        name
        for name, owner, parameter in _owned_parameters(model)
        if parameter.requires_grad
        and (
            name in no_weight_decay
            or (not decay_all and (_BIAS.search(_leaf(name)) or _is_frozen(name, owner, parameter, "norm")))
        )
    ]


def split_decay(
    model: nn.Module, groups: Iterable[ParamGroup], no_weight_decay: Collection[str] = (), *, decay_all: bool = False
) -> list[ParamGroup]:
    """Param groups in which the exempt parameters of a decaying group have a group of their own without decay.

    Args:
        model: the model that the groups' parameters belong to.
        groups: param groups; all but ``params`` and ``weight_decay`` is kept, empty groups are dropped.
        no_weight_decay, decay_all: as in :func:`exempt_from_decay`.
    """
    exempt_names = set(exempt_from_decay(model, no_weight_decay, decay_all=decay_all))
    exempt = {parameter for name, parameter in model.named_parameters() if name in exempt_names}
    split: list[ParamGroup] = []
    for group in groups:
        params = list(group["params"])
        if group.get("weight_decay", 1.0) == 0.0:
            parts: list[tuple[list[nn.Parameter], ParamGroup]] = [(params, {})]
        else:
            parts = [
                ([p for p in params if p not in exempt], {}),
                ([p for p in params if p in exempt], {"weight_decay": 0.0}),
            ]
        split.extend({**group, "params": part, **override} for part, override in parts if part)
    return split


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    freeze: str = DEFAULT_FREEZE,
    *,
    no_weight_decay: Collection[str] = (),
    decay_all: bool = False,
) -> list[ParamGroup]:
    """Freeze the chosen normalization layers, then group what is left by weight decay; logs one line about both.

    Args:
        model: the model; ``requires_grad`` of frozen parameters is set to False in place.
        weight_decay: of the parameters that are neither biases nor in a normalization layer. Default 0.
        freeze: as in :func:`freeze_parameters`. Default ``"layernorm"``, as the paper advises (5.3, 5.4).
        no_weight_decay: names of further parameters that are not decayed.
        decay_all: decay biases and normalization layers too. :class:`sing_plugins.SING` still passes over tensors of
            zero and one dimension unless it has ``decay_all`` as well. Default False.

    Returns:
        Up to two param groups with ``params`` and ``weight_decay``: decayed, not decayed. Every trainable parameter
        is in one of them, tied ones once.

    Raises:
        ValueError: as :func:`freeze_parameters`, or the model has no trainable parameter.
    """
    frozen = freeze_parameters(model, freeze)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("Invalid model: it has no parameter with requires_grad=True.")
    groups = split_decay(
        model, [{"params": trainable, "weight_decay": weight_decay}], no_weight_decay, decay_all=decay_all
    )
    log_groups(freeze, frozen, groups)
    return groups


def log_groups(freeze: str, frozen: Collection[str], groups: Iterable[ParamGroup]) -> None:
    """One line: what was frozen, and how many tensors each decay rate reaches."""
    counts: dict[Any, int] = {}
    for group in groups:
        rate = group.get("weight_decay", 0.0)
        counts[rate] = counts.get(rate, 0) + len(group["params"])
    decays = ", ".join(f"{count} tensors with weight_decay={rate:g}" for rate, count in counts.items())
    # Frozen layers would surprise whoever did not ask for them: that is said at the level that is shown by default.
    say(
        f"freeze={freeze}: {len(frozen)} tensors frozen"
        + (f" ({', '.join(list(frozen)[:2])}{', …' if len(frozen) > 2 else ''})" if frozen else "")
        + f"; trained: {decays}.",
        level=logging.WARNING if frozen else logging.INFO,
    )


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, owning module, parameter) for every parameter, tied ones once under their first name."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, module, parameter


def _is_frozen(name: str, owner: nn.Module, parameter: nn.Parameter, freeze: str) -> bool:
    if freeze == "none":
        return False
    bare = _leaf(name) in _BARE_LAYER_SCALE and _is_gain(parameter)
    if freeze == "layernorm":
        return bare or isinstance(owner, _LAYER_NORM_TYPES) or _named(owner, _LAYER_NORM_CLASS)
    return bare or isinstance(owner, _NORM_TYPES) or _named(owner, _NORM_CLASS)


def _named(owner: nn.Module, pattern: re.Pattern[str]) -> bool:
    # A NormedLinear or a normalized attention has "norm" in its name too, but a matrix in it.
    return bool(pattern.search(type(owner).__name__)) and all(map(_is_gain, owner.parameters(recurse=False)))


def _is_gain(parameter: nn.Parameter) -> bool:
    """One entry a channel, whatever the shape: (C,), (C, 1, 1), or a scalar."""
    return parameter.numel() == max(parameter.shape, default=1)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
