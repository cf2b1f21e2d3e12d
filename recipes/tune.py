"""Tune the learning rate, then the weight decay, with the same number of runs for every optimizer.

    python recipes/tune.py rde small --optimizer adamw sing_adamw --budget 8 --seeds 3

The paper's procedure (section 5.1): a grid of learning rates, then a grid of weight decays at the best of them; where
the best is the first or the last of a grid, the grid goes on there. Runs are recipes/run.py's, with seed 0; what has a
record is not run again, so an interrupted tuning goes on where it was. Then the best is repeated with further seeds.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

import optuna
from optuna.trial import TrialState

from recipes import config, record
from recipes.config import Settings
from recipes.progress import Progress

ROOT = config.RECIPES.parent
LR_SHARE = 5 / 8  # of the budget

T = TypeVar("T", float, tuple[float, float])
Point = tuple[float, float]  # learning rate, weight decay
Scores = Mapping[Point, "float | None"]  # higher is better; None while it runs


@dataclass(frozen=True)
class Grid:
    """What is tried for one optimizer.

    Attributes:
        lr: the learning rates, tried from the middle outwards.
        weight_decay: the weight decays.
        first_weight_decay: the one with which learning rates are compared.
        budget: number of runs in all.
    """

    lr: Sequence[float]
    weight_decay: Sequence[float]
    first_weight_decay: float
    budget: int

    @property
    def lr_budget(self) -> int:
        return math.ceil(self.budget * LR_SHARE)


def next_points(grid: Grid, scores: Scores) -> list[Point] | None:
    """The points to try now: none while runs that decide are going on, None where the tuning is over.

    Args:
        grid: what is tried.
        scores: of what was tried or is being tried.
    """
    rates = {lr: score for (lr, decay), score in scores.items() if decay == grid.first_weight_decay}
    lrs = _next(from_the_middle(grid.lr), rates, grid.lr_budget)
    if lrs is not None:
        return [(lr, grid.first_weight_decay) for lr in lrs]
    lr = best(rates)
    decays = {decay: score for (rate, decay), score in scores.items() if rate == lr}
    by_distance = sorted(grid.weight_decay, key=lambda decay: abs(_log(decay) - _log(grid.first_weight_decay)))
    chosen = _next(by_distance, decays, grid.budget - len(rates) + 1)
    return None if chosen is None else [(lr, decay) for decay in chosen]


def _next(values: Sequence[float], scores: Mapping[float, float | None], budget: int) -> list[float] | None:
    """As :func:`next_points` for one axis."""
    left = budget - len(scores)
    missing = [value for value in values if value not in scores][: max(0, left)]
    if missing:
        return missing
    if None in scores.values():
        return []
    at = best(scores)
    if left > 0 and len(scores) > 1 and at in (min(scores), max(scores)) and at > 0:
        return [beyond(at, up=at == max(scores))]
    return None


def best(scores: Mapping[T, float | None]) -> T:
    """What has the highest score; of equals, the smallest."""
    return min(scores, key=lambda value: (-_known(scores[value]), value))


def _known(score: float | None) -> float:
    return -math.inf if score is None else score


def from_the_middle(values: Sequence[float]) -> list[float]:
    """Sorted by the distance from the middle of the list; of equals, the lower one first."""
    middle = (len(values) - 1) / 2
    return [value for _, value in sorted(enumerate(values), key=lambda pair: (abs(pair[0] - middle), pair[0]))]


def beyond(value: float, *, up: bool) -> float:
    """The next value of the paper's grids: …, 1e-3, 5e-3, 1e-2, 5e-2, …"""
    is_five = f"{value:e}".startswith("5")
    factor = (2.0 if is_five else 5.0) if up else (0.2 if is_five else 0.5)
    return float(f"{value * factor:.6g}")


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


@dataclass
class Tuning:
    """The tuning of one optimizer.

    Attributes:
        settings: with seed 0, as the configuration has them.
        study: Optuna's, which may be shared.
        seeds: how many seeds the best point is run with.
    """

    settings: Settings
    study: optuna.Study
    budget: int
    seeds: int

    @property
    def grid(self) -> Grid:
        tune = self.settings["tune"]
        return Grid(tune["lr"], tune["weight_decay"], self.settings.optimizer["weight_decay"], self.budget)

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
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="records; default: recipes/TASK/results")
    options = parser.parse_args(arguments)
    if options.budget < 2:
        parser.error(f"Invalid --budget: {options.budget}. Accepted: 2 or more runs.")

    options.work.mkdir(parents=True, exist_ok=True)
    storage = options.storage or f"sqlite:///{(options.work / 'tune.db').resolve()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        labels = config.labels(options.task, options.config) if options.optimizer == ["all"] else options.optimizer
        every = [config.load(options.task, options.config, label, 0, options.set) for label in labels]
        import_module(f"recipes.{options.task}.task")
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
    seeds_left = {id(tuning): list(range(1, tuning.seeds)) for tuning in tunings}
    with ThreadPoolExecutor(options.jobs) as pool:
        while True:
            for tuning in tunings:
                if len(running) >= options.jobs:
                    break
                for settings, trial in _wanted(tuning, seeds_left[id(tuning)], options.jobs - len(running)):
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


def _wanted(tuning: Tuning, seeds: list[int], room: int) -> list[tuple[Settings, optuna.Trial | None]]:
    points = next_points(tuning.grid, tuning.scores())
    if points is not None:
        return [(tuning.settings.at(*point, seed=0), tuning.claim(point)) for point in points[:room]]
    best_point = best(tuning.scores())
    taken = [seeds.pop(0) for _ in range(min(room, len(seeds)))]
    return [(tuning.settings.at(*best_point, seed=seed), None) for seed in taken]


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


def score(made: Mapping[str, Any]) -> float:
    """What is tuned for: the task's metric on the validation set; the worst possible if the run diverged."""
    task = import_module(f"recipes.{made['task']}.task")
    value = made["metrics"].get(f"valid {task.METRIC}")
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(value) if task.HIGHER_IS_BETTER else -float(value)


def table(tunings: Sequence[Tuning]) -> str:
    """The metric on the validation set by learning rate and weight decay, the best one starred."""
    lines = []
    for tuning in tunings:
        scores = tuning.scores()
        top = best(scores)
        sign = 1 if import_module(f"recipes.{tuning.settings.task}.task").HIGHER_IS_BETTER else -1
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
