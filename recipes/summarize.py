"""Write the tables and figures of every task's README anew, and the overview of recipes/README.md, from the records.

    python recipes/summarize.py [TASK ...]

Between ``<!-- results -->`` and ``<!-- end of results -->``, a README is this program's; the rest is its authors'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from recipes.machinery import config, curves, figures, tables
from recipes.machinery.config import RECIPES
from recipes.machinery.curves import Lines
from recipes.machinery.record import results_folder
from recipes.machinery.runs import Runs, read_runs

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Section:
    """What there is to tell about one configuration.

    Attributes:
        task: and ``config``: whose.
        tables: title and rows; the first row is the header.
        figures: file and caption.
    """

    task: str
    config: str
    tables: Sequence[tuple[str, list[list[str]]]]
    figures: Sequence[tuple[Path, str]]


def summarize(task: str, folder: Path | None = None) -> list[Section]:
    """The tables of each of a task's configurations that has records; draws the figures beside the records.

    Args:
        task: one of :data:`recipes.machinery.config.TASKS`.
        folder: with a folder of records for each task, instead of ``recipes/tasks/TASK/results``.
    """
    sections = [_section(task, name, _runs(task, folder), folder) for name in _runs(task, folder)]
    return [section for section in sections if section.tables]


def overview() -> list[list[str]]:
    """SING beside AdamW in all tasks."""
    return tables.overview({(task, name): found for task in config.TASKS for name, found in _runs(task, None).items()})


@cache  # the tables of a task and the overview are of the same records
def _runs(task: str, folder: Path | None) -> dict[str, dict[str, Runs]]:
    """By configuration, if it has records."""
    names = sorted(file.stem for file in (config.task_folder(task) / "configs").glob("*.toml"))
    recorded = [name for name in names if any(results_folder(task, name, folder).glob("*.json"))]
    return {name: read_runs(task, name, folder) for name in recorded}


def _section(task: str, name: str, every: dict[str, dict[str, Runs]], folder: Path | None) -> Section:
    module, found = config.task_module(task), every[name]
    place = results_folder(task, name, folder)
    made, drawn = [], []
    for number, layout in enumerate(tables.layouts(task, name), 1):
        if not found.keys() & set(layout["rows"]):
            continue
        made.append((layout["title"], tables.table(task, layout, found, tables.reported(task, name))))
        if "failed_below" in layout:
            made.append(("At multiples of the best learning rate", tables.beyond(task, layout, found)))
        if "pairs" in layout:
            made.append(("Permutation tests", tables.pairs(task, layout, found)))
        if layout.get("growth"):
            title = "Norm of the gradients, from the second fifth of the training to the last"
            made.append((title, tables.growth(layout, found)))
        if name == next(iter(layout.get("across", ())), None):
            made.append(("The best learning rate by configuration", tables.across(task, layout, every)))
            file = place / f"transfer-{number}.svg"
            figures.draw_transfer(every, layout["across"], layout["rows"], module.METRIC, file)
            drawn.append(
                (file, f"{layout['title']}: validation {module.METRIC} over the learning rate, by configuration")
            )
        lines: list[tuple[str, str, Lines]] = [
            ("curves", curves.LOSS, curves.training_loss),
            ("gradients", curves.NORM, curves.gradient_norms(1)),
            ("layernorms", curves.NORM_OF_LAYERNORMS, curves.gradient_norms(2)),
        ]
        if on_the_way := getattr(module, "ON_THE_WAY", None):
            lines.append(("evaluations", on_the_way, curves.evaluations(on_the_way)))
        for kind, value, points in lines:
            file = place / f"{kind}-{number}.svg"
            if curves.draw_curves(found, layout["rows"], value, file, points):
                drawn.append((file, f"{layout['title']}: {value}, mean and range over the seeds"))
        file = place / f"basins-{number}.svg"
        if module.HIGHER_IS_BETTER and figures.draw_basins(found, layout["rows"], module.METRIC, file):
            drawn.append((file, f"{layout['title']}: validation {module.METRIC} over the learning rate"))
    if made:
        figures.draw_maps(
            found, list(found), module.METRIC, place / "tuning.svg", higher_is_better=module.HIGHER_IS_BETTER
        )
        drawn.append(
            (place / "tuning.svg", f"Validation {module.METRIC} of the tuning runs (seed 0); the best is framed")
        )
    if made and (config.task_folder(task) / "figures.py").exists():
        own = config.task_module(task, "figures").draw(found, place)
        drawn += [(place / file, caption) for file, caption in own.items()]
    return Section(task, name, made, drawn)


def markdown(sections: Sequence[Section], beside: Path) -> str:
    """The sections as a README has them.

    Args:
        sections: of one task.
        beside: the README's folder, from which figures are linked.
    """
    parts = []
    for section in sections:
        parts.append(f"### Configuration `{section.config}`")
        for title, rows in section.tables:
            parts += [f"**{title}**", markdown_table(rows)]
        parts += [f"![{caption}]({file.relative_to(beside).as_posix()})" for file, caption in section.figures]
    return "\n\n".join(parts)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Of rows, the first of which is the header."""
    header, *others = rows
    return "\n".join(map(_line, [header, ["---"] * len(header), *others]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def insert(readme: str, text: str) -> str:
    """A README with ``text`` between its marks.

    Raises:
        ValueError: there is not one mark of the beginning.
    """
    if readme.count(BEGIN) != 1:
        raise ValueError(f"Expected one line {BEGIN}, found {readme.count(BEGIN)}.")
    before, _, after = readme.partition(BEGIN)
    after = after.partition(END)[2] if END in after else after
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all")
    options = parser.parse_args(arguments)
    unknown = set(options.tasks) - set(config.TASKS)
    if unknown:
        parser.error(f"Invalid TASK: {', '.join(sorted(unknown))}. Accepted: {', '.join(config.TASKS)}.")
    for task in options.tasks or config.TASKS:
        sections = summarize(task)
        readme = config.task_folder(task) / "README.md"
        if sections:
            readme.write_text(insert(readme.read_text(), markdown(sections, readme.parent)))
            print(f"{task}: {', '.join(section.config for section in sections)}")
    rules = RECIPES / "README.md"
    rules.write_text(insert(rules.read_text(), markdown_table(overview())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
