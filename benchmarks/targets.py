"""**The** table of targets, and whether a record meets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.imports import ADDED, PLUGINS
from benchmarks.optimizers import ADAMW_FOREACH, DEFAULT, HARD, NO_LOOKAHEAD
from benchmarks.settings import Settings
from benchmarks.shapes import MODELS, REAL
from benchmarks.timing import Row

Sections = Mapping[str, Sequence[Row]]
COUNTERS = 0.02  # bytes a parameter: every tensor has a step counter of four bytes


class Target(NamedTuple):
    """At most so much.

    Attributes:
        what: is measured.
        unit: of it.
        limit: that is to be met.
        measured: from the sections of a record; None where that was not measured.
        goal: what would be better still.
    """

    what: str
    unit: str
    limit: float
    measured: Callable[[Sections], float | None]
    goal: float | None = None


def find(sections: Sections, section: str, column: str, **where: str) -> float | None:
    """A number of the one row that has these values; of quartiles, the median."""
    for row in sections.get(section, ()):
        if column in row and where.items() <= row.items():
            value = row[column]
            return float(value[1] if isinstance(value, list) else value)
    return None


def _step(model: str, optimizer: str) -> Callable[[Sections], float | None]:
    return lambda sections: find(sections, "step", "ratio", model=model, optimizer=optimizer)


def _beside_foreach(model: str) -> Callable[[Sections], float | None]:
    def measured(sections: Sections) -> float | None:
        mine, foreach = (_step(model, optimizer)(sections) for optimizer in (DEFAULT, ADAMW_FOREACH))
        return mine / foreach if mine and foreach else None

    return measured


def _memory(model: str, optimizer: str, column: str) -> Callable[[Sections], float | None]:
    return lambda sections: find(sections, "memory", column, model=model, optimizer=optimizer)


def _training(name: str) -> Callable[[Sections], float | None]:
    return lambda sections: find(sections, "training", "ratio", training=name)


def _import(name: str) -> Callable[[Sections], float | None]:
    return lambda sections: find(sections, "imports", "milliseconds", **{"import": name})


TARGETS: tuple[Target, ...] = (
    *(
        Target(f"{optimizer}: step, {model}", "× AdamW fused", 1.6, _step(model, optimizer), 1.3)
        for optimizer in (DEFAULT, HARD)
        for model in REAL
    ),
    *(Target(f"SING: step, {model}", "× AdamW foreach", 1.0, _beside_foreach(model)) for model in MODELS),
    *(
        Target(f"SING: memory of a step, {model}", "bytes a parameter", 1.0, _memory(model, DEFAULT, "transient_bytes"))
        for model in REAL
    ),
    *(
        Target(
            f"{optimizer}: state, {model}",
            "bytes a parameter",
            most + COUNTERS,
            _memory(model, optimizer, "state_bytes"),
        )
        for optimizer, most in ((DEFAULT, 12), (NO_LOOKAHEAD, 8))
        for model in REAL
    ),
    *(
        Target(f"SING: whole training step, {name}", "× AdamW of the framework", 1.02, _training(name))
        for name in Settings().batches
    ),
    Target(ADDED, "ms", 5, _import(ADDED)),
    Target(PLUGINS, "ms", 50, _import(PLUGINS)),
)


def rows(sections: Sections) -> list[Row]:
    """Every target with what was measured and a verdict, as a record has them."""
    return [_row(target, target.measured(sections)) for target in TARGETS]


def _row(target: Target, measured: float | None) -> Row:
    return {
        "target": target.what,
        "unit": target.unit,
        "limit": target.limit,
        "goal": target.goal,
        "measured": None if measured is None else float(f"{measured:.4g}"),
        "verdict": _verdict(target, measured),
    }


def _verdict(target: Target, measured: float | None) -> str:
    if measured is None:
        return "not measured"
    if measured > target.limit:
        return "missed"
    return "met, goal missed" if target.goal is not None and measured > target.goal else "met"
