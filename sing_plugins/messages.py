"""What SING tells its users while it is set up: one logger, each line once, from one process of a job."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import distributed

logger = logging.getLogger("sing_plugins")

# Learning rates that are customary for AdamW; those that the paper used for SING (2e-4, 8e-4, 5e-3 and up) are not.
_ADAMW_FINE_TUNING = 1e-4
_ADAMW_CUSTOMARY = (3e-4, 5e-4, 1e-3)

_said: set[str] = set()


def say(message: str, *, level: int = logging.WARNING, once: bool = False) -> None:
    """Log one line with the prefix ``SING:``, on the job's first process only.

    Args:
        message: the line.
        level: a level of the standard library's logging.
        once: leave the line out if this process has logged it before.
    """
    if _rank() != 0 or (once and message in _said):
        return
    _said.add(message)
    logger.log(level, "SING: %s", message)


def hint_learning_rate(lr: Any, host: str, *, is_damped: bool, framework_default: float | None = None) -> None:
    """Say so, once, when the learning rate is a framework's untouched default or, where it is too low, like AdamW's.

    Args:
        lr: the optimizer's; None where it finds its own, as timm's Adafactor does.
        host: the host's name.
        is_damped: whether softplus damps large tensors; if not, the learning rate of the host alone is right.
        framework_default: the learning rate that the framework takes when nothing is asked for.
    """
    if lr is None:
        return
    lr = float(lr)
    advice = (
        "SING usually wants about ten times AdamW's best lr (and a tenth of its weight decay): the paper used 5e-3 to "
        "1e-1 from scratch and 2e-4 to 8e-4 for fine-tuning."
        if is_damped
        else f"SING without softplus_beta, or with softplus_relative, usually wants about the best lr of {host} alone."
    )
    if framework_default is not None and lr == framework_default:
        say(f"lr={lr:g} is the framework's default. {advice}", once=True)
    elif is_damped and (0 < lr <= _ADAMW_FINE_TUNING or lr in _ADAMW_CUSTOMARY):
        say(f"lr={lr:g} looks like a learning rate of AdamW. {advice}", once=True)


def hint_clipping(argument: str, value: float) -> None:
    """Say once what gradient clipping does to normalized gradients (paper D.1).

    Args:
        argument: the framework's name for the threshold, such as ``max_grad_norm``.
        value: the threshold that the user set; 0 means no clipping.
    """
    if value:
        say(
            f"{argument}={value:g} clips gradients, which normalization undoes (paper D.1): only tensors whose clipped "
            "gradient is about as small as eps, such as the bias of attention's keys, take other steps.",
            once=True,
        )


def _rank() -> int:
    """This process's rank in its job; where the framework spawns the processes, only torch.distributed has it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0
