"""**The** table of optimizers that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.shapes import Shapes, entries
from sing_plugins import wrap

CYCLE = 5  # steps of a Lookahead cycle: no fewer are timed, since one of them merges
BYTES = 48  # a parameter: two optimizers with weights, gradients, state, and what a step needs


class NotMeasuredError(Exception):
    """Why something is left out."""


@dataclass(frozen=True)
class Maker:
    """How an optimizer is made.

    Attributes:
        path: ``module:function``; the module is imported when it is needed.
        options: keyword arguments beside the parameters.
        matrices_only: it takes no other tensors, and its reference gets no other either.
        largest_on_cpu: entries of the largest tensor for which it is bearable there.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    matrices_only: bool = False
    largest_on_cpu: int = 1 << 62

    def __call__(self, params: list[nn.Parameter]) -> Optimizer:
        """Make it.

        Raises:
            NotMeasuredError: it is not installed, or too old a version of its package.
        """
        module, function = self.path.split(":")
        try:
            make: Callable[..., Optimizer] = getattr(import_module(module), function)
            return make(params, **self.options)
        except (ImportError, AttributeError) as error:
            raise NotMeasuredError(f"not installed: {error}") from error

    def taken(self, shapes: Shapes, device: str) -> Shapes:
        """Of these shapes, those that it takes.

        Raises:
            NotMeasuredError: none; or it would need too much time or memory.
        """
        shapes = [shape for shape in shapes if len(shape) == 2 or not self.matrices_only]
        if not shapes:
            raise NotMeasuredError("there is no tensor that it takes")
        if device == "cpu" and max(map(math.prod, shapes)) > self.largest_on_cpu:
            raise NotMeasuredError("takes too long on a CPU")
        if BYTES * entries(shapes) > free_memory(device) / 2:
            raise NotMeasuredError("does not fit in half of the free memory")
        return shapes


def free_memory(device: str) -> int:
    """Bytes that can be had on a device."""
    return int(psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0])


def wrapped(params: list[nn.Parameter], **options: Any) -> Optimizer:
    """SING around torch's AdamW."""
    return wrap(AdamW(params, **options))


def lookahead(params: list[nn.Parameter]) -> Optimizer:
    """timm's lookahead_adamw, but with our period, so that every round has a merge."""
    return import_module("timm.optim").Lookahead(AdamW(params, lr=1e-3), k=CYCLE)  # type: ignore[no-any-return]


def schedule_free(params: list[nn.Parameter]) -> Optimizer:
    """The schedule-free AdamW of its authors' package, or else of pytorch_optimizer, in the mode for training."""
    try:
        make = import_module("schedulefree").AdamWScheduleFree
    except ImportError:
        make = import_module("pytorch_optimizer").ScheduleFreeAdamW
    optimizer: Any = make(params, lr=1e-3)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


_TORCH, _SING, _HERE = "torch.optim:AdamW", "sing_plugins:SING", "benchmarks.optimizers"
REFERENCE = "AdamW, fused"
DEFAULT, HARD, NO_LOOKAHEAD = "SING", "SING without softplus", "SING without Lookahead"
ADAMW_FOREACH = "AdamW, foreach"

OPTIMIZERS: dict[str, Maker] = {
    DEFAULT: Maker(_SING, {"lr": 1e-2}),
    "SING, fused": Maker(_SING, {"lr": 1e-2, "implementation": "fused"}),
    "SING, foreach": Maker(_SING, {"lr": 1e-2, "implementation": "foreach"}),
    "SING, loop": Maker(_SING, {"lr": 1e-2, "implementation": "loop"}),
    HARD: Maker(_SING, {"lr": 1e-2, "softplus_beta": None}),
    NO_LOOKAHEAD: Maker(_SING, {"lr": 1e-2, "lookahead_k": None}),
    "wrap(AdamW)": Maker(f"{_HERE}:wrapped", {"lr": 1e-3}),
    "wrap(AdamW, fused)": Maker(f"{_HERE}:wrapped", {"lr": 1e-3, "fused": True}),
    "AdamW, loop": Maker(_TORCH, {"lr": 1e-3, "foreach": False}),
    ADAMW_FOREACH: Maker(_TORCH, {"lr": 1e-3, "foreach": True}),
    REFERENCE: Maker(_TORCH, {"lr": 1e-3, "fused": True}),
    "Lamb (timm)": Maker("timm.optim:create_optimizer_v2", {"opt": "lamb", "lr": 1e-3}),
    "Lookahead AdamW (timm)": Maker(f"{_HERE}:lookahead"),
    "Lamb (pytorch_optimizer)": Maker("pytorch_optimizer:Lamb", {"lr": 1e-3}),
    "StableAdamW (pytorch_optimizer)": Maker("pytorch_optimizer:StableAdamW", {"lr": 1e-3}),
    "schedule-free AdamW": Maker(f"{_HERE}:schedule_free"),
    # Where a processor has no products of bfloat16, one step takes seconds for a matrix of 768 rows.
    "Muon, matrices only": Maker("torch.optim:Muon", {"lr": 1e-3}, matrices_only=True, largest_on_cpu=1 << 16),
}


def parameters(shapes: Shapes, device: str) -> list[nn.Parameter]:
    """Parameters with a gradient each, normally distributed."""
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same with memory of their own."""
    copied = [nn.Parameter(param.detach().clone()) for param in params]
    for copy, param in zip(copied, params, strict=True):
        assert param.grad is not None
        copy.grad = param.grad.clone()
    return copied
