"""How much is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.shapes import MODELS, Shapes, entries


def _models(*names: str) -> dict[str, Shapes]:
    return {name: MODELS[name]() for name in names or MODELS}


@dataclass(frozen=True)
class Settings:
    """Of one run. The defaults are those of the published record: under 15 minutes on two cores.

    Attributes:
        device: of all tensors.
        threads: torch's, for everything but the curve over threads.
        models: name -> shapes, whose steps are timed, each with every optimizer.
        memory_models: the same for memory, with the optimizers that have a target.
        every_memory: measure the first of them with every optimizer.
        rounds: at most so many for each pair; a round is a Lookahead cycle, 5 steps of each.
        least_rounds: as many even where that takes longer than ``budget``, but not longer than ``patience``.
        budget, patience: seconds for a pair of optimizers.
        training_budget: seconds for a pair of trainings.
        import_rounds: pairs of processes that import torch.
        parameters: of the curve over the number of parameters.
        tensors: of the curve over the number of tensors.
        tensor_entries: entries of all those tensors together.
        thread_entries: entries that the curve over the number of threads is for.
        batches: name of a training -> batch size and further sizes of its input.
    """

    device: str = "cpu"
    threads: int = 1
    models: Mapping[str, Shapes] = field(default_factory=_models)
    memory_models: Mapping[str, Shapes] = field(default_factory=lambda: _models("ResNet18", "ViT-S", "BERT base"))
    every_memory: bool = True
    rounds: int = 25
    least_rounds: int = 3
    budget: float = 2.0
    patience: float = 12.0
    training_budget: float = 40.0
    import_rounds: int = 10
    parameters: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8, 10**9)
    tensors: tuple[int, ...] = (10, 100, 1_000, 10_000)
    tensor_entries: int = 2_560_000
    thread_entries: int = 20_000_000
    batches: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"ResNet18": (64, 3, 64, 64), "ViT-S": (16, 3, 224, 224), "MiniLM": (16, 128)}
    )

    def as_json(self) -> dict[str, Any]:
        """The settings, of each model only its number of parameters."""
        counts = {
            name: {model: entries(shapes) for model, shapes in models.items()}
            for name, models in (("models", self.models), ("memory_models", self.memory_models))
        }
        return {**vars(self), **counts}


QUICK: dict[str, Any] = {
    "models": _models("ResNet18", "2,000 × 256"),
    "memory_models": _models("ResNet18"),
    "every_memory": False,
    "rounds": 5,
    "budget": 0.3,
    "patience": 1.0,
    "training_budget": 6.0,
    "import_rounds": 2,
    "parameters": (10**5, 10**6, 10**7),
    "batches": {"ResNet18": (64, 3, 32, 32)},
}
