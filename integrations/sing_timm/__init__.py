"""SING by name in timm: ``create_optimizer_v2(model, opt="sing_adamw")``, ``train.py --opt sing_adamw``.

timm looks up only the part of a name after its last underscore, so that ``sing_adamw`` would silently be AdamW. Hence
every registry is taught to create our names, and timm's own registry lists them, with and without underscore. timm
still reads its arguments and makes the param groups; its ``momentum``, which is always there, goes to the hosts that
have one by default.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from timm.optim import _optim_factory as factory  # not its contents, which are others after a reload
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.checks import ParamGroup
from sing_plugins.messages import hint_learning_rate, say
from sing_plugins.names import NATIVE, PREFIX, Named, create_optimizer, resolve, valid_names

__all__ = ["is_patched", "patch", "unpatch"]

_METHOD = "create_optimizer"
_hooked: dict[type, tuple[Any, Any]] = {}  # OptimizerRegistry -> (our method, its own)


def patch() -> None:
    """Teach timm's registries SING's names; doing so twice changes nothing."""
    if is_patched():
        return
    names = valid_names(_hosts(factory.default_registry))
    own = getattr(factory.OptimizerRegistry, _METHOD)
    _hooked[factory.OptimizerRegistry] = _hook(own), own
    setattr(factory.OptimizerRegistry, _METHOD, _hooked[factory.OptimizerRegistry][0])
    for name in names:
        info = _info(factory.default_registry, name)
        for spelling in {name, _compact(name)}:
            factory.default_registry.register(replace(info, name=spelling))


def unpatch() -> None:
    """Undo :func:`patch`: timm's registries are what they were."""
    for registry, (ours, own) in _hooked.items():
        if getattr(registry, _METHOD) is ours:  # else somebody's hook is on top of ours, which does nothing any more
            setattr(registry, _METHOD, own)
    _hooked.clear()
    for name in [name for name, info in factory.default_registry._optimizers.items() if _is_ours(info)]:
        del factory.default_registry._optimizers[name]


def is_patched() -> bool:
    """Whether timm's registries know SING's names."""
    return factory.OptimizerRegistry in _hooked


def _hook(own: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(own)

    @functools.wraps(own)
    def create(registry: factory.OptimizerRegistry, model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Any:
        named = _find(registry, opt) if is_patched() else None
        if named is None:
            return own(registry, model_or_params, opt, *args, **kwargs)
        call = signature.bind(registry, model_or_params, opt, *args, **kwargs)
        call.apply_defaults()

        def ask_timm(**changes: Any) -> tuple[Any, dict[str, Any]]:
            """What timm would give to an optimizer class: the params or param groups, and the options."""
            asked = factory.OptimizerRegistry()
            as_given: Any = _as_given
            asked.register(factory.OptimInfo("asked", as_given, has_betas=True, has_momentum=_takes_momentum(named)))
            arguments = {**call.arguments, "self": asked, "opt": "asked", **changes}
            question = inspect.BoundArguments(signature, arguments)
            answer: tuple[Any, dict[str, Any]] = own(*question.args, **question.kwargs)
            return answer

        _, options = ask_timm(model_or_params=())  # for a model, timm moves the weight decay into the groups
        momentum = call.arguments["momentum"]
        if "momentum" not in options and momentum != signature.parameters["momentum"].default:
            say(f"momentum={momentum} is not used by {named.name}.", once=True)
        if not isinstance(model_or_params, nn.Module):
            if "freeze" not in options:
                say("got parameters and not a model, so no normalization layer is frozen.", once=True)
            return _build(registry, named.name, model_or_params, **options)
        if not call.arguments["weight_decay_exclude_1d"]:
            options.setdefault("decay_all", True)
        exclude_1d = not named.parse(options).get("decay_all", False)

        def groups() -> Iterator[ParamGroup]:
            params = list(ask_timm(weight_decay_exclude_1d=exclude_1d)[0])
            yield from params if all(isinstance(group, dict) for group in params) else [{"params": params}]

        # The generator runs when all options have been checked: timm's groups can freeze layers, too.
        hosts = {} if named.factory is None else {named.host: named.factory}
        return create_optimizer(model_or_params, named.name, groups=groups(), hosts=hosts, **options)

    return create


def _as_given(params: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    return params, options


def _build(registry: factory.OptimizerRegistry, name: str, params: ParamsT, **options: Any) -> Optimizer:
    """An optimizer without its model.

    Raises:
        ValueError: an unknown option, a bad value, or something to freeze.
    """
    named = _resolve(registry, name)
    if "weight_decay" not in named.parsers() and not options.get("weight_decay"):
        options.pop("weight_decay", None)  # timm always gives one
    typed = named.parse(options)
    freeze = typed.pop("freeze", "none")
    if freeze != "none":
        raise ValueError(
            f"Invalid freeze: {freeze!r} for parameters whose layers are not known. Accepted: none. Pass the model."
        )
    optimizer = named.build(params, **typed)
    hint_learning_rate(optimizer.defaults)
    return optimizer


def _find(registry: factory.OptimizerRegistry, opt: str) -> Named | None:
    """What a name means, or None if it is not one of ours.

    Raises:
        ValueError: timm's Lookahead on top of ours, or a name that looks like ours but is none.
    """
    name = opt.lower()
    compact = {_compact(ours): ours for ours in valid_names(_hosts(registry))}
    parts = name.split("_")
    if "sing" not in parts and parts[-1] not in compact:
        return None
    if parts[0] == "lookahead":
        raise ValueError(
            f"Invalid opt: {opt!r}. SING has Lookahead inside: use {opt[len('lookahead_') :]!r}, with the options "
            "lookahead_k and lookahead_alpha."
        )
    return _resolve(registry, compact.get(name, name))


def _resolve(registry: factory.OptimizerRegistry, name: str) -> Named:
    hosts: dict[str, Any] = dict.fromkeys(_hosts(registry), _as_given)
    host = name.removeprefix(PREFIX)
    if host in hosts and name not in NATIVE:
        hosts[host] = registry.get_optimizer_class(host)  # with the registry's defaults; may import its package
    return resolve(name, hosts)


def _hosts(registry: factory.OptimizerRegistry) -> list[str]:
    """The registry's own optimizers that can be wrapped."""
    return [name for name, info in registry._optimizers.items() if not info.second_order and not _is_ours(info)]


def _info(registry: factory.OptimizerRegistry, name: str) -> factory.OptimInfo:
    build: Any = functools.partial(_build, registry, name)
    host = registry._optimizers.get(name.removeprefix(PREFIX))
    if host is not None and name not in NATIVE:
        return replace(host, opt_class=build, description=f"SING in front of {host.description}", defaults=None)
    named = resolve(name)
    return factory.OptimInfo(
        name,
        build,
        f"SING (stabilized and normalized gradient) with the host {named.host}",
        has_eps="eps" in named.parsers(),
        has_momentum=_takes_momentum(named),
        has_betas="betas" in named.parsers(),
    )


def _takes_momentum(named: Named) -> bool:
    """Whether timm's momentum, 0.9 if nobody asks, is for this optimizer: SING's Adafactor is without by default."""
    return "momentum" in named.parsers() and named.host != "adafactor"


def _compact(name: str) -> str:
    return name.replace("_", "")


def _is_ours(info: factory.OptimInfo) -> bool:
    return isinstance(info.opt_class, functools.partial) and info.opt_class.func is _build
