"""THE table of optimizer names and options. Every adapter reads it; nothing else knows a name.

A name is ``sing`` or ``sing_<host>``. The four native hosts are :class:`sing_plugins.SING` with the paper's full
recipe; any other host is an ordinary optimizer behind :func:`sing_plugins.wrap`: a class of ``torch.optim``, or one
that the framework at hand knows by name.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.checks import CHECKS, ParamGroup
from sing_plugins.groups import DEFAULT_FREEZE, FREEZE, freeze_parameters, log_groups, param_groups, split_decay
from sing_plugins.hosts import HOSTS
from sing_plugins.messages import hint_learning_rate
from sing_plugins.optimizer import HOST_OPTIONS, SING
from sing_plugins.wrapper import wrap

PREFIX = "sing_"
HostFactory = Callable[..., Optimizer]

# name -> native host. `sing` is the paper's main combination.
NATIVE: dict[str, str] = {"sing": "adamw", **{PREFIX + host: host for host in HOSTS}}


def parse_flag(value: object) -> bool:
    """``"False"`` is False."""
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def parse_pair(value: object) -> tuple[float, float]:
    """``(0.9, 0.98)``, ``[0.9, 0.98]``, or ``0.9:0.98`` where a comma separates options."""
    parts = value.strip("()[] ").replace(":", ",").split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    first, second = parts
    return float(first), float(second)


def parse_whole(value: object) -> int:
    """``"5"`` and ``5``, but not ``5.5``."""
    if isinstance(value, bool):
        raise ValueError
    return int(value) if isinstance(value, (str, int)) else int(str(value))


def parse_real(value: object) -> float:
    """``"1e-3"`` and numbers."""
    if isinstance(value, bool):
        raise ValueError
    return float(value)  # type: ignore[arg-type]


def parse_rate(value: object) -> float | Tensor:
    """A number, or a tensor as it is."""
    return value if isinstance(value, Tensor) else parse_real(value)


def parse_freeze(value: object) -> str:
    if str(value).lower() not in FREEZE:
        raise ValueError
    return str(value).lower()


def parse_literal(value: object) -> Any:
    """A Python literal in a string, its words in any case; other strings and values as they are."""
    words = {"true": "True", "false": "False", "none": "None", "null": "None"}
    try:
        return ast.literal_eval(words.get(value.lower(), value)) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def parse_number(value: object) -> int | float:
    """``"5"`` is a whole number, ``"0.9"`` is not."""
    number = parse_literal(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError
    return number


def optional(parse: Callable[[object], Any]) -> Callable[[object], Any]:
    """``none`` and ``null`` are None."""
    return lambda value: None if value is None or str(value).lower() in ("none", "null") else parse(value)


# option -> parser from a string or a Python value; the accepted range is checks.CHECKS'.
PARSERS: dict[str, Callable[[object], Any]] = {
    "lr": parse_rate,
    "betas": parse_pair,
    "eps": parse_real,
    "weight_decay": parse_real,
    "momentum": parse_real,
    "nesterov": parse_flag,
    "decay_rate": parse_real,
    "clip_threshold": parse_real,
    "softplus_beta": optional(parse_real),
    "decay_all": parse_flag,
    "foreach": optional(parse_flag),
    "maximize": parse_flag,
    "centralize": parse_flag,
    "normalize": parse_flag,
    "norm_eps": parse_real,
    "lookahead_k": optional(parse_whole),
    "lookahead_alpha": parse_real,
    "centralize_rows_of_one": parse_flag,
    "freeze": parse_freeze,
}

_WRAP_OPTIONS = tuple(name for name, p in inspect.signature(wrap).parameters.items() if p.kind is p.KEYWORD_ONLY)
_SING_OPTIONS = tuple(name for name in inspect.signature(SING).parameters if name not in ("params", "host"))


def split_options(text: str | None) -> dict[str, str]:
    """Split ``"softplus_beta=none,lookahead_k=5"`` at the commas that are outside of brackets.

    Raises:
        ValueError: a part without ``=``, or an option that is given twice.
    """
    options: dict[str, str] = {}
    depth, part = 0, ""
    for character in (text or "") + ",":
        depth += (character in "([") - (character in ")]")
        if character != "," or depth > 0:
            part += character
            continue
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if part.strip() and not (key and equals):
            raise ValueError(f"Invalid option string: {text!r}. Expected key=value,key=value, got {part.strip()!r}.")
        if key in options:
            raise ValueError(f"Invalid option string: {text!r} gives {key!r} twice.")
        if key:
            options[key] = value
        part = ""
    return options


@dataclass(frozen=True)
class Named:
    """A resolved optimizer name.

    Attributes:
        name: the name, in lower case.
        host: the host's name.
        factory: builds the host from params and its options; None for a native host.
    """

    name: str
    host: str
    factory: HostFactory | None = None

    def parsers(self) -> dict[str, Callable[[object], Any]]:
        """Every option that is valid for this name, with its parser; ``freeze`` and ``decay_all`` are among them."""
        if self.factory is None:
            foreign = set(HOST_OPTIONS) - set(HOSTS[self.host].defaults)
            valid = [name for name in _SING_OPTIONS if name not in foreign]
            if not HOSTS[self.host].softplus:
                valid.remove("softplus_beta")
            return {name: PARSERS[name] for name in (*valid, "freeze")}
        host_parsers = {
            name: _parser_for(parameter)
            for name, parameter in inspect.signature(self.factory).parameters.items()
            if name != "params" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        return {**host_parsers, **{name: PARSERS[name] for name in (*_WRAP_OPTIONS, "freeze", "decay_all")}}

    def parse(self, options: Mapping[str, object]) -> dict[str, Any]:
        """Type the options, from strings or Python values.

        Raises:
            ValueError: an unknown option or a bad value; lists what is valid.
        """
        parsers = self.parsers()
        typed = {}
        for name, value in options.items():
            if name not in parsers:
                why = ""
                if self.factory is not None and name in _SING_OPTIONS:
                    why = f" {self.name} is {self.host} behind standardization and Lookahead, without {name}."
                raise ValueError(f"Unknown option {name!r} of {self.name}.{why} Valid: {', '.join(sorted(parsers))}.")
            try:
                typed[name] = parsers[name](value)
            except (TypeError, ValueError) as error:
                accepted = ", ".join(FREEZE) if name == "freeze" else CHECKS.get(name, (None, "a value of its type"))[1]
                raise ValueError(f"Invalid {name}: {value!r} for {self.name}. Accepted: {accepted}.") from error
        return typed

    def build(self, params: ParamsT, **options: Any) -> Optimizer:
        """Construct the optimizer from params or param groups.

        Args:
            params: parameters or param groups.
            options: typed options, without ``freeze`` (that is for the model; see :func:`create_optimizer`).
        """
        if self.factory is None:
            return SING(params, host=self.host, **options)
        ours = {name: options.pop(name) for name in _WRAP_OPTIONS if name in options}
        options.pop("decay_all", None)  # a host decays whatever its groups say
        return wrap(self.factory(params, **options), **ours)


def resolve(name: str, hosts: Mapping[str, HostFactory] | None = None) -> Named:
    """Look a name up, whatever its case.

    Args:
        name: ``sing``, ``sing_<native host>``, or ``sing_<host>`` with a host of ``hosts`` or a torch.optim class.
        hosts: the framework's own hosts, by name; they go before torch.optim's.

    Raises:
        ValueError: not a name; lists the valid ones.
    """
    key = name.lower()
    if key in NATIVE:
        return Named(key, NATIVE[key])
    known = {**torch_hosts(), **(hosts or {})}
    host = key.removeprefix(PREFIX)
    if host == key or host not in known:
        raise ValueError(f"Unknown optimizer {name!r}. Valid: {', '.join(valid_names(hosts or ()))}.")
    return Named(key, host, known[host])


def valid_names(hosts: Iterable[str] = ()) -> list[str]:
    """Every name, native ones first.

    Args:
        hosts: names of the framework's own hosts.
    """
    return [*NATIVE, *sorted({PREFIX + host for host in {*torch_hosts(), *hosts}} - set(NATIVE))]


def torch_hosts() -> dict[str, HostFactory]:
    """The classes of torch.optim that can be wrapped, by lower-case name."""
    refused = ("Optimizer", "LBFGS", "SparseAdam")
    found = inspect.getmembers(torch.optim, lambda member: inspect.isclass(member) and issubclass(member, Optimizer))
    return {name.lower(): cls for name, cls in found if name not in refused}


def create_optimizer(
    model: nn.Module,
    name: str = "sing_adamw",
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    freeze: str = DEFAULT_FREEZE,
    no_weight_decay: Collection[str] = (),
    groups: Iterable[ParamGroup] | None = None,
    hosts: Mapping[str, HostFactory] | None = None,
    framework_lr: float | None = None,
    **options: Any,
) -> Optimizer:
    """Freeze, group and build: the whole of an adapter's work, for any training loop.

    Where it raises, the model is as it was. Call it before the model is wrapped or sharded.

    Args:
        model: the model to train; normalization layers are frozen in place according to ``freeze``.
        name: as in :func:`resolve`.
        lr: learning rate; None for the optimizer's default.
        weight_decay: of the parameters that are neither biases nor in a normalization layer.
        freeze: ``"layernorm"`` (default), ``"norm"`` or ``"none"``; see :func:`sing_plugins.param_groups`.
        no_weight_decay: names of further parameters that are not decayed.
        groups: param groups that a framework has made; what got frozen is taken out of them and the decay rules are
            applied to them. None: all trainable parameters.
        hosts: the framework's own hosts.
        framework_lr: the learning rate that the framework takes when none is asked for, so that a hint can name it.
        options: the optimizer's options, as Python values or strings. ``decay_all=True`` lets weight decay reach biases
            and normalization layers too, for every name.

    Raises:
        ValueError: an unknown name or option, a bad value, or as :func:`sing_plugins.param_groups`.
    """
    named = resolve(name, hosts)
    options.update({} if lr is None else {"lr": lr}, freeze=freeze)
    if weight_decay or "weight_decay" in named.parsers():  # a host without decay takes a decay of 0
        options["weight_decay"] = weight_decay
    typed = named.parse(options)
    freeze, decay_all = typed.pop("freeze"), typed.get("decay_all", False)
    named.build([nn.Parameter(torch.zeros(1, 1))], **typed)  # a bad value raises here, before anything is called
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if groups is None:
            groups = param_groups(
                model, typed.get("weight_decay", 0.0), freeze, no_weight_decay=no_weight_decay, decay_all=decay_all
            )
        else:
            groups = list(groups)
            frozen = freeze_parameters(model, freeze)
            left = ({**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups)
            groups = split_decay(model, left, no_weight_decay, decay_all=decay_all)
            log_groups(freeze, frozen, groups)
        optimizer = named.build(groups, **typed)
    except Exception:  # such as a host that does not take every parameter of this model
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    hint_learning_rate(optimizer.defaults, framework_lr)
    return optimizer


def _parser_for(parameter: inspect.Parameter) -> Callable[[object], Any]:
    """A host's own option, typed by its default."""
    if isinstance(parameter.default, bool):
        return parse_flag
    if isinstance(parameter.default, float):
        return parse_rate
    if isinstance(parameter.default, int):  # 0 for a momentum that may well be 0.9
        return parse_number
    if isinstance(parameter.default, tuple) and len(parameter.default) == 2:
        return parse_pair
    return parse_literal
