"""What is kept of a run: one JSON file with its settings, curve, metrics, versions, hardware and time."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from recipes.machinery.config import RECIPES, Settings, task_folder

POINTS = 200  # of the training curve in a record
SPIKE_WINDOW = 100  # steps
SPIKE_FACTOR = 2.0
PACKAGES = (
    *("sing-plugins", "torch", "numpy", "transformers", "timm", "fairseq", "fairseq-fixed", "accelerate"),
    *("pytorch_optimizer", "torchvision", "datasets", "evaluate", "sacrebleu"),
)

_NUMBERS = re.compile(r"\[\n\s+[-\d.]+(?:[eE][+-]?\d+)?(?:,\s+[-\d.]+(?:[eE][+-]?\d+)?)*\s+\]")


class DivergenceError(Exception):
    """The loss is no longer a number. That is an outcome of a run, not a mistake of the program."""


def is_point(step: int, total: int) -> bool:
    """Whether a curve has a point at this step, counted from 1."""
    return step == total or step * POINTS // total > (step - 1) * POINTS // total


@dataclass
class Curve:
    """The loss of a run, step by step, and how often it spiked.

    A spike begins with a step whose loss is more than :data:`SPIKE_FACTOR` times the median of the last
    :data:`SPIKE_WINDOW` steps, and ends with the first step below that.

    Attributes:
        points: ``[step, mean loss since the point before]``, about :data:`POINTS` of them.
        spikes: the steps with which a spike began.
        recoveries: for each of them the number of steps until a loss was down at the median from before the spike
            again; None where none was.
        gradients: ``[step, norm of all gradients, norm of those of LayerNorms]``, where a task tells them; fairseq
            tells the first only.
        evaluations: ``{"step": …, metric: …}``.
    """

    points: list[list[float]] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    recoveries: list[int | None] = field(default_factory=list)
    gradients: list[list[float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)
    spiking: bool = False
    levels: list[float] = field(default_factory=list)  # the medians before the spikes

    def step(self, step: int, total: int, loss: float) -> None:
        """Add the loss of a step, counted from 1.

        Raises:
            DivergenceError: the loss is infinite or not a number.
        """
        if not abs(loss) < float("inf"):
            raise DivergenceError(f"the loss of step {step} of {total} is {loss}")
        if len(self.recent) >= SPIKE_WINDOW // 2:
            median = statistics.median(self.recent)
            high = loss > SPIKE_FACTOR * median > 0  # a loss that can be negative has no spikes
            for spike, level in enumerate(self.levels):
                if self.recoveries[spike] is None and loss <= level:
                    self.recoveries[spike] = step - self.spikes[spike]
            if high and not self.spiking:
                self.spikes.append(step)
                self.recoveries.append(None)
                self.levels.append(median)
            self.spiking = high
        self.recent = [*self.recent[-SPIKE_WINDOW + 1 :], loss]
        self.pending.append(loss)
        if is_point(step, total):
            self.points.append([step, _short(statistics.fmean(self.pending))])
            self.pending.clear()

    def gradient(self, step: int, *norms: float) -> None:
        self.gradients.append([step, *map(_short, norms)])

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations.append({"step": step, **{name: _short(value) for name, value in metrics.items()}})


@dataclass(frozen=True)
class Outcome:
    """What a task hands back.

    Attributes:
        metrics: by ``"<split> <metric>"``, such as ``"test accuracy"``.
        optimizer_class: of the optimizer that trained, read off the object.
        panels: whatever the task's figures need.
    """

    metrics: dict[str, float]
    optimizer_class: str
    panels: Any = None


def class_name(optimizer: Any) -> str:
    """The class of the optimizer that trained; what Accelerate or fairseq put around it is taken off."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    wrapped = f"({type(optimizer.host).__name__})" if type(optimizer).__name__ == "Wrapped" else ""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__qualname__}{wrapped}"


def make(settings: Settings, curve: Curve, outcome: Outcome | None, error: str, seconds: float) -> dict[str, Any]:
    """A run's record.

    Args:
        settings: the run's.
        curve: the run's.
        outcome: None where it diverged.
        error: then, how.
        seconds: of wall time, all parts of an interrupted run together.
    """
    return {
        **settings.as_json(),
        "status": "finished" if outcome else f"diverged: {error}",
        "metrics": {name: _short(value) for name, value in outcome.metrics.items()} if outcome else {},
        "optimizer_class": outcome.optimizer_class if outcome else None,
        "curve": curve.points,
        "evaluations": curve.evaluations,
        "spikes": curve.spikes,
        "recoveries": curve.recoveries,
        **({"gradients": curve.gradients} if curve.gradients else {}),
        **({"panels": outcome.panels} if outcome and outcome.panels else {}),
        "seconds": round(seconds, 1),
        **commit(),
        "versions": versions(),
        "hardware": hardware(),
    }


def write(record: Mapping[str, Any], file: Path) -> None:
    """Write a record, all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(dumps(record))
    partial.replace(file)


def dumps(record: Mapping[str, Any]) -> str:
    """JSON with one line for each list of numbers, so that records are small and changes can be read."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    return (
        _NUMBERS.sub(lambda numbers: re.sub(r"\s+", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"
    )


def read_all(task: str, config: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """The records of a configuration, sorted by file name, which is added as ``stem``."""
    files = sorted(results_folder(task, config, folder).glob("*.json"))
    return [{**json.loads(file.read_text()), "stem": file.stem} for file in files]


def results_folder(task: str, config: str, folder: Path | None = None) -> Path:
    """Where the records of a configuration are: ``recipes/tasks/TASK/results/CONFIG``, or ``folder/TASK/CONFIG``."""
    return (folder / task if folder else task_folder(task) / "results") / config


def commit() -> dict[str, Any]:
    """The commit that runs, and whether the work tree has changes; ``None`` outside of a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}
    return {"commit": head, "changed": bool(changed)}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=RECIPES, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, threads of this process, accelerators, processes of the job."""
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return str(models[0]) if models else platform.processor()


def _short(value: float) -> float:
    return float(f"{value:.6g}")
