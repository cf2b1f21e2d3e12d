"""SING by name in Accelerate, which has no names of its own: build the optimizer here, then ``prepare`` it.

accelerator = Accelerator()
optimizer = sing_accelerate.create_optimizer(accelerator, model, "sing_adamw", lr=5e-3, weight_decay=0.01)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from sing_plugins import plan
from sing_plugins.options import DEFAULT_FREEZE

__all__ = ["create_optimizer"]

# What wraps or shards a model, by the name of its class: most of them exist in some installations only.
_WRAPPERS = frozenset(
    {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "XlaFullyShardedDataParallel"}
    | {"DeepSpeedEngine", "AbstractTrainStep"}
)


def create_optimizer(
    accelerator: Accelerator,
    model: nn.Module,
    name: str = "sing_adamw",
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    freeze: str = DEFAULT_FREEZE,
    no_weight_decay: Collection[str] = (),
    **options: Any,
) -> Optimizer:
    """Freeze normalization layers, make param groups and build the optimizer, for ``accelerator.prepare``.

    Call it before ``prepare``: DistributedDataParallel waits for the gradients of all parameters that are trainable
    when it wraps a model, and a sharded model's layers are no longer whole. Gradient accumulation, ``accumulate``,
    ``clip_grad_norm_`` (which has no effect on SING), ``save_state`` and ``load_state`` work as with any optimizer.

    Args:
        accelerator: the one that will prepare the model.
        model: the model to train; normalization layers are frozen in place according to ``freeze``.
        name: ``"sing"``, ``"sing_adamw"``, ``"sing_adabelief"``, ``"sing_adafactor"``, ``"sing_sgd"``, or
            ``"sing_<host>"`` with the lower-case name of a class of torch.optim. Default ``"sing_adamw"``.
        lr: learning rate, usually ten times AdamW's; None for the optimizer's default.
        weight_decay: of the parameters that are neither biases nor in a normalization layer. Default 0.
        freeze: ``"default"``, ``"layernorm"``, ``"norm"`` or ``"none"``; see :func:`sing_plugins.param_groups`.
        no_weight_decay: names of further parameters that are not decayed.
        options: the optimizer's options, as in :class:`sing_plugins.SING` or, for another host, as of that host and
            :func:`sing_plugins.wrap`.

    Returns:
        An optimizer that is not prepared yet.

    Raises:
        TypeError: ``accelerator`` or ``model`` is something else.
        ValueError: the accelerator shards models in a way that SING cannot see through (DeepSpeed, FSDP1,
            Megatron-LM), the model is already prepared or wrapped, an unknown name or option, or a bad value.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"Invalid accelerator: {type(accelerator).__name__}. Accepted: an accelerate.Accelerator.")
    plan.check_model(model)
    _check_sharding(accelerator)
    _check_unprepared(accelerator, model)
    return plan.create_optimizer(
        model, name, lr=lr, weight_decay=weight_decay, freeze=freeze, no_weight_decay=no_weight_decay, **options
    )


def _check_sharding(accelerator: Accelerator) -> None:
    """Raise for a plugin that flattens parameters or brings an optimizer of its own."""
    for kind, (what, applies) in _REFUSED.items():
        if accelerator.distributed_type == kind and applies(accelerator):
            raise ValueError(
                f"Invalid accelerator: it uses {what}, under which SING would train on flat pieces of the tensors that "
                "it normalizes one by one. Accepted: one process, DDP, DeepSpeed with zero_stage 0, or FSDP2: "
                "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), fsdp_version: 2 in a "
                "configuration file."
            )


def _is_flat(accelerator: Accelerator) -> bool:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or getattr(plugin, "fsdp_version", 1) != 1:
        return False
    strategy = getattr(plugin.sharding_strategy, "name", plugin.sharding_strategy)
    return not (plugin.use_orig_params and strategy == "NO_SHARD")


def _zero_stage(accelerator: Accelerator) -> int | None:
    """Stage 0 leaves the tensors whole; a stage that cannot be told may flatten them."""
    stage = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", None)
    return stage if isinstance(stage, int) else None


_REFUSED: dict[DistributedType, tuple[str, Callable[[Accelerator], bool]]] = {
    DistributedType.DEEPSPEED: ("DeepSpeed ZeRO", lambda accelerator: _zero_stage(accelerator) != 0),
    DistributedType.MEGATRON_LM: ("Megatron-LM", lambda accelerator: True),
    DistributedType.FSDP: ("FSDP1 (fsdp_version=1)", _is_flat),
}


def _check_unprepared(accelerator: Accelerator, model: nn.Module) -> None:
    prepared = {module for wrapped in accelerator._models for module in wrapped.modules()}
    for module in model.modules():
        wrapper = _WRAPPERS & {base.__name__ for base in type(module).__mro__}
        if wrapper or module in prepared:
            how = f"is wrapped in {', '.join(wrapper)}" if wrapper else "has been prepared"
            raise ValueError(
                f"Invalid model: {type(model).__name__} {how}. Accepted: the model as it was constructed or loaded. "
                "Call sing_accelerate.create_optimizer first, then accelerator.prepare(model, optimizer)."
            )
