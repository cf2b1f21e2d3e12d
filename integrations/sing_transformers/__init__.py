"""SING by name in Hugging Face Trainer: ``TrainingArguments(optim="sing_adamw")``, ``--optim sing_adamw``.

Trainer asks about a name in two places, which are the same in all supported versions: the enum ``OptimizerNames``
refuses what it does not know, and the static method ``Trainer.get_optimizer_cls_and_kwargs`` turns a name into a class
and its arguments. Our names are added to the enum, and the method answers for them before Trainer parses
``optim_args`` in its own way; for every other name it is Trainer's.

``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are honored as Trainer's own
optimizers honor them. All other options are in ``optim_args``: ``"lookahead_k=none,betas=0.9:0.98,freeze=none"``;
``betas`` and ``eps`` there go before Trainer's arguments.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.adapter import Hooks
from sing_plugins.autoload import loaded
from sing_plugins.messages import hint_clipping
from sing_plugins.names import NATIVE, PREFIX, Named, resolve, valid_names
from sing_plugins.options import split_options
from sing_plugins.plan import Plan, builder_class

__all__ = ["is_patched", "patch", "unpatch"]

DEFAULT_LEARNING_RATE = 5e-5  # TrainingArguments.learning_rate, when nothing is asked for

# Trainer's optimizers that cannot be wrapped: they step during backward, switch weights between training and
# evaluation, or come with param groups of their own in which low-rank projections are set up.
_NO_HOST = re.compile(r"lomo|layerwise|schedule_free|galore|apollo")

# What is an argument of Trainer's own, under that name, and so no option in optim_args.
_TRAINER_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}

_hooks = Hooks()
_in_trainers_own: ContextVar[bool] = ContextVar("in_trainers_own", default=False)  # else an override made the groups


def patch() -> None:
    """Add SING's names to the modules of Transformers that are loaded; doing so twice changes nothing."""
    training_args, trainer = loaded("transformers.training_args"), loaded("transformers.trainer")
    if training_args is not None:
        _add_names(training_args.OptimizerNames)
    if trainer is not None:
        _hooks.hook(trainer.Trainer, "get_optimizer_cls_and_kwargs", _get_optimizer_cls_and_kwargs)
        _hooks.hook(trainer.Trainer, "create_optimizer", _create_optimizer)


def unpatch() -> None:
    """Undo :func:`patch`: the enum and Trainer are what they were."""
    training_args = loaded("transformers.training_args")
    if training_args is not None:
        _remove_names(training_args.OptimizerNames)
    _hooks.unhook()


def is_patched() -> bool:
    """Whether SING's names are registered."""
    training_args = loaded("transformers.training_args")
    return training_args is not None and any(map(_is_ours, training_args.OptimizerNames))


def _add_names(names: type[Enum]) -> None:
    for name in valid_names(_hosts(names)):
        if name in names._value2member_map_:
            continue
        member: Any = str.__new__(names, name)  # type: ignore[type-var]
        # An enum's hash is its name's: with the name equal to the value it is the plain string's too.
        member._name_ = member._value_ = name
        member._sort_order_ = len(names._member_names_)
        # Trainer pickles its arguments into each checkpoint; a plain string loads where SING is not installed.
        member.__reduce_ex__ = functools.partial(_reduce_to_string, name)
        names._member_names_.append(name)
        names._member_map_[name] = names._value2member_map_[name] = member


def _remove_names(names: type[Enum]) -> None:
    for member in filter(_is_ours, list(names)):
        names._member_names_.remove(member.name)
        del names._member_map_[member.name], names._value2member_map_[member.value]


def _is_ours(member: Enum) -> bool:
    return "__reduce_ex__" in vars(member)


def _reduce_to_string(name: str, protocol: int) -> tuple[type[str], tuple[str]]:
    return str, (name,)


def _hosts(names: type[Enum]) -> list[str]:
    """Trainer's own optimizers that can be wrapped."""
    return [member.value for member in names if not _is_ours(member) and not _NO_HOST.search(member.value)]


def _create_optimizer(own: Callable[..., Any]) -> Callable[..., Any]:
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _in_trainers_own.set(True)
        try:
            return own(self, *args, **kwargs)
        finally:
            _in_trainers_own.reset(token)

    return create_optimizer


def _get_optimizer_cls_and_kwargs(own: Callable[..., Any]) -> Callable[..., Any]:
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        name = str(getattr(args.optim, "value", args.optim))  # a plain string where the arguments were unpickled
        if name not in valid_names(_hosts(_optimizer_names())):
            result: tuple[Any, dict[str, Any]] = own(args, model)
            return result
        return _class_and_options(name, args, model, own)

    return get_optimizer_cls_and_kwargs


def _class_and_options(
    name: str, args: Any, model: nn.Module | None, own: Callable[..., Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """What Trainer calls with its param groups, and the keyword arguments that it passes on.

    Args:
        name: one of ours.
        args: TrainingArguments.
        model: the model that is trained; None where a tool leaves it out, so that nothing can be frozen.
        own: Trainer's method.

    Raises:
        ValueError: in ``optim_args``: not key=value, an unknown option, a bad value, or an argument of Trainer's own.
    """
    given = split_options(args.optim_args)
    for option, argument in _TRAINER_ARGUMENTS.items():
        if option in given:
            raise ValueError(
                f"Invalid optim_args: {option}={given[option]}. Trainer has an argument for it: {argument}."
            )
    named, options = _host_and_options(name, args, model, own)

    def build(params: ParamsT, **options: Any) -> Optimizer:
        plan = Plan(named, {"weight_decay": args.weight_decay, **options}, model, framework_lr=DEFAULT_LEARNING_RATE)
        is_own = _in_trainers_own.get()
        if is_own and plan.options.get("decay_all"):
            params = [{**group, "weight_decay": args.weight_decay} for group in params]  # type: ignore[dict-item]
        optimizer = plan.optimizer(lambda: params, split=is_own, everything=is_own)
        # Trainer clips at 1 unless told otherwise: no hint about what nobody has asked for.
        if plan.options.get("normalize", True) and args.max_grad_norm != _default_of(args, "max_grad_norm"):
            hint_clipping("max_grad_norm", args.max_grad_norm or 0.0)
        return optimizer

    # What is no class gets the model from Trainer instead of its param groups; and Trainer keeps embeddings in 32 bits
    # where it reads "bitsandbytes" in the class's module.
    kind = builder_class("Sing", build, module=getattr(getattr(named, "factory", None), "__module__", __name__))
    return kind, named.parse({**options, **given})


def _host_and_options(
    name: str, args: Any, model: nn.Module | None, own: Callable[..., Any]
) -> tuple[Named, dict[str, Any]]:
    """What the name means, and the options that follow from Trainer's arguments."""
    host = name.removeprefix(PREFIX)
    if name not in NATIVE and host in _hosts(_optimizer_names()):
        host_args = copy.copy(args)
        host_args.optim, host_args.optim_args = _optimizer_names()(host), None
        factory, options = own(host_args, model)
        return resolve(name, {host: factory}), options
    named = resolve(name)
    options = {"lr": args.learning_rate}
    if "betas" in named.options:
        options["betas"] = (args.adam_beta1, args.adam_beta2)
    if "betas" in named.options or name in NATIVE:  # elsewhere eps is no Adam's, and its scale is another
        options["eps"] = args.adam_epsilon
    return named, options


def _default_of(args: Any, field: str) -> Any:
    return type(args).__dataclass_fields__[field].default


def _optimizer_names() -> Any:
    from transformers.training_args import OptimizerNames

    return OptimizerNames
