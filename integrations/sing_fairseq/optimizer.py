"""The optimizer behind fairseq's ``--optimizer sing`` and its options."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import field, make_dataclass
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from fairseq.optim.adam import Adam
from fairseq.optim.adamax import Adamax
from fairseq.optim.nag import NAG
from omegaconf import II, OmegaConf
from torch import nn

from sing_plugins.checks import CHECKS, ParamGroup
from sing_plugins.groups import DEFAULT_FREEZE, FREEZE, split_decay
from sing_plugins.names import PREFIX, Named, resolve, valid_names

# fairseq's optimizers that are neither a class of torch.optim nor a native host. Its Adam decays as AdamW does.
HOSTS: dict[str, Any] = {"adam": Adam, "adamax": Adamax, "nag": NAG}
NAMES = valid_names(HOSTS)
HOST_NAMES = [name.removeprefix(PREFIX) for name in NAMES if name.startswith(PREFIX)]

# The options of all hosts: which of them a host has is the core's to say.
OPTIONS = sorted(
    {option for name in NAMES for option in resolve(name, HOSTS).parsers()} - {"lr", "weight_decay", "freeze"}
)
DEFAULT = "default"  # stands for an option that was not given, since None is a value that switches things off

# The model and criterion for which the Trainer is building an optimizer.
trained: ContextVar[nn.Module | None] = ContextVar("trained", default=None)


def _field(default: str | float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _about(option: str) -> str:
    return f"{option} of SING or its host" + (f": {CHECKS[option][1]}" if option in CHECKS else "")


# Any: the command line leaves a string as it is and hydra types it in its own way; the core takes both.
SINGConfig: Any = make_dataclass(
    "SINGConfig",
    [
        ("weight_decay", float, _field(0.0, "weight decay; not of biases and normalization layers")),
        ("lr", list[float], II("optimization.lr")),
        ("sing_host", Any, _field(DEFAULT, f"the optimizer that SING stabilizes: {', '.join(HOST_NAMES)}")),
        ("sing_freeze", Any, _field(DEFAULT_FREEZE, f"normalization layers to freeze: {', '.join(FREEZE)}")),
        *((PREFIX + option, Any, _field(DEFAULT, _about(option))) for option in OPTIONS),
    ],
    bases=(FairseqDataclass,),
)
SINGConfig.__module__ = __name__


class FairseqSING(FairseqOptimizer):  # type: ignore[misc]
    """SING for fairseq's Trainer.

    Args:
        cfg: ``_name`` (``sing`` or ``sing_<host>``), ``lr``, ``weight_decay``, ``sing_host`` (for ``sing``),
            ``sing_freeze`` (``"layernorm"``, ``"norm"`` or ``"none"``) and every option as ``sing_<option>``, a
            string or a Python value; ``"default"`` is the host's own default.
        params: the Trainer's parameters.

    Raises:
        ValueError: an option that the host does not have, a value that is not accepted, or something else than the
            Trainer builds it, such as the optimizer ``composite``.
    """

    supports_flat_params = False

    def __init__(self, cfg: Any, params: Iterable[nn.Parameter]) -> None:
        super().__init__(cfg)
        model = trained.get()
        if model is None:
            raise ValueError(
                f"{cfg._name} goes by the layers of the model, which it knows only as the --optimizer of fairseq's "
                "Trainer: not inside composite, nor built by hand (sing_plugins.create_optimizer is for that)."
            )
        self.named, self.freeze, self.options = parse(cfg)
        groups = decay_groups(model, self.options)
        self._decayed = ["weight_decay" not in group for group in groups]
        # The parameters come in the Trainer's order, as they are or as copies in float32, which no module owns.
        given = dict(zip(_trainable(model), params, strict=True))
        for group in groups:
            group["params"] = [given[param] for param in group["params"]]
        self._optimizer = self.named.build(groups, **self.options)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The keyword arguments that the torch optimizer was built with."""
        return self.options if self.named.factory else {"host": self.named.host, **self.options}

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Whether parameters in half precision have their state in float32."""
        return self.named.factory is None

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
        overrides = self.named.parse(overrides)
        _try(self.named, {**self.options, **overrides})
        super().load_state_dict(state_dict)
        for group, decayed in zip(self.param_groups, self._decayed, strict=True):
            for name, value in overrides.items():
                if decayed or name != "weight_decay":
                    group[name if name in group else PREFIX + name] = value

    def _identity(self) -> dict[str, str]:
        return {"sing_host": self.named.host, "sing_freeze": self.freeze}


def parse(cfg: Any) -> tuple[Named, str, dict[str, Any]]:
    """The optimizer's name, what to freeze, and the options, typed and tried.

    Args:
        cfg: as in :class:`FairseqSING`.

    Raises:
        ValueError: a host that does not exist or is not the name's, an unknown option, a value that is not accepted.
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
        "freeze": cfg.sing_freeze,
        **{option: value for option in OPTIONS if (value := getattr(cfg, PREFIX + option)) != DEFAULT},
    }
    if cfg.weight_decay or "weight_decay" in named.parsers():  # a host without decay takes a decay of 0
        options["weight_decay"] = cfg.weight_decay
    try:
        typed = named.parse({k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in options.items()})
        freeze = typed.pop("freeze")
        _try(named, typed)
    except ValueError as error:
        raise ValueError(f"{error} (fairseq: --sing-<option>, but --lr and --weight-decay)") from error
    return named, freeze, typed


def decay_groups(model: nn.Module, options: dict[str, Any]) -> list[ParamGroup]:
    """The Trainer's parameters once each; those exempt from decay apart, also where this run has none.

    Args:
        model: holds the model and the criterion, in the Trainer's order.
        options: as from :func:`parse`.
    """
    params = list(dict.fromkeys(_trainable(model)))
    return split_decay(model, [{"params": params}], decay_all=options.get("decay_all", False))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for module in model.children() for param in module.parameters() if param.requires_grad]


def _try(named: Named, options: dict[str, Any]) -> None:
    named.build([nn.Parameter(torch.zeros(1, 1))], **options)
