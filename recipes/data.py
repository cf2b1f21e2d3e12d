"""Fetch a data set, or see which there are.

    python recipes/data.py --list
    python recipes/data.py office-help fashion-mnist --data FOLDER

Whatever is downloaded is checked against the digest that is recorded beside its address. A run fetches what it needs by
itself; this command is for machines whose nodes for computing have no network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from recipes.machinery.config import RECIPES
from recipes.machinery.data import DATA_SETS


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="tell which data sets there are")
    parser.add_argument("--data", type=Path, default=RECIPES.parent / "data", metavar="FOLDER", help="%(default)s")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in DATA_SETS]
    if unknown or not (options.names or options.list):
        parser.error(f"Invalid NAME: {', '.join(unknown) or 'none given'}. Accepted: {', '.join(DATA_SETS)}.")
    if options.list:
        rows = [
            (name, f"stands in for {each.stands_in_for}" if each.stands_in_for else "the paper's", each.about)
            for name, each in DATA_SETS.items()
        ]
        wide, wider = (max(len(row[column]) for row in rows) for column in (0, 1))
        print("\n".join(f"{name:{wide}}  {role:{wider}}  {about}" for name, role, about in rows))
    for name in options.names:
        print(f"{name}: {DATA_SETS[name].fetch(options.data.resolve())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
