"""What every adapter asks for: check everything, freeze, group, build, and undo.

A framework decides when its adapter may take which of these steps; what they do, and in which order they refuse, is
decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.checks import ParamGroup
from sing_plugins.groups import Choice, choose, exempt_from_decay, read_groups, restorer, said, split_decay, without
from sing_plugins.messages import hint_learning_rate, say
from sing_plugins.names import HostFactory, Named, Native, resolve
from sing_plugins.options import DEFAULT_FREEZE, OPTIONS, shown


class Plan:
    """One optimizer for one model, from a name and options to the optimizer itself.

    Making a plan checks all of it and changes nothing. Then come :meth:`freeze`, :meth:`group` and :meth:`build`, or
    :meth:`optimizer`, which is all three; :meth:`undo` takes :meth:`freeze` back.

    Args:
        named: the name, resolved.
        options: the optimizer's, as strings or Python values, and ``freeze``. A weight decay of 0 may be given to an
            optimizer that has none.
        model: the model, before anything wraps or shards it. None where it is not known: nothing is frozen then, and
            param groups are taken as they are.
        no_weight_decay: names of further parameters that are not decayed.
        framework_lr: the learning rate that the framework takes when none is asked for, so that a hint can name it.

    Attributes:
        options: typed, without ``freeze``.
        freeze_as: the value of ``freeze``.

    Raises:
        ValueError: an unknown option, a value or a combination that is not accepted, a name in ``no_weight_decay`` that
            no parameter has, layers to freeze without a model, or as :func:`sing_plugins.groups.choose`.
    """

    def __init__(
        self,
        named: Named,
        options: Mapping[str, object],
        model: nn.Module | None = None,
        *,
        no_weight_decay: Collection[str] = (),
        framework_lr: float | None = None,
    ) -> None:
        if model is not None:
            check_model(model)
        self.named, self.model = named, model
        # None stands for an option that was not given, where it is not one of its values.
        given = {
            name: value
            for name, value in options.items()
            if value is not None or name == "freeze" or name not in OPTIONS or OPTIONS[name].accepts(None)
        }
        decay = {"weight_decay"} & set(given) - set(named.options)
        if decay and OPTIONS["weight_decay"].read(given["weight_decay"], named.name) == 0:
            del given["weight_decay"]
        self.options = named.parse(given)
        self.freeze_as: str = self.options.pop("freeze", DEFAULT_FREEZE)
        self._no_weight_decay, self._framework_lr = no_weight_decay, framework_lr
        self._choice: Choice | None = None
        self.undo: Callable[[], None] = lambda: None
        self.try_options(self.options)
        if model is not None:
            choose(model, self.freeze_as)
            exempt_from_decay(model, no_weight_decay)
        elif self.freeze_as not in ("none", DEFAULT_FREEZE):
            raise ValueError(
                f"Invalid freeze: {self.freeze_as!r} for parameters whose layers are not known. Accepted: none. Pass "
                "the model."
            )

    def try_options(self, options: Mapping[str, Any]) -> None:
        """Raise for typed options that the optimizer would refuse.

        Raises:
            ValueError: as the optimizer's constructor.
        """
        weight = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        self.named.build([nn.Parameter(weight)], **options)

    def freeze(self) -> None:
        """Freeze the normalization layers that the plan's ``freeze`` means, and thaw those that an earlier plan froze.

        Raises:
            ValueError: as :func:`sing_plugins.groups.choose`.
        """
        if self.model is not None:
            self.undo = restorer(self.model)
            before = self._choice.thawed if self._choice is not None else []
            choice = choose(self.model, self.freeze_as)
            choice.apply(self.model)
            self._choice = replace(choice, thawed=before + choice.thawed)

    def group(self, params: ParamsT | None = None, *, split: bool = True, everything: bool = False) -> list[ParamGroup]:
        """Param groups by the rules of weight decay, after :meth:`freeze`.

        Args:
            params: what a framework or the user wants to train, as for any torch optimizer. Nothing is left out of it
                but what SING has frozen; every group keeps its place and its options. None: all that is trainable.
            split: give what is exempt from decay a group of its own, behind all others. Without, or without a model,
                groups decay what they decay; parameters that come without groups are split all the same.
            everything: ``params`` is what was trainable before :meth:`freeze`; what that has thawed gets a group, too.

        Raises:
            TypeError, ValueError: as any torch optimizer for such params, or the model has nothing to train.
        """
        if self.model is None or self._choice is None:
            return read_groups(() if params is None else params)
        decay = float(self.options.get("weight_decay", 0.0))
        if params is None:
            trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if not trainable:
                raise ValueError("Invalid model: it has no parameter with requires_grad=True.")
            params = [{"params": trainable, "weight_decay": decay}]
        given: Any = params if isinstance(params, Tensor) else list(params)
        groups = without(read_groups(given), {owned.parameter for owned in self._choice.frozen})
        if not split and any(isinstance(item, dict) for item in given):
            return groups
        if everything and self._choice.thawed:
            thawed = [owned.parameter for owned in self._choice.thawed]
            groups = [*without(groups, set(thawed)), {"params": thawed, "weight_decay": decay}]
        exempt = exempt_from_decay(self.model, self._no_weight_decay, decay_all=self.options.get("decay_all", False))
        return split_decay(groups, exempt, decay)

    def build(self, groups: ParamsT) -> Optimizer:
        """The optimizer; logs one line on what was frozen and decayed, and a hint where the learning rate looks wrong.

        Args:
            groups: as from :meth:`group`; a framework may have put copies in the places of the parameters.

        Raises:
            ValueError: the host takes the options, but not these parameters or what their groups say.
        """
        try:
            optimizer = self.named.build(groups, **self.options)
        except (TypeError, ValueError) as error:
            if isinstance(self.named, Native):
                raise
            raise ValueError(
                f"Invalid optimizer: {self.named.name!r} for these parameters. Name another one, or give it only those "
                f"that {self.named.host} takes, which says: {error}"
            ) from error
        self.log(optimizer.param_groups)
        hint_learning_rate(
            optimizer.defaults.get("lr"),
            self.named.host,
            is_damped=self.named.wants_more_lr(self.options),
            framework_default=self._framework_lr,
        )
        return optimizer

    def optimizer(
        self, params: Callable[[], ParamsT] | None = None, *, split: bool = True, everything: bool = False
    ) -> Optimizer:
        """Freeze, group and build; where that raises, the model is as it was.

        Args:
            params: gives what :meth:`group` takes; called when the layers are frozen, and may freeze some by itself.
            split, everything: as for :meth:`group`.
        """
        self.freeze()
        undo = self.undo
        try:
            given = None
            if params is not None:
                given = params()
                self.freeze()
                self.undo = undo
            return self.build(self.group(given, split=split, everything=everything))
        except Exception:  # such as a host that does not take every parameter of this model
            undo()
            raise

    def log(self, groups: Iterable[ParamGroup]) -> None:
        """One line: what was frozen, and how many tensors each rate of weight decay reaches."""
        if self._choice is None:
            if self.model is None and self.freeze_as != "none":
                say("got parameters and not a model, so no normalization layer is frozen.", once=True)
            return
        counts: dict[float, int] = {}
        for group in groups:
            rate = group.get("weight_decay", 0.0)
            counts[rate] = counts.get(rate, 0) + len(group["params"])
        decays = ", ".join(f"{count} tensors with weight_decay={rate:g}" for rate, count in counts.items())
        # Frozen layers would surprise whoever did not ask for them: that is said at the level that is shown by default.
        choice = self._choice
        noteworthy = choice.frozen or choice.thawed or choice.closed or choice.wished or choice.wrapped
        say(
            f"freeze={said(self.freeze_as)}: {choice}; trained: {decays}.",
            level=logging.WARNING if noteworthy else logging.INFO,
        )


def check_model(model: object) -> None:
    """Raise for what is no model.

    Raises:
        TypeError: says what it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__}. Accepted: a torch.nn.Module.")


