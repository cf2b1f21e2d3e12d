"""The optimizer behind fairseq's ``--optimizer sing`` and its options."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import field, make_dataclass
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from fairseq.optim.adam import Adam
from fairseq.optim.adamax import Adamax
from fairseq.optim.nag import NAG
from omegaconf import II, OmegaConf
from torch import nn

from sing_plugins.groups import said
from sing_plugins.names import PREFIX, Native, resolve, valid_names
from sing_plugins.options import DEFAULT_FREEZE, FREEZE, OPTIONS
from sing_plugins.plan import Plan

DEFAULT_LR = 0.25  # fairseq's --lr, when nothing is asked for

# fairseq's optimizers that are neither a class of torch.optim nor a native host. Its Adam decays as AdamW does.
HOSTS: dict[str, Any] = {"adam": Adam, "adamax": Adamax, "nag": NAG}
NAMES = valid_names(HOSTS)
HOST_NAMES = [name.removeprefix(PREFIX) for name in NAMES if name.startswith(PREFIX)]

# The options of all hosts: which of them a host has is the core's to say.
HOST_OPTIONS = sorted({o for name in NAMES for o in resolve(name, HOSTS).options} - {"lr", "weight_decay", "freeze"})
DEFAULT = DEFAULT_FREEZE  # stands for an option that was not given, since None is a value that switches things off

# The plan of the Trainer that is building an optimizer, and its parameters that are trained, in its order.
building: ContextVar[tuple[Plan, list[nn.Parameter]] | None] = ContextVar("building", default=None)


def _field(default: str | float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _about(option: str) -> str:
    return f"{option} of SING or its host" + (f": {OPTIONS[option].words}" if option in OPTIONS else "")


# Any: the command line leaves a string as it is and hydra types it in its own way; the core takes both.
SINGConfig: Any = make_dataclass(
    "SINGConfig",
    [
        ("weight_decay", float, _field(0.0, "weight decay; not of biases and normalization layers")),
        ("lr", list[float], II("optimization.lr")),
        ("sing_host", Any, _field(DEFAULT, f"the optimizer that SING stabilizes: {', '.join(HOST_NAMES)}")),
        ("sing_freeze", Any, _field(DEFAULT_FREEZE, f"normalization layers to freeze: {', '.join(FREEZE)}")),
        *((PREFIX + option, Any, _field(DEFAULT, _about(option))) for option in HOST_OPTIONS),
    ],
    bases=(FairseqDataclass,),
)
SINGConfig.__module__ = __name__


class FairseqSING(FairseqOptimizer):  # type: ignore[misc]
    """SING for fairseq's Trainer.

    Args:
        cfg: ``_name`` (``sing`` or ``sing_<host>``), ``lr``, ``weight_decay``, ``sing_host`` (for ``sing``),
            ``sing_freeze`` (``"layernorm"``, ``"norm"``, ``"none"``) and every option as ``sing_<option>``, a
            string or a Python value; ``"default"`` is the host's own default.
        params: the Trainer's parameters.

    Raises:
        ValueError: an option that the host does not have, a value that is not accepted, or something else than the
            Trainer builds it, such as the optimizer ``composite``.
    """

    supports_flat_params = False

    def __init__(self, cfg: Any, params: Iterable[nn.Parameter]) -> None:
        super().__init__(cfg)
        built = building.get()
        if built is None:
            raise ValueError(
                f"{cfg._name} goes by the layers of the model, which it knows only as the --optimizer of fairseq's "
                "Trainer: not inside composite, nor built by hand (sing_plugins.create_optimizer is for that)."
            )
        self.plan, trainable = built
        # Split also where this run has no decay: one that goes on from it may have.
        groups = self.plan.group([{"params": list(dict.fromkeys(trainable)), "weight_decay": 1.0}])
        self._decayed = [bool(group["weight_decay"]) for group in groups]
        # The parameters come in the Trainer's order, as they are or as copies in float32, which no module owns.
        given = dict(zip(trainable, params, strict=True))
        for group, decayed in zip(groups, self._decayed, strict=True):
            group["params"] = [given[param] for param in group["params"]]
            if decayed:
                del group["weight_decay"]  # for the optimizer's own
        self._optimizer = self.plan.build(groups)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The keyword arguments that the torch optimizer was built with."""
        named, options = self.plan.named, self.plan.options
        return {"host": named.host, **options} if isinstance(named, Native) else options

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Whether parameters in half precision have their state in float32."""
        return isinstance(self.plan.named, Native)

    def state_dict(self) -> dict[str, Any]:
        """The torch optimizer's state, with what has to be the same where it is loaded."""
        return {**self.optimizer.state_dict(), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Load a state; hyper-parameters are the state's, as always in fairseq, but for the overrides.

        Args:
            state_dict: what :meth:`state_dict` returned.
            optimizer_overrides: option to value, with or without the prefix ``sing_``. A weight decay is given to the
                parameters that are decayed.

        Raises:
            ValueError: a state of another host or freeze, or an invalid override. Nothing is changed then.
        """
        saved = {key: state_dict.get(key) for key in self._identity()}
        if saved != self._identity():
            raise ValueError(
                f"The checkpoint's optimizer has {saved}, but this run's has {self._identity()}. Pass what the "
                "checkpoint has, or --reset-optimizer to start with a new optimizer."
            )
        overrides = {name.removeprefix(PREFIX): value for name, value in (optimizer_overrides or {}).items()}
        for name in ("freeze", "decay_all"):
            if name in overrides:
                raise ValueError(
                    f"Invalid --optimizer-overrides: {name}. Pass --reset-optimizer --sing-{name} instead."
                )
        overrides = self.plan.named.parse(overrides)
        options = self.plan.named.options
        for group in state_dict["param_groups"] if overrides else ():
            theirs = {name: group[key] for name in options for key in (name, PREFIX + name) if key in group}
            self.plan.try_options({**self.plan.options, **theirs, **overrides})
        super().load_state_dict(state_dict)
        for group, decayed in zip(self.param_groups, self._decayed, strict=True):
            for name, value in overrides.items():
                if decayed or name != "weight_decay":
                    group[name if name in group else PREFIX + name] = value

    def _identity(self) -> dict[str, str]:
        return {"sing_host": self.plan.named.host, "sing_freeze": said(self.plan.freeze_as)}


def plan_of(cfg: Any, model: nn.Module) -> Plan:
    """The plan for an optimizer's configuration; checks all of it and changes nothing.

    Args:
        cfg: as in :class:`FairseqSING`.
        model: holds the model and the criterion.

    Raises:
        ValueError: a host that does not exist or is not the name's, or as :class:`sing_plugins.plan.Plan`.
    """
    named = resolve(cfg._name, HOSTS)
    host = str(cfg.sing_host).lower()
    if host != DEFAULT:
        if host not in HOST_NAMES or (cfg._name != "sing" and host != named.host):
            accepted = ", ".join(HOST_NAMES) if cfg._name == "sing" else f"{named.host}, as {cfg._name} says"
            raise ValueError(f"Invalid --sing-host: {cfg.sing_host!r}. Accepted: {accepted}.")
        named = resolve(PREFIX + host, HOSTS)
    options = {
        "lr": cfg.lr if isinstance(cfg.lr, (int, float)) else cfg.lr[0],  # a list has one rate for each epoch
        "weight_decay": cfg.weight_decay,
        "freeze": cfg.sing_freeze,
        **{option: value for option in HOST_OPTIONS if (value := getattr(cfg, PREFIX + option)) != DEFAULT},
    }
    options = {name: OmegaConf.to_container(o) if OmegaConf.is_config(o) else o for name, o in options.items()}
    try:
        return Plan(named, options, model, framework_lr=DEFAULT_LR)
    except ValueError as error:
        raise ValueError(f"{error} (fairseq: --sing-<option>, but --lr and --weight-decay)") from error
