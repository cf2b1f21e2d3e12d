"""Write one HTML page with all tables, curves and seeds, and the paper's numbers beside ours.

    python recipes/report.py [--output report.html]

The page has everything in it: no file, script or font is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from recipes.machinery import config, record
from recipes.summarize import Section, overview, summarize

CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: #2a7d4f; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; padding: 1rem clamp(.8rem, 4vw, 3rem); max-width: 78rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); } h3 { margin-top: 2rem; }
nav a { display: inline-block; margin: 0 1rem .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; font-weight: 600; padding: .6rem 0; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; font-weight: 600; min-width: 4.5rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
tr.sing td:first-child { color: var(--mark); font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { font-size: .875rem; opacity: .8; }
details { margin: 1rem 0; } summary { cursor: pointer; }
"""


def page(sections: Sequence[Section], overview: Sequence[Sequence[str]]) -> str:
    """The page, as HTML.

    Args:
        sections: as recipes.summarize.summarize returns them, of all tasks.
        overview: the rows of a table that is to come first, the header among them.
    """
    links = "".join(f'<a href="#{_id(section)}">{escape(section.task)}, {section.config}</a>' for section in sections)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>SING: recipes and results</title><style>{CSS}</style></head><body>\n"
        "<h1>SING beside other optimizers</h1>\n"
        "<p>Every number is from a record in the repository; recipes/README.md has the rules, older than the runs."
        " Every optimizer of a table was tuned with the same budget of runs, on a validation set. “Better” means that"
        " each seed of the one is better on the test set than each seed of the other. The last column is what the paper"
        " reports for its own, much larger experiment.</p>\n"
        f"<nav>{links}</nav>\n{_table('SING beside AdamW, on the test set', overview)}"
        f"{''.join(map(_section, sections))}</body></html>\n"
    )


def _id(section: Section) -> str:
    return f"{section.task}-{section.config}"


def _section(section: Section) -> str:
    parts = [f'<h2 id="{_id(section)}">{escape(section.task)}: configuration {escape(section.config)}</h2>\n']
    parts += [_table(title, rows) for title, rows in section.tables]
    parts += [
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{_base64(file)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        for file, caption in section.figures
    ]
    parts.append(_every_run(section))
    return "".join(parts)


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header) + "</tr>"]
    for row in others:
        kind = ' class="sing"' if row[0].startswith("sing") else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><caption>{escape(title)}</caption>\n{body}\n</table></div>\n'


def _every_run(section: Section) -> str:
    """All records of the configuration, those of no table among them."""
    rows = [["optimizer", "lr", "weight decay", "seed", "outcome", "class that trained", "spikes", "s", "commit"]]
    for made in record.read_all(section.task, section.config):
        outcome = ", ".join(f"{name} {value:.4g}" for name, value in made["metrics"].items()) or made["status"]
        rows.append(
            [
                made["label"],
                f"{made['optimizer']['lr']:g}",
                f"{made['optimizer']['weight_decay']:g}",
                str(made["seed"]),
                outcome,
                made["optimizer_class"] or "–",
                str(len(made["spikes"])),
                f"{made['seconds']:.0f}",
                (made["commit"] or "–")[:10],
            ]
        )
    return f"<details><summary>Every run ({len(rows) - 1})</summary>{_table('Every run', rows)}</details>\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=config.RECIPES.parent / "report.html", help="%(default)s")
    options = parser.parse_args(arguments)
    sections = [section for task in config.TASKS for section in summarize(task)]
    options.output.write_text(page(sections, overview()), encoding="utf-8")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
