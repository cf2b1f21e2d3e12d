"""The options of SING's param groups: the host's own, what is refused, and what a file of the paper's calls them."""

from __future__ import annotations

from sing_plugins.checks import ParamGroup
from sing_plugins.hosts import HOSTS
from sing_plugins.options import AUTO, FOREACH, LOOP, OPTIONS, check_options, shown

# The options that only some hosts have; None in the constructor stands for the host's own default.
HOST_OPTIONS = sorted({option for host in HOSTS.values() for option in host.options})

SOFTPLUS_BETA = 50.0  # the paper's

# Values that ask for no softplus, or for the one that nobody has to ask for.
IDLE_SOFTPLUS: dict[str, tuple[float | None, ...]] = {
    "softplus_beta": (None, SOFTPLUS_BETA),
    "softplus_relative": (None,),
}

# Param group keys of the optimizer file published with the paper -> ours.
PAPER_KEYS = {"grad_central": "centralize", "grad_norm": "normalize", "la_alpha": "lookahead_alpha"}


def host_options(host: object, given: ParamGroup) -> ParamGroup:
    """The host's own hyper-parameters: its defaults, overridden by what was given.

    Raises:
        ValueError: there is no such host, or it has no such option, or the option not such a value.
    """
    if not isinstance(host, str) or host not in HOSTS:
        raise ValueError(
            f"Invalid host: {shown(host)}. Accepted: {', '.join(HOSTS)}; for any other use sing_plugins.wrap."
        )
    for name in given:
        if name not in HOSTS[host].options:
            having = ", ".join(other for other in HOSTS if name in HOSTS[other].options)
            raise ValueError(
                f"Invalid {name}: {shown(given[name])}. The host {host!r} has no {name} ({having} have it)."
            )
        OPTIONS[name].check(given[name])
    given = {name: value for name, value in given.items() if value or name not in HOSTS[host].without_default}
    return {**HOSTS[host].defaults, **given}


def check_group(group: ParamGroup, host: str) -> None:
    """Raise for options of a group that are no options, or that do not go together.

    Raises:
        ValueError: names the option.
    """
    if group["host"] != host:
        raise ValueError(f"Invalid host: {group['host']!r} in a param group. Accepted: {host!r}, as in all groups.")
    check_options(group)
    if group["foreach"] is not None and group["implementation"] not in (AUTO, FOREACH if group["foreach"] else LOOP):
        raise ValueError(
            f"Invalid foreach: {group['foreach']!r} with the implementation {group['implementation']!r}. Give one of "
            "the two."
        )
    if group.get("nesterov") and not group["momentum"]:
        raise ValueError("Invalid nesterov: True with momentum 0. Give a momentum > 0 or leave nesterov out.")
    for name, idle in IDLE_SOFTPLUS.items():
        if not HOSTS[host].softplus and group[name] not in idle:
            raise ValueError(
                f"Invalid {name}: {group[name]!r}. The host {host!r} has no denominator for softplus; leave it out."
            )
    if group["softplus_relative"] is not None:
        for name, wanted in {"softplus_beta": SOFTPLUS_BETA, "normalize": True}.items():
            if group[name] != wanted:
                raise ValueError(
                    f"Invalid {name}: {group[name]!r} with softplus_relative={group['softplus_relative']!r}, which "
                    "takes the place of softplus_beta and counts on gradients of norm 1. Give one of the two."
                )


def adopt_paper_group(group: ParamGroup) -> None:
    """Turn a param group of the optimizer file published with the paper into one of ours."""
    if "grad_central" not in group:
        return
    for theirs, ours in PAPER_KEYS.items():
        group[ours] = group.pop(theirs)
    beta = float(group.pop("beta_softplus"))
    group["softplus_beta"] = beta if group.pop("softplus") else None
    group["softplus_relative"] = None
    period = group.pop("la_mergetime")
    group["lookahead_k"] = period if group.pop("lookahead_active") else None
    group["lookahead_step"] = group.pop("la_step", 0)
    group["centralize_rows_of_one"] = True
    group["decay_all"] = False
    group["host"] = "adamw"
