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
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from recipes import config, record
from recipes.config import Settings
from recipes.progress import Progress
from recipes.record import Curve, DivergenceError, Outcome

ROOT = config.RECIPES.parent
STOPPED = 3  # exit code


class StoppedError(Exception):
    """The run was asked to stop after a checkpoint."""


@dataclass
class Run:
    """A task's way to tell how it goes, and where it keeps its checkpoints.

    Attributes:
        settings: what is trained.
        data: the folder of the data sets.
        work: a folder for checkpoints and whatever else is needed until the run is over.
        progress: None in all processes but the first.
        stop_after: stop at the first checkpoint at or after this step.
        curve: what has been told.
        resumed: whether to go on from the checkpoint in ``work``; set by :meth:`load`.
        before: seconds of wall time of the parts of the run that went before.
    """

    settings: Settings
    data: Path
    work: Path
    progress: Progress | None
    stop_after: int | None = None
    curve: Curve = field(default_factory=Curve)
    resumed: bool = False
    before: float = 0.0
    begin: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begin

    @property
    def _state(self) -> Path:
        return self.work / "run.json"

    def step(self, step: int, total: int, loss: float) -> None:
        """A training step is done, counted from 1.

        Raises:
            DivergenceError: the loss is not a finite number.
        """
        self.curve.step(step, total, loss)
        if self.progress:
            self.progress.step(f"{self.settings.task} {self.settings.stem}", step, total, loss)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics after a step."""
        self.curve.evaluate(step, metrics)
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def checkpointed(self, step: int) -> None:
        """The task has written a checkpoint into ``work``: keep what was told until then with it.

        Raises:
            StoppedError: it is time to stop.
        """
        if self.progress:
            self._state.write_text(json.dumps({"curve": asdict(self.curve), "seconds": self.seconds}))
        if self.stop_after is not None and step >= self.stop_after:
            raise StoppedError(f"stopped after step {step}")

    def load(self) -> None:
        """Go on with what was told until the checkpoint, if there is one."""
        if self._state.exists():
            state = json.loads(self._state.read_text())
            self.curve, self.before, self.resumed = Curve(**state["curve"]), state["seconds"], True

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)


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
    parser.add_argument("config", metavar="CONFIG", help="a name in recipes/TASK/configs, or a path to a .toml file")
    parser.add_argument("--optimizer", metavar="NAME", help="one of the configuration's optimizers; default: its first")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as optimizer.lr=1e-2")
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs", metavar="FOLDER", help="checkpoints; default: %(default)s"
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="records; default: recipes/TASK/results")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop at the next checkpoint (exit code 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the equivalent command")
    options = parser.parse_args(arguments)
    try:
        settings = config.load(options.task, options.config, options.optimizer, options.seed, options.set)
        task = import_module(f"recipes.{settings.task}.task")
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
