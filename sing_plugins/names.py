"""THE table of optimizer names: what a name means, and which options it has. Nothing else knows a name.

A name is ``sing`` or ``sing_<host>``. The four native hosts are :class:`sing_plugins.SING` with the paper's full
recipe; any other host is an ordinary optimizer behind :func:`sing_plugins.wrap`: a class of ``torch.optim``, or one
that the framework at hand knows by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.group_options import HOST_OPTIONS, IDLE_SOFTPLUS, SOFTPLUS_BETA
from sing_plugins.hosts import HOSTS
from sing_plugins.optimizer import SING
from sing_plugins.options import OPTIONS, Option, shown, signature_options
from sing_plugins.wrapper import wrap

PREFIX = "sing_"
HostFactory = Callable[..., Optimizer]

# name -> native host. `sing` is the paper's main combination.
NATIVE: dict[str, str] = {"sing": "adamw", **{PREFIX + host: host for host in HOSTS}}

_WRAP_OPTIONS = tuple(name for name, p in inspect.signature(wrap).parameters.items() if p.kind is p.KEYWORD_ONLY)
_SING_OPTIONS = tuple(name for name in inspect.signature(SING).parameters if name not in ("params", "host"))


@dataclass(frozen=True)
class Named:
    """A resolved optimizer name: see :class:`Native` and :class:`Foreign`.

    Attributes:
        name: the name, in lower case.
        host: the host's name.
    """

    name: str
    host: str

    @property
    def options(self) -> dict[str, Option]:
        """Every option that is valid for this name; ``freeze`` and ``decay_all`` are among them."""
        raise NotImplementedError

    def build(self, params: ParamsT, **options: Any) -> Optimizer:
        """Construct the optimizer from params or param groups.

        Args:
            params: parameters or param groups.
            options: typed options, without ``freeze`` (that is for the model; see :mod:`sing_plugins.plan`).
        """
        raise NotImplementedError

    def wants_more_lr(self, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, softplus damps large tensors, so that the host's own lr would be too low."""
        has_beta = "softplus_beta" in self.options and options.get("softplus_beta", SOFTPLUS_BETA) is not None
        return has_beta and options.get("softplus_relative") is None

    def parse(self, options: Mapping[str, object]) -> dict[str, Any]:
        """Type the options, from strings or Python values.

        Raises:
            ValueError: an unknown option or a bad value; lists what is valid.
        """
        valid = self.options
        for name in options:
            if name not in valid:
                raise ValueError(
                    f"Unknown option {name!r} of {self.name}.{self._why_not(name)} Valid: {', '.join(sorted(valid))}."
                )
        return {name: valid[name].read(value, self.name) for name, value in options.items()}

    def _why_not(self, option: str) -> str:
        return ""


class Native(Named):
    """SING itself, with one of its own hosts; its state is in float32 at least."""

    @property
    def options(self) -> dict[str, Option]:
        host = HOSTS[self.host]
        foreign = {*HOST_OPTIONS, *(() if host.softplus else IDLE_SOFTPLUS)} - set(host.options)
        return {name: OPTIONS[name] for name in (*_SING_OPTIONS, "freeze") if name not in foreign}

    def build(self, params: ParamsT, **options: Any) -> Optimizer:
        return SING(params, host=self.host, **options)


@dataclass(frozen=True)
class Foreign(Named):
    """Any other optimizer behind standardization and Lookahead.

    Attributes:
        factory: builds the host from params and its options.
    """

    factory: HostFactory

    @property
    def options(self) -> dict[str, Option]:
        ours = {name: OPTIONS[name] for name in (*_WRAP_OPTIONS, "freeze", "decay_all")}
        return {**signature_options(self.factory), **ours}

    def build(self, params: ParamsT, **options: Any) -> Optimizer:
        ours = {name: options.pop(name) for name in _WRAP_OPTIONS if name in options}
        options.pop("decay_all", None)  # a host decays whatever its groups say
        return wrap(self.factory(params, **options), **ours)

    def _why_not(self, option: str) -> str:
        known = option in _SING_OPTIONS
        return f" {self.name} is {self.host} behind standardization and Lookahead, without {option}." if known else ""


def resolve(name: str, hosts: Mapping[str, HostFactory] | None = None) -> Native | Foreign:
    """Look a name up, whatever its case.

    Args:
        name: ``sing``, ``sing_<native host>``, or ``sing_<host>`` with a host of ``hosts`` or a torch.optim class.
        hosts: the framework's own hosts, by name in any case; they go before torch.optim's.

    Raises:
        TypeError: ``hosts`` is not a mapping of names to what can be called.
        ValueError: not a name; lists the valid ones.
    """
    hosts = {} if hosts is None else hosts
    if not isinstance(hosts, Mapping) or not all(isinstance(key, str) and callable(hosts[key]) for key in hosts):
        raise TypeError(
            f"Invalid hosts: {shown(hosts)}. Accepted: a dict of names to classes or functions that build an optimizer."
        )
    key = name.lower() if isinstance(name, str) else ""
    if key in NATIVE:
        return Native(key, NATIVE[key])
    known = {**torch_hosts(), **{host.lower(): factory for host, factory in hosts.items()}}
    host = key.removeprefix(PREFIX)
    if host == key or host not in known:
        raise ValueError(f"Unknown optimizer {shown(name)}. Valid: {', '.join(valid_names(known))}.")
    return Foreign(key, host, known[host])


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
