"""A record as Markdown, and README's part of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import find
from benchmarks.timing import Row
from recipes.summarize import insert, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DEVICES = ("cpu", "cuda")

Record = Mapping[str, Any]
Table = list[list[str]]


def markdown(record: Record, figure: str) -> str:
    """The tables and the figure of a record.

    Args:
        record: a whole one.
        figure: the address of its figure.
    """
    parts = [_heading(record)]
    for title, table in TABLES.items():
        made = table(record)
        if len(made) > 1:
            parts += [title, markdown_table(made)]
    return "\n\n".join([*parts, f"![Time of a step, and how it grows, on {record['config']['device']}]({figure})"])


def update_readme(readme: Path = README, results: Path = RESULTS) -> None:
    """Write README's tables anew, from the published record of every device that has one."""
    readme.write_text(insert(readme.read_text(), published(results)))


def published(results: Path = RESULTS) -> str:
    """README's part: the published record of every device that has one."""
    files = [results / f"{device}.json" for device in DEVICES]
    records = [json.loads(file.read_text()) for file in files if file.exists()]
    place = RESULTS.relative_to(ROOT).as_posix()
    return "\n\n".join(markdown(record, f"{place}/{record['config']['device']}.svg") for record in records)


def _heading(record: Record) -> str:
    hardware, config = record["hardware"], record["config"]
    machine = ", ".join(hardware["accelerators"]) if config["device"] == "cuda" else hardware["processor"]
    quick = " A quick run: fewer models and rounds, so the numbers are rough." if config["quick"] else ""
    return (
        f"On {machine}, {config['threads']} CPU thread(s), torch {record['versions']['torch']}, commit "
        f"{(record['commit'] or 'unknown')[:10]}{' with changes' if record['changed'] else ''}, "
        f"in {record['seconds'] / 60:.0f} minutes, begun at a load of {record['load']:.1f}.{quick}"
    )


def _steps(record: Record) -> Table:
    sections = record["sections"]
    steps, memory = sections.get("step", ()), sections.get("memory", ())
    models = _values(steps, "model")
    first = _values(memory, "model")[:1]
    bytes_of = {"state_bytes": "bytes a parameter", "transient_bytes": "more in a step"} if first else {}
    header = ["", *models, *(f"{first[0]}: {title}" for title in bytes_of.values())]
    return [header] + [
        [
            name,
            *(_number(find(sections, "step", "ratio", model=model, optimizer=name)) for model in models),
            *(_number(find(sections, "memory", column, model=first[0], optimizer=name), ".1f") for column in bytes_of),
        ]
        for name in _values(steps, "optimizer") or _values(memory, "optimizer")
    ]


def _trainings(record: Record) -> Table:
    return [["", "batch", "ratio (quartiles)", "ms with AdamW"]] + [
        [
            row["training"],
            " × ".join(map(str, row["batch"])),
            _spread(row["ratio"]),
            f"{row['reference_milliseconds'][1]:.0f}",
        ]
        for row in record["sections"].get("training", ())
    ]


def _imports(record: Record) -> Table:
    return [["", "ms (quartiles)", "ms of processor time"]] + [
        [row["import"], _spread(row["milliseconds"], ".1f"), f"{row['process_milliseconds'][1]:.1f}"]
        for row in record["sections"].get("imports", ())
    ]


def _targets(record: Record) -> Table:
    return [["", "measured", "at most", "verdict"]] + [
        [
            row["target"],
            f"{row['measured']:.3g} {row['unit']}",
            f"{row['limit']:g}" + (f" (goal {row['goal']:g})" if row["goal"] else ""),
            row["verdict"] if row["verdict"] == "met" else f"**{row['verdict']}**",
        ]
        for row in record["targets"]
        if row["measured"] is not None
    ]


TABLES: dict[str, Callable[[Record], Table]] = {
    "Time of a step, as a ratio to AdamW fused (medians; “–” was not measured), and memory of its state:": _steps,
    "Time of forward, backward and step together, as a ratio to AdamW as the framework makes it:": _trainings,
    "Imports:": _imports,
    "Targets:": _targets,
}


def _values(rows: Sequence[Row], column: str) -> list[str]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _spread(quartiles: Sequence[float], form: str = ".3f") -> str:
    low, median, high = (format(value, form) for value in quartiles)
    return f"{median} ({low}–{high})"
