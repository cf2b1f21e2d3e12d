"""SING by name in fairseq: ``fairseq-train --optimizer sing``, ``fairseq-hydra-train optimizer=sing``.

fairseq hands an optimizer a flat list of parameters, maybe copies in another precision, but SING's freeze and decay
rules go by the model's layers. So the Trainer is taught two things: to freeze when it is given the model, before
anything wraps it or collects its parameters, and to say which model it is while it builds the optimizer.

As ``--user-dir``, or imported by hand, this package registers itself; where sing-plugins is installed, autoload does.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, merge_with_parent
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY, OPTIMIZER_REGISTRY, AMPOptimizer, register_optimizer
from hydra.core.config_store import ConfigStore
from torch import nn

from sing_fairseq.optimizer import NAMES, FairseqSING, SINGConfig, building, plan_of
from sing_plugins.adapter import Hooks
from sing_plugins.autoload import enable, loaded
from sing_plugins.messages import hint_clipping
from sing_plugins.names import Foreign, Named
from sing_plugins.plan import Plan

__all__ = ["FairseqSING", "is_patched", "patch", "unpatch"]

logger = logging.getLogger(__name__)
_hooks = Hooks()


def patch() -> None:
    """Register SING's names, and teach the Trainer if it is loaded; doing so twice changes nothing.

    Raises:
        ValueError: somebody else has registered one of the names.
    """
    for name in NAMES:
        if OPTIMIZER_REGISTRY.get(name) is not FairseqSING:
            register_optimizer(name, dataclass=SINGConfig)(FairseqSING)
    _hooks.hook(utils, "import_user_module", _import_user_module)
    trainer = loaded("fairseq.trainer")
    if trainer is not None:
        _hooks.hook(trainer.Trainer, "__init__", _init)
        _hooks.hook(trainer.Trainer, "_build_optimizer", _build_optimizer)


def unpatch() -> None:
    """Undo :func:`patch`: fairseq's registries, hydra's store and the Trainer are what they were."""
    _hooks.unhook()
    for name in [name for name, kind in OPTIMIZER_REGISTRY.items() if kind is FairseqSING]:
        del OPTIMIZER_REGISTRY[name], OPTIMIZER_DATACLASS_REGISTRY[name]
        del ConfigStore.instance().repo["optimizer"][f"{name}.yaml"]


def is_patched() -> bool:
    """Whether SING's names are registered."""
    return OPTIMIZER_REGISTRY.get("sing") is FairseqSING


def _init(own: Any) -> Any:
    def init(trainer: Any, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(cfg, Namespace):  # deprecated; fairseq converts it in the same way
            cfg = convert_namespace_to_omegaconf(cfg)
        if _is_sing(cfg):
            trainer._sing_plan = _prepare(cfg, nn.ModuleDict({"model": model, "criterion": criterion}))
        with _undone_by_errors(trainer):
            own(trainer, cfg, task, model, criterion, *args, **kwargs)

    return init


def _build_optimizer(own: Any) -> Any:
    def build_optimizer(trainer: Any) -> None:
        if not _is_sing(trainer.cfg):
            own(trainer)
            return
        modules = (trainer._model, trainer._criterion)
        trainable = [param for module in modules for param in module.parameters() if param.requires_grad]
        token = building.set((trainer._sing_plan, trainable))
        try:
            with _undone_by_errors(trainer):
                own(trainer)
        finally:
            building.reset(token)
        outer = trainer._optimizer
        if isinstance(outer, AMPOptimizer):  # it would go past FairseqSING to the torch optimizer
            outer.state_dict, outer.load_state_dict = (
                outer.fp32_optimizer.state_dict,
                outer.fp32_optimizer.load_state_dict,
            )

    return build_optimizer


@contextmanager
def _undone_by_errors(trainer: Any) -> Iterator[None]:
    """Where the Trainer or its optimizer cannot be built, the model is as it was before anything was frozen."""
    try:
        yield
    except Exception:
        if "_sing_plan" in vars(trainer):
            trainer._sing_plan.undo()
        raise


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


def _prepare(cfg: Any, model: nn.Module) -> Plan:
    """Check everything, then freeze, before anything wraps the model or collects its parameters."""
    plan = plan_of(merge_with_parent(SINGConfig(), cfg.optimizer), model)
    _check_trainer(cfg, plan.named)
    plan.freeze()
    if plan.options.get("normalize", True):
        hint_clipping("--clip-norm", cfg.optimization.clip_norm)
    return plan


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
    if isinstance(named, Foreign) and (common.memory_efficient_fp16 or common.memory_efficient_bf16):
        raise ValueError(
            f"Invalid --memory-efficient-fp16 or -bf16: True with {named.name}, which would have its state in half "
            "precision. Pass --fp16 --fp16-no-flatten-grads, or --bf16."
        )
    if isinstance(named, Foreign) and distributed.zero_sharding != "none":
        raise ValueError(
            f"Invalid --zero-sharding: {distributed.zero_sharding!r} with {named.name}: fairscale cannot rebuild a "
            "wrapped optimizer on each rank. Use sing, sing_adabelief, sing_adafactor or sing_sgd, or leave it out."
        )


# Where autoload got here first, that changes nothing.
enable("fairseq")
