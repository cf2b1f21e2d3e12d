"""Train once, as a configuration says, and write one record.

    python recipes/run.py rde small --optimizer sing_adamw --seed 1 --set optimizer.lr=1e-2

A run whose record exists is not repeated. Under ``torchrun`` or ``accelerate launch`` the first process writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from recipes.machinery import config, record
from recipes.machinery.config import Settings
from recipes.machinery.progress import Progress
from recipes.machinery.record import DivergenceError, Outcome
from recipes.machinery.run import Run, StoppedError

ROOT = config.RECIPES.parent
STOPPED = 3  # exit code


def carry_out(run: Run, task: Any) -> dict[str, Any]:
    """Train; returns the record."""
    outcome: Outcome | None = None
    error = ""
    try:
        outcome = task.train(run)
    except DivergenceError as diverged:
        error = str(diverged)
    return record.make(run.settings, run.curve, outcome, error, run.seconds)


def describe(settings: Settings, task: Any, data: Path) -> str:
    """The resolved configuration and the equivalent commands."""
    commands = "\n".join(shlex.join(map(str, command)) for command in task.commands(settings, data))
    return f"{json.dumps(settings.as_json(), indent=2)}\n\n{commands}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 3 where ``--stop-after`` stopped the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", metavar="TASK", help=", ".join(config.TASKS))
    parser.add_argument(
        "config", metavar="CONFIG", help="a name in recipes/tasks/TASK/configs, or a path to a .toml file"
    )
    parser.add_argument("--optimizer", metavar="NAME", help="one of the configuration's optimizers; default: its first")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as optimizer.lr=1e-2")
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs", metavar="FOLDER", help="checkpoints; default: %(default)s"
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="records; default: recipes/tasks/TASK/results")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop at the next checkpoint (exit code 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the equivalent command")
    options = parser.parse_args(arguments)
    try:
        settings = config.load(options.task, options.config, options.optimizer, options.seed, options.set)
        task = config.task_module(settings.task)
        if options.dry_run:
            print(describe(settings, task, options.data))
            return 0
    except ValueError as error:
        parser.error(str(error))

    file = record.results_folder(settings.task, settings.config, options.results) / f"{settings.stem}.json"
    first = int(os.environ.get("RANK", "0")) == 0
    if file.exists():
        if first:
            print(f"{file} exists: this run is done ({summary(json.loads(file.read_text()))}).")
            print(f"It is made again with --results and another folder than {options.results or 'the published one'}.")
        return 0
    work = options.work.resolve() / settings.task / settings.stem
    if work.exists() and not options.resume and first:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    run = Run(settings, options.data.resolve(), work, Progress(sys.stdout) if first else None, options.stop_after)
    if options.resume:
        run.load()
    try:
        made = carry_out(run, task)
    except StoppedError as stopped:
        run.say(f"{stopped}; --resume goes on")
        return STOPPED
    if first:
        record.write(made, file)
        shutil.rmtree(work)
        run.say(f"{summary(made)}\n{file}")
    return 0


def summary(made: Mapping[str, Any]) -> str:
    """What a record comes to, in a line."""
    return ", ".join([made["status"], *(f"{name} {value:.4g}" for name, value in made["metrics"].items())])


if __name__ == "__main__":
    sys.exit(main())
