"""SING by name in timm: ``create_optimizer_v2(model, opt="sing_adamw")``, ``train.py --opt sing_adamw``.

timm looks up only the part of a name after its last underscore, so that ``sing_adamw`` would silently be AdamW. Hence
every registry is taught to create our names, and timm's own registry lists them, with and without underscore. timm
still reads its arguments and makes the param groups; its ``momentum``, which is always there, goes to the hosts that
have one by default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from timm.optim import _optim_factory as factory  # not its contents, which are others after a reload
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.adapter import Hooks
from sing_plugins.messages import say
from sing_plugins.names import NATIVE, PREFIX, Named, resolve, valid_names
from sing_plugins.options import shown
from sing_plugins.plan import Plan, builder_class

__all__ = ["is_patched", "patch", "unpatch"]

_METHOD = "create_optimizer"
_hooks = Hooks()


def patch() -> None:
    """Teach timm's registries SING's names; doing so twice changes nothing."""
    if is_patched():
        return
    names = valid_names(_hosts(factory.default_registry))
    _hooks.hook(factory.OptimizerRegistry, _METHOD, _create_optimizer)
    _hooks.hook(factory.OptimizerRegistry, "list_optimizers", _list_optimizers)
    for name in names:
        info = _info(factory.default_registry, name)
        for spelling in {name, _compact(name)}:
            factory.default_registry.register(replace(info, name=spelling))


def unpatch() -> None:
    """Undo :func:`patch`: timm's registries are what they were."""
    _hooks.unhook()
    for name in [name for name, info in factory.default_registry._optimizers.items() if _is_ours(info)]:
        del factory.default_registry._optimizers[name]


def is_patched() -> bool:
    """Whether timm's registries know SING's names."""
    return (factory.OptimizerRegistry, _METHOD) in _hooks


def _create_optimizer(own: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(own)

    def create(registry: factory.OptimizerRegistry, model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(registry, model_or_params, opt, *args, **kwargs)
        call.apply_defaults()

        def ask_timm(info: factory.OptimInfo, **changes: Any) -> Any:
            """What timm would make of these arguments for an optimizer of any name."""
            asked = factory.OptimizerRegistry()
            asked.register(replace(info, name="asked"))
            arguments = {**call.arguments, "self": asked, "opt": "asked", **changes}
            question = inspect.BoundArguments(signature, arguments)
            return own(*question.args, **question.kwargs)

        if not isinstance(opt, str):
            return own(registry, model_or_params, opt, *args, **kwargs)
        info = registry._optimizers.get(opt.lower())
        if info is not None and not _is_ours(info) and "_" in opt:  # timm would look for its last part only
            return ask_timm(info)
        named = _find(registry, opt) if is_patched() else None
        if named is None:
            return own(registry, model_or_params, opt, *args, **kwargs)

        echo = factory.OptimInfo("asked", _Echo, has_betas=True, has_momentum=_takes_momentum(named))
        options = ask_timm(echo, model_or_params=()).options  # for a model, timm moves the weight decay into the groups
        momentum = call.arguments["momentum"]
        if "momentum" not in options and repr(momentum) != repr(signature.parameters["momentum"].default):
            say(f"momentum={shown(momentum)} is not used by {named.name}.", once=True)
        if not isinstance(model_or_params, nn.Module):
            return Plan(named, options).optimizer(lambda: model_or_params)
        if not call.arguments["weight_decay_exclude_1d"]:
            options.setdefault("decay_all", True)
        plan = Plan(named, options, model_or_params)
        exclude_1d = not plan.options.get("decay_all", False)
        decay = plan.options.get("weight_decay", 0.0)  # as a number: timm puts it into the groups as it is
        return plan.optimizer(
            lambda: ask_timm(echo, weight_decay=decay, weight_decay_exclude_1d=exclude_1d).params,
            split=call.arguments["param_group_fn"] is None,
        )

    return create


def _list_optimizers(own: Callable[..., Any]) -> Callable[..., Any]:
    def list_optimizers(registry: factory.OptimizerRegistry, filter: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Ours are in the list for whoever asks for sing: programs that go through all of it mean timm's own."""
        found = own(registry, filter, *args, **kwargs)
        if any("sing" in pattern for pattern in ([filter] if isinstance(filter, str) else filter)):
            return found
        entries = registry._optimizers
        return [entry for entry in found if not _is_ours(entries[entry if isinstance(entry, str) else entry[0]])]

    return list_optimizers


class _Echo(Optimizer):
    """What timm builds an optimizer from, in the place of one."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.params, self.options = params, options


def _find(registry: factory.OptimizerRegistry, opt: str) -> Named | None:
    """What a name means, or None if it is not one of ours.

    Raises:
        ValueError: timm's Lookahead on top of ours, or a name that looks like ours but is none.
    """
    name = opt.lower()
    compact = {_compact(ours): ours for ours in valid_names(_hosts(registry))}
    parts = name.split("_")
    if "sing" not in parts and parts[-1] not in compact:
        # Of a name with underscores timm takes the last part, whatever is misspelled before it.
        slips = [part for part in parts[:-1] if get_close_matches(part, ["sing"], cutoff=0.75)]
        return _resolve(registry, name) if slips and name not in registry._optimizers else None
    if parts[0] == "lookahead":
        raise ValueError(
            f"Invalid opt: {opt!r}. SING has Lookahead inside: use {opt[len('lookahead_') :]!r}, with the options "
            "lookahead_k and lookahead_alpha."
        )
    return _resolve(registry, compact.get(name, name))


def _resolve(registry: factory.OptimizerRegistry, name: str) -> Named:
    hosts: dict[str, Any] = dict.fromkeys(_hosts(registry), _Echo)
    host = name.removeprefix(PREFIX)
    if host in hosts and name not in NATIVE:
        hosts[host] = registry.get_optimizer_class(host)  # with the registry's defaults; may import its package
    return resolve(name, hosts)


def _hosts(registry: factory.OptimizerRegistry) -> list[str]:
    """The registry's own optimizers that can be wrapped."""
    return [name for name, info in registry._optimizers.items() if not info.second_order and not _is_ours(info)]


def _info(registry: factory.OptimizerRegistry, name: str) -> factory.OptimInfo:
    def build(params: ParamsT, **options: Any) -> Optimizer:
        """SING, for the parameters of a model that is not known, so that nothing is frozen."""
        return Plan(_resolve(registry, name), options).optimizer(lambda: params)

    # A class, as every entry of a registry has one.
    kind = builder_class("".join(part.capitalize() for part in name.split("_")), build, module=__name__)
    host = registry._optimizers.get(name.removeprefix(PREFIX))
    if host is not None and name not in NATIVE:
        return replace(host, opt_class=kind, description=f"SING in front of {host.description}", defaults=None)
    named = resolve(name)
    return factory.OptimInfo(
        name,
        kind,
        f"SING (stabilized and normalized gradient) with the host {named.host}",
        has_eps="eps" in named.options,
        has_momentum=_takes_momentum(named),
        has_betas="betas" in named.options,
    )


def _takes_momentum(named: Named) -> bool:
    """Whether timm's momentum, 0.9 if nobody asks, is for this optimizer: SING's Adafactor is without by default."""
    return "momentum" in named.options and named.host != "adafactor"


def _compact(name: str) -> str:
    return name.replace("_", "")


def _is_ours(info: factory.OptimInfo) -> bool:
    return getattr(info.opt_class, "__module__", None) == __name__
