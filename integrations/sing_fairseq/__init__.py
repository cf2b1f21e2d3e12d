"""SING by name in fairseq: ``fairseq-train --optimizer sing``, ``fairseq-hydra-train optimizer=sing``.

fairseq hands an optimizer a flat list of parameters, maybe copies in another precision, but SING's freeze and decay
rules go by the model's layers. So the Trainer is taught two things: to freeze when it is given the model, before
anything wraps it or collects its parameters, and to say which model it is while it builds the optimizer.

As ``--user-dir``, or imported by hand, this package registers itself; where sing-plugins is installed, autoload does.
"""

from __future__ import annotations

import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, merge_with_parent
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY, OPTIMIZER_REGISTRY, AMPOptimizer, register_optimizer
from hydra.core.config_store import ConfigStore
from torch import nn

from sing_fairseq.optimizer import NAMES, FairseqSING, SINGConfig, decay_groups, parse, trained
from sing_plugins.autoload import enable, loaded
from sing_plugins.groups import freeze_parameters, log_groups
from sing_plugins.messages import hint_clipping, hint_learning_rate
from sing_plugins.names import Named

__all__ = ["FairseqSING", "is_patched", "patch", "unpatch"]

DEFAULT_LR = 0.25  # fairseq's --lr, when nothing is asked for

logger = logging.getLogger(__name__)
_hooked: dict[tuple[Any, str], tuple[Any, Any]] = {}  # (owner, attribute) -> (ours, its own)


def patch() -> None:
    """Register SING's names, and teach the Trainer if it is loaded; doing so twice changes nothing.

    Raises:
        ValueError: somebody else has registered one of the names.
    """
    for name in NAMES:
        if OPTIMIZER_REGISTRY.get(name) is not FairseqSING:
            register_optimizer(name, dataclass=SINGConfig)(FairseqSING)
    _hook(utils, "import_user_module", _import_user_module)
    trainer = loaded("fairseq.trainer")
    if trainer is not None:
        _hook(trainer.Trainer, "__init__", _init)
        _hook(trainer.Trainer, "_build_optimizer", _build_optimizer)


def unpatch() -> None:
    """Undo :func:`patch`: fairseq's registries, hydra's store and the Trainer are what they were."""
    for (owner, attribute), (ours, own) in _hooked.items():
        if getattr(owner, attribute) is ours:  # else somebody's hook is on top of ours, and ours has no name left
            setattr(owner, attribute, own)
    _hooked.clear()
    for name in [name for name, kind in OPTIMIZER_REGISTRY.items() if kind is FairseqSING]:
        del OPTIMIZER_REGISTRY[name], OPTIMIZER_DATACLASS_REGISTRY[name]
        del ConfigStore.instance().repo["optimizer"][f"{name}.yaml"]


def is_patched() -> bool:
    """Whether SING's names are registered."""
    return OPTIMIZER_REGISTRY.get("sing") is FairseqSING


def _hook(owner: Any, attribute: str, hook: Callable[[Any], Any]) -> None:
    if (owner, attribute) not in _hooked:
        own = getattr(owner, attribute)
        _hooked[owner, attribute] = functools.wraps(own)(hook(own)), own
        setattr(owner, attribute, _hooked[owner, attribute][0])


def _init(own: Any) -> Any:
    def init(trainer: Any, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(cfg, Namespace):  # deprecated; fairseq converts it in the same way
            cfg = convert_namespace_to_omegaconf(cfg)
        if _is_sing(cfg):
            _prepare(cfg, _both(model, criterion))
        own(trainer, cfg, task, model, criterion, *args, **kwargs)

    return init


def _build_optimizer(own: Any) -> Any:
    def build_optimizer(trainer: Any) -> None:
        if not _is_sing(trainer.cfg):
            own(trainer)
            return
        token = trained.set(_both(trainer._model, trainer._criterion))
        try:
            own(trainer)
        finally:
            trained.reset(token)
        outer = trainer._optimizer
        if isinstance(outer, AMPOptimizer):  # it would go past FairseqSING to the torch optimizer
            outer.state_dict, outer.load_state_dict = (
                outer.fp32_optimizer.state_dict,
                outer.fp32_optimizer.load_state_dict,
            )

    return build_optimizer


def _import_user_module(own: Any) -> Any:
    def import_user_module(args: Any) -> None:
        path = os.path.abspath(getattr(args, "user_dir", None) or "")
        if os.path.basename(path) == __name__ and os.path.isdir(path):
            # It may be a copy of this package, which fairseq would refuse because its name is taken.
            logger.info("--user-dir=%s: already registered from %s", path, os.path.dirname(__file__))
        else:
            own(args)

    return import_user_module


def _is_sing(cfg: Any) -> bool:
    return OPTIMIZER_REGISTRY.get(getattr(cfg.optimizer, "_name", None)) is FairseqSING


def _both(model: nn.Module, criterion: nn.Module) -> nn.Module:
    return nn.ModuleDict({"model": model, "criterion": criterion})


def _prepare(cfg: Any, model: nn.Module) -> None:
    """Check everything, then freeze."""
    named, freeze, options = parse(merge_with_parent(SINGConfig(), cfg.optimizer))
    _check_trainer(cfg, named)
    frozen = freeze_parameters(model, freeze)
    rate = options.get("weight_decay", 0.0)
    log_groups(freeze, frozen, [{"weight_decay": rate, **group} for group in decay_groups(model, options)])
    hint_learning_rate(options, DEFAULT_LR)
    if options.get("normalize", True):
        hint_clipping("--clip-norm", cfg.optimization.clip_norm)


def _check_trainer(cfg: Any, named: Named) -> None:
    """Raise for a Trainer that would give SING something else than whole tensors, or a host what it cannot use."""
    common, distributed = cfg.common, cfg.distributed_training
    if common.fp16 and not (common.fp16_no_flatten_grads or common.memory_efficient_fp16):
        raise ValueError(
            f"Invalid --fp16: with {named.name} it needs --fp16-no-flatten-grads too "
            "(common.fp16_no_flatten_grads=true). Otherwise fairseq flattens all tensors into one, but SING divides "
            "each tensor's gradient by its own norm."
        )
    if distributed.ddp_backend == "fully_sharded":
        raise ValueError(
            f"Invalid --ddp-backend: 'fully_sharded', which flattens tensors, but {named.name} divides each tensor's "
            "gradient by its own norm. Accepted: pytorch_ddp, legacy_ddp."
        )
    if named.factory is not None and (common.memory_efficient_fp16 or common.memory_efficient_bf16):
        raise ValueError(
            f"Invalid --memory-efficient-fp16 or -bf16: True with {named.name}, which would have its state in half "
            "precision. Pass --fp16 --fp16-no-flatten-grads, or --bf16."
        )
    if named.factory is not None and distributed.zero_sharding != "none":
        raise ValueError(
            f"Invalid --zero-sharding: {distributed.zero_sharding!r} with {named.name}: fairscale cannot rebuild a "
            "wrapped optimizer on each rank. Use sing, sing_adabelief, sing_adafactor or sing_sgd, or leave it out."
        )


# Where autoload got here first, that changes nothing.
enable("fairseq")
