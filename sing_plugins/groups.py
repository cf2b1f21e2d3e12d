"""Which parameters are frozen and which are decayed: by the type of the module that owns them (see layers.py)."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sing_plugins.checks import ParamGroup
from sing_plugins.layers import Kind, is_closed, is_exempt, kind
from sing_plugins.options import DEFAULT_FREEZE, shown

_KINDS: dict[str, frozenset[Kind]] = {
    "layernorm": frozenset({"layernorm", "layerscale"}),
    "norm": frozenset({"layernorm", "layerscale", "norm"}),
    "none": frozenset(),
    "default": frozenset({"layernorm", "layerscale"}),
}

# A module of which SING froze parameters has this attribute: their names in it, and whether most of what is around it
# was frozen already. It lies in the module so that copies and pickles of the model have it too.
_RECORD = "_sing_frozen"

# Path components below which PEFT keeps the layers that it was asked to train.
_ASKED_FOR = frozenset({"modules_to_save", "ln_tuning_layers"})

# Path components that wrappers of a module put into the names of its parameters.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True, eq=False)
class Owned:
    """A parameter of a model, under its first name if it is tied, and the module that holds it directly.

    Attributes:
        name, leaf: its name in the model and in its owner.
        in_frozen_layers: whether most of the parameters around it, normalization aside, are frozen, or PEFT says that
            it is to be trained all the same: its adapters may outweigh what they adapt.
    """

    name: str
    owner: nn.Module
    leaf: str
    parameter: nn.Parameter
    kind: Kind | None
    in_frozen_layers: bool

    @property
    def is_frozen_by_us(self) -> bool:
        """Whether SING has frozen it, and nobody has frozen the layers around it since."""
        leaves, was_in_frozen_layers = vars(self.owner).get(_RECORD, ((), False))
        frozen = self.leaf in leaves and not self.parameter.requires_grad
        return frozen and (was_in_frozen_layers or not self.in_frozen_layers)


@dataclass(frozen=True)
class Choice:
    """What a value of ``freeze`` means for a model.

    Attributes:
        frozen: what is to be frozen, or has been by an earlier plan.
        thawed: what an earlier plan has frozen and this one does not.
        closed: what is not frozen because its gain is near zero, so that nothing behind it would ever be learned.
        wished: what is not frozen because it was left trainable while most of what is around it is frozen.
        wrapped: what is not frozen because the model is wrapped in DistributedDataParallel already.
    """

    frozen: list[Owned]
    thawed: list[Owned]
    closed: list[Owned]
    wished: list[Owned]
    wrapped: list[Owned]

    def apply(self, model: nn.Module) -> None:
        """Set ``requires_grad``, and record what is frozen in the modules of the model that was chosen for."""
        for owned in self.thawed:
            owned.parameter.requires_grad_(True)
        records = {module: vars(module).pop(_RECORD, None) for module in model.modules()}
        leaves: dict[nn.Module, list[str]] = defaultdict(list)
        for owned in self.frozen:
            owned.parameter.requires_grad_(False)
            leaves[owned.owner].append(owned.leaf)
            _, in_frozen_layers = records[owned.owner] or ((), owned.in_frozen_layers)
            setattr(owned.owner, _RECORD, (tuple(leaves[owned.owner]), in_frozen_layers))

    def __str__(self) -> str:
        parts = [f"{len(self.frozen)} tensors frozen{_examples(self.frozen)}"]
        for owned, what in (
            (self.thawed, "that an earlier plan had frozen are trained again"),
            (self.closed, "not frozen, since with their gain near zero nothing behind it would learn"),
            (
                self.wished,
                "left to train (freeze=none), since most of what is around them is frozen",
            ),
            (self.wrapped, "not frozen, since the model is in DistributedDataParallel already"),
        ):
            if owned:
                parts.append(f"{len(owned)} {what}{_examples(owned)}")
        return "; ".join(parts)


def _examples(owned: list[Owned]) -> str:
    return f" ({', '.join(o.name for o in owned[:2])}{', …' if len(owned) > 2 else ''})" if owned else ""


def choose(model: nn.Module, freeze: str) -> Choice:
    """Which parameters of normalization layers are frozen (paper, sections 5.3 and 5.4); changes nothing.

    Args:
        model: the model, before anything wraps or shards it.
        freeze: ``"layernorm"``: LayerNorm, RMSNorm (in all their spellings) and LayerScale; ``"norm"``: BatchNorm,
            GroupNorm and InstanceNorm too; ``"none"``; ``"default"``: layernorm, but for layers that were left
            trainable while most of the parameters around them were frozen, and for a model that is wrapped already.
            A layer with a gain near zero is never frozen.

    Raises:
        ValueError: an unknown ``freeze``, nothing would be left to train, or the model is already wrapped in
            DistributedDataParallel, which has fixed its gradients.
    """
    if not isinstance(freeze, str) or freeze not in _KINDS:
        raise ValueError(f"Invalid freeze: {shown(freeze)}. Accepted: {', '.join(_KINDS)}.")
    owned = list(owned_parameters(model))
    trainable = [o for o in owned if o.parameter.requires_grad or o.is_frozen_by_us]
    candidates = [o for o in trainable if o.kind in _KINDS[freeze]]
    closed = [o for o in candidates if is_closed(o.owner)] if _has_values(owned) else []
    wished = [o for o in candidates if freeze == "default" and o.in_frozen_layers and o not in closed]
    frozen = [o for o in candidates if o not in closed and o not in wished]
    thawed = [o for o in owned if o.is_frozen_by_us and o not in frozen]
    changes = thawed + [o for o in frozen if o.parameter.requires_grad]
    if changes and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        if freeze != "default":
            raise ValueError(
                f"Invalid freeze: {freeze!r} for a model that is already wrapped in DistributedDataParallel, which "
                "waits for the gradients of the parameters that were trainable then. Create the optimizer before "
                "wrapping" + ("." if freeze == "none" else ", or pass freeze='none'.")
            )
        kept = [o for o in frozen if not o.parameter.requires_grad]
        return Choice(kept + thawed, [], closed, wished, [o for o in frozen if o not in kept])
    if frozen and len(frozen) == len(trainable):
        raise ValueError(
            f"Invalid freeze: {said(freeze)!r} would freeze all {len(frozen)} trainable parameters. Pass freeze='none'."
        )
    return Choice(frozen, thawed, closed, wished, [])


def said(freeze: str) -> str:
    """What a value of ``freeze`` is called in messages and checkpoints: where nothing was asked for, as before."""
    return "layernorm" if freeze == DEFAULT_FREEZE else freeze


def unfreeze(model: nn.Module) -> list[str]:
    """Let everything that SING has frozen in a model be trained again.

    What the user has frozen stays frozen. The next optimizer that SING makes for the model freezes according to its own
    ``freeze``, so that this is only needed before another optimizer's training.

    Args:
        model: the model, or one that contains it.

    Returns:
        The names of the parameters that are trainable again.

    Raises:
        ValueError: the model is wrapped in DistributedDataParallel.
    """
    choice = choose(model, "none")
    choice.apply(model)
    return [owned.name for owned in choice.thawed]


def restorer(model: nn.Module) -> Callable[[], None]:
    """A function that sets ``requires_grad`` and the records of a model to what they are now."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    records = [(module, vars(module).get(_RECORD)) for module in model.modules()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, record in records:
            vars(module).pop(_RECORD, None)
            if record is not None:
                setattr(module, _RECORD, record)

    return restore


