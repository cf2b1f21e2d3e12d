"""Time of an optimizer's step: on the shapes of models, and as it grows with parameters, tensors and threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.optimizers import CYCLE, DEFAULT, OPTIMIZERS, REFERENCE, NotMeasuredError, copies, parameters
from benchmarks.settings import Settings
from benchmarks.shapes import Shapes, matrices
from benchmarks.timing import Row, against, in_turn, release, seconds

MATRICES = 20  # of the curves over the numbers of parameters and threads


def measure(settings: Settings) -> Iterator[Row]:
    """Every optimizer on every model, against the reference."""
    for model, shapes in settings.models.items():
        for name in OPTIMIZERS:
            yield {"model": model, "optimizer": name, **compare(name, shapes, settings)}


def scaling(settings: Settings) -> Iterator[Row]:
    """SING's default against the reference, on three curves."""
    over_sizes = {
        "parameters": {count: matrices(MATRICES, count) for count in settings.parameters},
        "tensors": {count: matrices(count, settings.tensor_entries) for count in settings.tensors},
    }
    for curve, points in over_sizes.items():
        for at, shapes in points.items():
            yield {"curve": curve, "at": at, **compare(DEFAULT, shapes, settings)}
    if settings.device == "cpu":
        shapes = matrices(MATRICES, settings.thread_entries)
        for threads in thread_counts(os.cpu_count() or 1):
            torch.set_num_threads(threads)
            yield {"curve": "threads", "at": threads, **compare(DEFAULT, shapes, settings)}
        torch.set_num_threads(settings.threads)


def compare(name: str, shapes: Shapes, settings: Settings) -> Row:
    """Time an optimizer's step and the reference's in turn.

    Args:
        name: one of OPTIMIZERS.
        shapes: of the parameters; each of the two gets its own.
        settings: the run's.

    Returns:
        As :func:`benchmarks.timing.against`, for one step; or ``skipped`` with the reason.
    """
    try:
        return _timed(name, shapes, settings)
    except NotMeasuredError as why:
        return {"skipped": str(why)}
    finally:
        release(settings.device)


def _timed(name: str, shapes: Shapes, settings: Settings) -> Row:
    maker, device = OPTIMIZERS[name], settings.device
    params = parameters(maker.taken(shapes, device), device)
    both = {"reference": OPTIMIZERS[REFERENCE](params), "mine": maker(copies(params))}
    for optimizer in both.values():
        optimizer.step()  # makes the state
    times = in_turn(
        {key: partial(seconds, optimizer.step, device, CYCLE) for key, optimizer in both.items()},
        rounds=settings.rounds,
        least=settings.least_rounds,
        budget=settings.budget,
        patience=settings.patience,
    )
    return against(times["mine"], times["reference"], CYCLE)


def thread_counts(cores: int) -> list[int]:
    """Powers of two, and all cores."""
    return [*(1 << power for power in range(cores.bit_length()) if 1 << power < cores), cores]