def builder_class(name: str, build: Callable[..., Optimizer], *, module: str) -> type[Optimizer]:
    """A class that is called as ``build``, for the frameworks whose names stand for classes.

    Args:
        name: the class's.
        build: takes params and options.
        module: the module that the class says it is from.
    """

    def new(cls: type[Optimizer], params: ParamsT, **options: Any) -> Optimizer:
        return build(params, **options)

    return type(name, (Optimizer,), {"__new__": new, "__doc__": build.__doc__, "__module__": module})


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
        freeze: ``"layernorm"``, ``"norm"``, ``"none"`` or ``"default"``; see :func:`sing_plugins.groups.choose`.
            Default ``"default"``: layernorm, as the paper advises (5.3, 5.4), but for layers that were left trainable
            on purpose.
        no_weight_decay: names of further parameters that are not decayed.
        decay_all: decay biases and normalization layers too. :class:`sing_plugins.SING` still passes over tensors of
            zero and one dimension unless it has ``decay_all`` as well. Default False.

    Returns:
        Up to two param groups with ``params`` and ``weight_decay``: decayed, not decayed. Every trainable parameter
        is in one of them, tied ones once.

    Raises:
        ValueError: as :class:`Plan`, or the model has no trainable parameter. The model is as it was then.
    """
    decay = {"weight_decay": weight_decay, "decay_all": decay_all}
    check_model(model)
    plan = Plan(resolve("sing"), {**decay, "freeze": freeze}, model, no_weight_decay=no_weight_decay)
    plan.freeze()
    try:
        groups = plan.group()
    except ValueError:
        plan.undo()
        raise
    plan.log(groups)
    return groups


def create_optimizer(
    model: nn.Module,
    name: str = "sing_adamw",
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    freeze: str = DEFAULT_FREEZE,
    no_weight_decay: Collection[str] = (),
    groups: ParamsT | None = None,
    hosts: Mapping[str, HostFactory] | None = None,
    **options: Any,
) -> Optimizer:
    """Freeze, group and build, for any training loop.

    Where it raises, the model is as it was. Call it before the model is wrapped or sharded.

    Args:
        model: the model to train; normalization layers are frozen in place according to ``freeze``.
        name: as in :func:`sing_plugins.names.resolve`.
        lr: learning rate; None for the optimizer's default.
        weight_decay: of the parameters that are neither biases nor in a normalization layer.
        freeze: ``"default"``, ``"layernorm"``, ``"norm"`` or ``"none"``; see :func:`sing_plugins.param_groups`.
        no_weight_decay: names of further parameters that are not decayed.
        groups: parameters or param groups, as for any torch optimizer; what SING freezes is taken out of them, and the
            exempt members of a group that decays get a group behind all others. None: all trainable parameters.
        hosts: further hosts by name: what builds each from params and its options.
        options: the optimizer's options, as Python values or strings. ``decay_all=True`` lets weight decay reach biases
            and normalization layers too, for every name.

    Raises:
        TypeError: a ``model`` that is no module, ``hosts`` that are no mapping of names, or ``groups`` that no torch
            optimizer would take.
        ValueError: an unknown name or option, a bad value, or as :func:`sing_plugins.param_groups`.
    """
    check_model(model)
    if groups is not None and not isinstance(groups, Iterable):
        raise TypeError(f"Invalid groups: {shown(groups)}. Accepted: parameters or param groups.")
    options |= {"weight_decay": weight_decay, "freeze": freeze, **({} if lr is None else {"lr": lr})}
    plan = Plan(resolve(name, hosts), options, model, no_weight_decay=no_weight_decay)
    return plan.optimizer(None if groups is None else lambda: groups)
