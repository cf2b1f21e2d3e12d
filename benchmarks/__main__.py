"""What SING costs beside torch's AdamW: time and memory of a step, whole training steps, imports.

    python -m benchmarks [--quick] [--section step] [--device cuda] [--threads 1] [--results FOLDER]
    python -m benchmarks --update-readme

Two things that are compared are done in turn, round by round, so that a noisy machine slows both alike; what is quoted
is the median of the ratio within a round. Written are a record (DEVICE.json), tables (DEVICE.md) and a figure
(DEVICE.svg). README has those of benchmarks/results, which `make bench` makes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import figure, imports, memory, report, steps, targets, training
from benchmarks.settings import QUICK, Settings
from benchmarks.timing import Row
from recipes.machinery import record as records

SECTIONS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "step": steps.measure,
    "memory": memory.measure,
    "training": training.measure,
    "imports": imports.measure,
    "scaling": steps.scaling,
}


def measure(settings: Settings, chosen: list[str], quick: bool = False) -> dict[str, Any]:
    """A record of these sections; prints every row as it is measured."""
    begun, load = time.perf_counter(), os.getloadavg()[0]
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    measured: dict[str, list[Row]] = {name: [] for name in chosen}
    ended: dict[str, float] = {}
    for name in chosen:
        for row in SECTIONS[name](settings):
            measured[name].append(row)
            print(f"{name:<10}{'  '.join(f'{key}: {value}' for key, value in row.items())}", flush=True)
        ended[name] = round(time.perf_counter() - begun, 1)
    return {
        "config": {"quick": quick, **settings.as_json()},
        **records.commit(),
        "versions": records.versions(),
        "hardware": records.hardware(),
        "load": round(load, 2),
        "seconds": round(time.perf_counter() - begun, 1),
        "ended": ended,  # each section, seconds after the beginning
        "targets": targets.rows(measured),
        "sections": measured,
    }


def write(record: dict[str, Any], results: Path) -> Path:
    """Write a record, its tables and its figure; returns the record's file."""
    file = results / f"{record['config']['device']}.json"
    records.write(record, file)
    file.with_suffix(".md").write_text(report.markdown(record, file.with_suffix(".svg").name) + "\n")
    figure.draw(record, file.with_suffix(".svg"))
    return file


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in less than two minutes: fewer models and rounds")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="default: all of them")
    parser.add_argument("--device", choices=report.DEVICES, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's, %(default)s")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"), help="default: %(default)s")
    parser.add_argument("--update-readme", action="store_true", help="from the published records, without a run")
    options = parser.parse_args(arguments)
    if options.update_readme:
        report.update_readme()
        return 0
    settings = Settings(device=options.device, threads=options.threads, **(QUICK if options.quick else {}))
    record = measure(settings, options.section or list(SECTIONS), options.quick)
    file = write(record, options.results)
    print()
    for row in record["targets"]:
        measured = "–" if row["measured"] is None else f"{row['measured']:g}"
        print(f"{row['verdict']:<18}{row['target']}: {measured}, at most {row['limit']:g} {row['unit']}")
    print(f"\nwritten: {file}, and beside it .md and .svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
