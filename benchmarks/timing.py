"""Times of things that are done in turn, so that a noisy machine slows them all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Row = dict[str, Any]


def in_turn(
    works: Mapping[str, Callable[[], T]], *, rounds: int, least: int = 1, budget: float = 1e9, patience: float = 1e9
) -> dict[str, list[T]]:
    """Do each of ``works`` once a round, in an order that is drawn anew for every round.

    Args:
        works: what is done, and returns what it measured.
        rounds: at most so many.
        least: as many even beyond ``budget``.
        budget: seconds after which no further round begins.
        patience: seconds after which not even ``least`` is waited for; there is one round in any case.

    Returns:
        For each of ``works`` what it returned, round by round.
    """
    chance, names = random.Random(0), list(works)
    measured: dict[str, list[T]] = {name: [] for name in names}
    begun = time.perf_counter()
    for done in range(rounds):
        elapsed = time.perf_counter() - begun
        if done and elapsed > (budget if done >= least else patience):
            break
        for name in chance.sample(names, len(names)):
            measured[name].append(works[name]())
    return measured


def seconds(work: Callable[[], object], device: str, times: int = 1) -> float:
    """Seconds that doing ``work`` so many times takes, all of it on the device included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for an accelerator."""
    if device != "cpu":
        torch.accelerator.synchronize()


def release(device: str) -> None:
    """Give back the memory of what nobody holds any more; optimizers are in reference cycles."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def against(mine: Sequence[float], reference: Sequence[float], unit: float) -> Row:
    """Two series that were measured in turn, as a record has them.

    Args:
        mine, reference: seconds, round by round.
        unit: how many make the ``milliseconds`` of the record, such as steps of a round.

    Returns:
        Quartiles: of the ratio within a round, and of both series in milliseconds.
    """
    return {
        "ratio": quartiles([one / other for one, other in zip(mine, reference, strict=True)]),
        "milliseconds": quartiles([1000 * value / unit for value in mine]),
        "reference_milliseconds": quartiles([1000 * value / unit for value in reference]),
        "rounds": len(mine),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile, with four digits."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return [float(f"{cut:.4g}") for cut in cuts]
