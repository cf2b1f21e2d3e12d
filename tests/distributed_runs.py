"""Runs the scenarios in so many processes; by itself, prints how exact they are (docs/sharding.md has the figures).

python tests/distributed_runs.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Outcomes = list[dict[str, dict[str, Any]]]


def run(count: int, directory: Path, seconds: float = 300) -> Outcomes:
    """Of each process, scenario by scenario, its error, or the largest deviation from one process.

    Args:
        count: of the processes.
        directory: for them alone; the checkpoints that two of them leave for others are in its parent.
        seconds: at most.
    """
    script = Path(__file__).parent / "distributed_scenarios.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(count), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    logs = [process.communicate(timeout=seconds)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, logs
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(count)]


def main() -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as parent:
        runs = {}
        for count in (2, 4):
            directory = Path(parent, str(count))
            directory.mkdir()
            runs[count] = run(count, directory, seconds=1200)
    print("| scenario | 2 processes | 4 processes |\n|---|---|---|")
    for name in runs[2][0]:
        worst = [[outcome[name]["deviation"] for outcome in outcomes] for outcomes in runs.values()]
        print(f"| {name} | " + " | ".join("failed" if None in of else f"{max(of):.1e}" for of in worst) + " |")


if __name__ == "__main__":
    main()
