"""What the demo trains with: in each framework AdamW, SING as README.md advises for small models, and as published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.demo.report import OnStep, Outcome

BY_SIZE = {"softplus_relative": 4}
TRAINED = {"freeze": "none"}


@dataclass(frozen=True)
class Choice:
    """An optimizer's name in a framework, and its settings.

    Attributes:
        name: the name that the framework is asked for.
        lr: the learning rate that the look (``--look``) chose.
        weight_decay: not looked for: SING's is a tenth of AdamW's.
        looked_at: the learning rates of the look.
        options: SING's, by their names in docs/options.md.
    """

    name: str
    lr: float
    weight_decay: float
    looked_at: tuple[float, float, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name and the options."""
        return ", ".join([self.name, *self.assignments])

    @property
    def assignments(self) -> list[str]:
        """The options as ``option=value``."""
        return [f"{option}={value}" for option, value in self.options.items()]

    @property
    def settings(self) -> dict[str, Any]:
        """All but the name, as arguments of an optimizer."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, **self.options}


Train = Callable[[Choice, OnStep, int], Outcome]  # …, steps

PLAN: dict[str, tuple[Choice, Choice, Choice]] = {
    "timm": (
        Choice("adamw", 3e-3, 0.05, (1e-3, 3e-3, 1e-2)),
        Choice("sing_adamw", 3e-3, 0.005, (1e-3, 3e-3, 1e-2), BY_SIZE),
        Choice("sing_adamw", 1e-1, 0.005, (1e-2, 3e-2, 1e-1)),
    ),
    "Accelerate": (
        Choice("adamw", 1e-2, 0.05, (3e-3, 1e-2, 3e-2)),
        Choice("sing_adamw", 3e-2, 0.005, (3e-3, 1e-2, 3e-2), BY_SIZE),
        Choice("sing_adamw", 3e-2, 0.005, (3e-2, 1e-1, 3e-1)),
    ),
    "Transformers": (
        Choice("adamw_torch", 1e-4, 0.01, (3e-5, 1e-4, 3e-4)),
        Choice("sing_adamw", 3e-4, 0.001, (3e-5, 1e-4, 3e-4), BY_SIZE),
        Choice("sing_adamw", 3e-3, 0.001, (3e-4, 1e-3, 3e-3)),
    ),
    "fairseq": (
        Choice("adam", 3e-3, 0.05, (1e-3, 3e-3, 1e-2)),
        Choice("sing", 1e-2, 0.005, (1e-3, 3e-3, 1e-2), BY_SIZE | TRAINED),
        Choice("sing", 1e-2, 0.005, (1e-2, 3e-2, 1e-1)),
    ),
}
