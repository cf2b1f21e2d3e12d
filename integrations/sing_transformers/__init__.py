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
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sing_plugins.autoload import loaded
from sing_plugins.messages import hint_clipping
from sing_plugins.names import NATIVE, PREFIX, HostFactory, create_optimizer, resolve, split_options, valid_names

__all__ = ["is_patched", "patch", "unpatch"]

DEFAULT_LEARNING_RATE = 5e-5  # TrainingArguments.learning_rate, when nothing is asked for
_METHOD = "get_optimizer_cls_and_kwargs"

# Trainer's optimizers that cannot be wrapped: they step during backward, switch weights between training and
# evaluation, or come with param groups of their own in which low-rank projections are set up.
_NO_HOST = re.compile(r"lomo|layerwise|schedule_free|galore|apollo")

# What is an argument of Trainer's own, under that name, and so no option in optim_args.
_TRAINER_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}

_hooked: dict[type, tuple[Any, Any]] = {}  # Trainer -> (our static method, its own)


def patch() -> None:
    """Add SING's names to the modules of Transformers that are loaded; doing so twice changes nothing."""
    training_args, trainer = loaded("transformers.training_args"), loaded("transformers.trainer")
    if training_args is not None:
        _add_names(training_args.OptimizerNames)
    if trainer is not None and trainer.Trainer not in _hooked:
        _hook(trainer.Trainer)


def unpatch() -> None:
    """Undo :func:`patch`: the enum and Trainer are what they were."""
    training_args = loaded("transformers.training_args")
    if training_args is not None:
        _remove_names(training_args.OptimizerNames)
    for trainer, (ours, own) in _hooked.items():
        if vars(trainer)[_METHOD] is ours:  # else somebody's hook is on top of ours, and ours has no name left
            setattr(trainer, _METHOD, own)
    _hooked.clear()


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


def _hook(trainer: type) -> None:
    own = vars(trainer)[_METHOD]

    @functools.wraps(own.__func__)
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        name = str(getattr(args.optim, "value", args.optim))  # a plain string where the arguments were unpickled
        if name not in valid_names(_hosts(_optimizer_names())):
            result: tuple[Any, dict[str, Any]] = own.__func__(args, model)
            return result
        if model is None:
            raise ValueError(f"Invalid model: None. {name} goes by the model's layers: {_METHOD}(args, model).")
        return _class_and_options(name, args, model, own.__func__)

    ours = staticmethod(get_optimizer_cls_and_kwargs)
    _hooked[trainer] = ours, own
    setattr(trainer, _METHOD, ours)


def _class_and_options(
    name: str, args: Any, model: nn.Module, own: Callable[..., Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """What Trainer calls with its param groups, and the keyword arguments that it passes on.

    Args:
        name: one of ours.
        args: TrainingArguments.
        model: the model that is trained.
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
    hosts, options = _host_and_options(name, args, model, own)

    class Sing(Optimizer):
        """Builds SING. It is a class, because what is none gets the model from Trainer instead of its param groups."""

        def __new__(cls, params: Iterable[Any], **options: Any) -> Optimizer:  # type: ignore[misc]
            options = {"weight_decay": args.weight_decay, **options}
            groups = list(params)
            if groups and not isinstance(groups[0], dict):  # model.parameters(), from an override of create_optimizer
                groups = [{"params": groups}]
            if options.get("decay_all"):
                groups = [
                    {**group, "weight_decay": group.get("weight_decay") or options["weight_decay"]} for group in groups
                ]
            optimizer = create_optimizer(
                model, name, groups=groups, hosts=hosts, framework_lr=DEFAULT_LEARNING_RATE, **options
            )
            if options.get("normalize", True):
                hint_clipping("max_grad_norm", args.max_grad_norm)
            return optimizer

    for host in hosts.values():  # Trainer keeps embeddings in 32 bits where it reads "bitsandbytes" in the class's name
        Sing.__module__ = host.__module__
    return Sing, resolve(name, hosts).parse({**options, **given})


def _host_and_options(
    name: str, args: Any, model: nn.Module, own: Callable[..., Any]
) -> tuple[dict[str, HostFactory], dict[str, Any]]:
    """The host where it is one of Trainer's, and the options that follow from Trainer's arguments."""
    host = name.removeprefix(PREFIX)
    if name not in NATIVE and host in _hosts(_optimizer_names()):
        host_args = copy.copy(args)
        host_args.optim, host_args.optim_args = _optimizer_names()(host), None
        factory, options = own(host_args, model)
        return {host: factory}, options
    options = {"lr": args.learning_rate}
    parsers = resolve(name).parsers()
    if "betas" in parsers:
        options["betas"] = (args.adam_beta1, args.adam_beta2)
    if "betas" in parsers or name in NATIVE:  # elsewhere eps is no Adam's, and its scale is another
        options["eps"] = args.adam_epsilon
    return {}, options


def _optimizer_names() -> Any:
    from transformers.training_args import OptimizerNames

    return OptimizerNames
