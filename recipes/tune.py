"""Tune the learning rate, then the weight decay, with the same number of runs for every optimizer.

    python recipes/tune.py rde small --optimizer adamw sing_adamw --budget 8 --seeds 3

The paper's procedure (section 5.1): a grid of learning rates, then a grid of weight decays at the best of them; where
the best is the first or the last of a grid, the grid goes on there. An empty grid is not tuned: what the configuration
has is run. Runs are recipes/run.py's, with seed 0; what has a record is not run again, so an interrupted tuning goes on
where it was. Then the best is repeated with further seeds, which are also run at multiples of its learning rate where
the configuration's ``tune.beyond`` has some.

Several machines can share the work through one ``--storage``: any database that Optuna takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

import optuna
from optuna.trial import TrialState

from recipes.machinery import config, record
from recipes.machinery.config import Settings
from recipes.machinery.progress import Progress
from recipes.machinery.search import Grid, Point, Scores, best, next_points, score, times

ROOT = config.RECIPES.parent


@dataclass
class Tuning:
    """The tuning of one optimizer.

    Attributes:
        settings: with seed 0, as the configuration has them.
        study: Optuna's, which may be shared.
        seeds: how many seeds the best point is run with.
        rest: what is left to run once the best point is known: the factor of its learning rate, and the seed.
    """

    settings: Settings
    study: optuna.Study
    budget: int
    seeds: int
    rest: list[tuple[float, int]] = field(init=False)

    def __post_init__(self) -> None:
        factors = [1.0, *self.settings["tune"].get("beyond", ())]
        self.rest = [(factor, seed) for factor in factors for seed in range(1, self.seeds)]

    @property
    def grid(self) -> Grid:
        tune, own = self.settings["tune"], self.settings.optimizer
        lr, weight_decay = (tune[name] or [own[name]] for name in ("lr", "weight_decay"))
        return Grid(lr, weight_decay, own["weight_decay"], self.budget)

    def scores(self) -> Scores:
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
        return {(t.params["lr"], t.params["weight_decay"]): t.value for t in trials if len(t.params) == 2}

    def claim(self, point: Point) -> optuna.Trial:
        """Tell everybody that this point is being tried."""
        self.study.enqueue_trial({"lr": point[0], "weight_decay": point[1]})
        trial = self.study.ask()
        trial.suggest_float("lr", 0.0, math.inf)
        trial.suggest_float("weight_decay", 0.0, math.inf)
        trial.set_user_attr("process", [platform.node(), os.getpid()])
        return trial


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", metavar="TASK", help=", ".join(config.TASKS))
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--optimizer", nargs="+", default=["all"], metavar="NAME", help="default: all of them")
    parser.add_argument("--budget", type=int, default=8, metavar="N", help="runs for each; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="for the best point; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side; default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in recipes/run.py")
    parser.add_argument("--storage", metavar="URL", help="Optuna's; default: an SQLite file in the folder of --work")
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="records; default: recipes/tasks/TASK/results")
    options = parser.parse_args(arguments)
    if options.budget < 2:
        parser.error(f"Invalid --budget: {options.budget}. Accepted: 2 or more runs.")

    options.work.mkdir(parents=True, exist_ok=True)
    storage = options.storage or f"sqlite:///{(options.work / 'tune.db').resolve()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        labels = config.labels(options.task, options.config) if options.optimizer == ["all"] else options.optimizer
        every = [config.load(options.task, options.config, label, 0, options.set) for label in labels]
        config.task_module(options.task)
    except ValueError as error:
        parser.error(str(error))
    tunings = [
        Tuning(
            settings,
            optuna.create_study(storage=storage, study_name=settings.study, direction="maximize", load_if_exists=True),
            options.budget,
            options.seeds,
        )
        for settings in every
    ]
    for tuning in tunings:
        release(tuning.study)
    carry_out(tunings, options)
    print(table(tunings))
    return 0


def release(study: optuna.Study) -> None:
    """Give up the trials of processes of this machine that are no more."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        node, process = trial.user_attrs.get("process", (platform.node(), -1))
        if node == platform.node() and not _is_alive(process):
            study.tell(trial.number, state=TrialState.FAIL)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process > 0


def carry_out(tunings: Sequence[Tuning], options: argparse.Namespace) -> None:
    """Run everything that is wanted, ``--jobs`` at a time.

    Raises:
        SystemExit: a run failed, other than by diverging; names its log.
    """
    progress = Progress(sys.stdout)
    running: dict[Future[dict[str, Any]], tuple[Tuning, optuna.Trial | None]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        while True:
            for tuning in tunings:
                if len(running) >= options.jobs:
                    break
                for settings, trial in _wanted(tuning, options.jobs - len(running)):
                    running[pool.submit(run, settings, options)] = tuning, trial
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                tuning, trial = running.pop(future)
                made = future.result()
                if trial is not None:
                    tuning.study.tell(trial, score(made))
                progress.say(
                    f"{made['label']} lr {made['optimizer']['lr']:g} wd {made['optimizer']['weight_decay']:g} "
                    f"seed {made['seed']}: {made['metrics'] or made['status']}"
                )


def _wanted(tuning: Tuning, room: int) -> list[tuple[Settings, optuna.Trial | None]]:
    points = next_points(tuning.grid, tuning.scores())
    if points is not None:
        return [(tuning.settings.at(*point, seed=0), tuning.claim(point)) for point in points[:room]]
    lr, decay = best(tuning.scores())
    taken = [tuning.rest.pop(0) for _ in range(min(room, len(tuning.rest)))]
    return [(tuning.settings.at(times(lr, factor), decay, seed=seed), None) for factor, seed in taken]


def run(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Run recipes/run.py, unless the record is there; returns the record."""
    file = record.results_folder(settings.task, settings.config, options.results) / f"{settings.stem}.json"
    if not file.exists():
        log = options.work / "logs" / settings.task / f"{settings.stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(config.RECIPES / "run.py"), *settings.arguments, "--resume"]
        command += ["--data", str(options.data), "--work", str(options.work)]
        command += ["--results", str(options.results)] if options.results else []
        with log.open("w") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if code != 0 or not file.exists():
            raise SystemExit(f"A run failed with exit code {code}; see {log}")
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def table(tunings: Sequence[Tuning]) -> str:
    """The metric on the validation set by learning rate and weight decay, the best one starred."""
    lines = []
    for tuning in tunings:
        scores = tuning.scores()
        top = best(scores)
        sign = 1 if config.task_module(tuning.settings.task).HIGHER_IS_BETTER else -1
        cells = {point: _cell(value, sign) + "*" * (point == top) for point, value in scores.items()}
        lines.append(f"\n{tuning.settings.label}: {len(scores)} runs; lr ↓, weight decay →")
        decays = sorted({decay for _, decay in scores})
        lines.append("".join(f"{text:>12}" for text in ["", *(f"{decay:g}" for decay in decays)]))
        for lr in sorted({lr for lr, _ in scores}):
            lines.append("".join(f"{text:>12}" for text in [f"{lr:g}", *(cells.get((lr, d), "") for d in decays)]))
    return "\n".join(lines)


def _cell(value: float | None, sign: int) -> str:
    if value is None:
        return "running"  # on another machine
    return f"{sign * value:.4g}" if math.isfinite(value) else "diverged"


if __name__ == "__main__":
    sys.exit(main())