def owned_parameters(model: nn.Module) -> Iterator[Owned]:
    """Every parameter of a model with its owner, tied ones once."""
    found: list[tuple[str, nn.Module, str, nn.Parameter, Kind | None]] = []
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                found.append((path, module, leaf, parameter, kind(module, leaf)))
    trained: dict[str, int] = defaultdict(int)  # entries below a path, normalization aside
    entries: dict[str, int] = defaultdict(int)
    for path, _, _, parameter, what in found:
        if what is None and not is_lazy(parameter):
            for above in _upwards(path):
                entries[above] += parameter.numel()
                trained[above] += parameter.numel() * parameter.requires_grad
    for path, module, leaf, parameter, what in found:
        around = next((above for above in _upwards(path) if entries[above]), "")
        name = f"{path}.{leaf}" if path else leaf
        in_frozen_layers = 2 * trained[around] < entries[around] or not _ASKED_FOR.isdisjoint(path.split("."))
        yield Owned(name, module, leaf, parameter, what, in_frozen_layers)


def _upwards(path: str) -> Iterator[str]:
    """``a.b`` → ``a.b``, ``a``, and the empty path of the model itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _has_values(owned: list[Owned]) -> bool:
    """Whether the weights are there: on the meta device, and on all ranks but one of some loaders, they are not."""
    matrices = [o.parameter for o in owned if o.kind is None and not is_lazy(o.parameter) and not o.parameter.is_meta]
    return not matrices or any(bool(parameter.detach().any()) for parameter in matrices)


def exempt_from_decay(
    model: nn.Module, no_weight_decay: Collection[str] = (), *, decay_all: bool = False
) -> set[nn.Parameter]:
    """The parameters that get no weight decay: biases, normalization layers, and those whose names are given.

    Args:
        model: the model.
        no_weight_decay: names of further parameters; any of the names of a tied one, with or without what
            torch.compile and other wrappers put into it.
        decay_all: the parameters named are the only ones.

    Raises:
        TypeError: ``no_weight_decay`` is not a collection of strings.
        ValueError: a name that no parameter of the model has.
    """
    is_collection = isinstance(no_weight_decay, Collection) and not isinstance(no_weight_decay, str)
    if not is_collection or not all(isinstance(name, str) for name in no_weight_decay):
        raise TypeError(
            f"Invalid no_weight_decay: {shown(no_weight_decay)}. Accepted: a list of names of the model's parameters."
        )
    by_name = {_unwrapped(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    declared: Collection[str] = getattr(
        model, "no_weight_decay", tuple
    )()  # timm's models name what only some of them have
    for name in no_weight_decay:
        if _unwrapped(name) not in by_name and name not in declared:
            close = difflib.get_close_matches(_unwrapped(name), by_name, n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"Invalid no_weight_decay: {name!r}. Accepted: names of the model's parameters.{hint}")
    exempt = {by_name[_unwrapped(name)] for name in no_weight_decay if _unwrapped(name) in by_name}
    if not decay_all:
        exempt.update(o.parameter for o in owned_parameters(model) if is_exempt(o.owner, o.leaf, o.parameter))
    return exempt


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)  # DistributedDataParallel


def read_groups(params: ParamsT) -> list[ParamGroup]:
    """Param groups as torch reads what an optimizer is given: ``params`` a list of tensors, names in ``param_names``.

    Args:
        params: as for any torch optimizer; not changed, but generators in it are read.

    Raises:
        TypeError, ValueError: as any torch optimizer.
    """
    copies: Any = params
    if not isinstance(params, Tensor):  # which torch refuses
        copies = [{**item} if isinstance(item, dict) else item for item in params]
    return _Reader(copies, {}).param_groups


class _Reader(Optimizer):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise NotImplementedError


def without(groups: Iterable[ParamGroup], left_out: Collection[Tensor]) -> list[ParamGroup]:
    """The groups, in their order and with their options, without some parameters."""
    return [_part(group, lambda param: param not in left_out) for group in groups]


def split_decay(groups: list[ParamGroup], exempt: Collection[Tensor], weight_decay: float) -> list[ParamGroup]:
    """Groups in which what is exempt from decay is not decayed.

    Args:
        groups: param groups. Those that decay and have exempt members lose these to a group of their own, behind all
            others, so that every group keeps its place; those that have no other members get no decay.
        exempt: as from :func:`exempt_from_decay`.
        weight_decay: of the groups that do not say.
    """
    kept, apart = [], []
    for group in groups:
        if not group.get("weight_decay", weight_decay) or not any(param in exempt for param in group["params"]):
            kept.append(group)
            continue
        undecayed = {**_part(group, exempt.__contains__), "weight_decay": 0.0}
        decayed = _part(group, lambda param: param not in exempt)
        kept.append(decayed if decayed["params"] else undecayed)
        apart += [undecayed] if decayed["params"] else []
    return kept + apart


def _part(group: ParamGroup, belongs: Callable[[Tensor], bool]) -> ParamGroup:
    places = [place for place, param in enumerate(group["params"]) if belongs(param)]
    lists: ParamGroup = {key: [group[key][i] for i in places] for key in ("params", "param_names") if key in group}
    return {**group, **lists}
