"""What the demo's runs came to: the optimizer that really trained, the table, the numbers, the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

OnStep = Callable[[int, int, float], None]  # step, of how many, loss

EDGE = 10  # steps over which the first and the last loss are averaged
SMOOTHING = 10  # steps of the moving average in the picture
LOG_BELOW = 0.1  # a panel whose curves go below it has a logarithmic axis, …
FLOOR = 1e-4  # … down to here
COLUMNS = ("framework", "model, data", "optimizer", "class that trained", "lr", "loss first → last", "metric", "s/step")


@dataclass(frozen=True)
class Used:
    """The optimizer that really trained.

    Attributes:
        name: its class.
        sing: whether it is SING and has been stepped.
    """

    name: str
    sing: bool

    @classmethod
    def of(cls, optimizer: Any) -> Used:
        """Look at an optimizer object; Accelerate's and the Trainer's wrapper is taken off."""
        from sing_plugins import SING  # here, so that nothing of ours is imported before the training

        inner = getattr(optimizer, "optimizer", optimizer)
        name = f"{type(inner).__module__.split('.')[0]}.{type(inner).__qualname__}"
        return cls(name, sing=isinstance(inner, SING) and bool(inner.state))


@dataclass(frozen=True)
class Outcome:
    """What a training function hands back: the optimizer that it used, and the metric by split."""

    used: Used
    metrics: dict[str, float]


@dataclass
class Run:
    """One training run.

    Attributes:
        optimizer: the name that was asked for, and its options.
        losses: the loss of every step.
        step_ends: when each step ended, in seconds.
        outcome: None where the run failed.
        error: why it failed.
    """

    framework: str
    workload: str
    metric: str
    optimizer: str
    lr: float
    weight_decay: float
    losses: list[float] = field(default_factory=list)
    step_ends: list[float] = field(default_factory=list)
    outcome: Outcome | None = None
    error: str = ""

    @property
    def wants_sing(self) -> bool:
        return self.optimizer.startswith("sing")

    @property
    def first_loss(self) -> float:
        return fmean(self.losses[:EDGE])

    @property
    def last_loss(self) -> float:
        return fmean(self.losses[-EDGE:])

    @property
    def seconds_per_step(self) -> float:
        """The median time from the end of a step to the end of the next."""
        pairs = zip(self.step_ends, self.step_ends[1:], strict=False)
        return median([later - earlier for earlier, later in pairs] or [math.nan])


def problems(runs: Sequence[Run], frameworks: Sequence[str]) -> list[str]:
    """What has to make the demo fail; empty if each framework trained with SING and with its own AdamW.

    Args:
        runs: the runs.
        frameworks: the frameworks that have to be among them.
    """
    found = [
        f"{framework}: no run with SING"
        for framework in frameworks
        if not any(run.framework == framework and run.wants_sing for run in runs)
    ]
    for run in runs:
        title = f"{run.framework}, {run.optimizer}"
        if run.outcome is None:
            found.append(f"{title}: {run.error or 'no outcome'}")
        elif run.outcome.used.sing != run.wants_sing:
            found.append(f"{title}: {run.outcome.used.name} trained, which is {'not ' * run.wants_sing}SING")
        elif not all(map(math.isfinite, run.losses)):
            found.append(f"{title}: the loss is not finite")
    return found


def table(runs: Sequence[Run], split: str = "test") -> str:
    """The runs that came to an end, in aligned columns, with the metric on a split."""
    rows = [COLUMNS, *(_row(run, run.outcome, split) for run in runs if run.outcome is not None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _row(run: Run, outcome: Outcome, split: str) -> tuple[str, ...]:
    return (
        run.framework,
        run.workload,
        run.optimizer,
        outcome.used.name,
        f"{run.lr:g}",
        f"{run.first_loss:.3f} → {run.last_loss:.3f}",
        f"{split} {run.metric} {outcome.metrics[split]:.4g}",
        f"{run.seconds_per_step:.3f}",
    )


def write_json(runs: Sequence[Run], file: Path, **about: Any) -> None:
    """Every number of the runs, and what else is to be said about them."""
    numbers = [
        {
            **{name: value for name, value in asdict(run).items() if name != "step_ends"},
            "seconds_per_step": run.seconds_per_step,
        }
        for run in runs
    ]
    file.write_text(json.dumps({**about, "runs": numbers}, indent=1))


def draw(runs: Sequence[Run], file: Path) -> None:
    """The loss curves, one panel a framework."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title = f"Training loss (bold: mean of the last {SMOOTHING} steps). One seed: a demonstration, no benchmark."
    frameworks = list(dict.fromkeys(run.framework for run in runs))
    rows = math.ceil(len(frameworks) / 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 4 * rows), squeeze=False, layout="constrained")
    for panel, framework in zip(axes.flat, frameworks, strict=False):
        for index, run in enumerate(run for run in runs if run.framework == framework and run.losses):
            color = f"C{index}"
            steps = range(1, len(run.losses) + 1)
            panel.plot(steps, run.losses, color=color, alpha=0.2, linewidth=0.8)
            panel.plot(steps, smooth(run.losses), color=color, label=f"{run.optimizer}, lr {run.lr:g}")
            panel.set_title(f"{framework}: {run.workload}", fontsize=10)
        lowest = min((loss for run in runs if run.framework == framework for loss in smooth(run.losses)), default=1.0)
        panel.set_xlabel("step")
        panel.set_ylabel("training loss" + f" (shown down to {FLOOR:g})" * (lowest < FLOOR))
        if lowest < LOG_BELOW:
            panel.set_yscale("log")
            panel.set_ylim(bottom=max(lowest / 2, FLOOR))
        panel.grid(alpha=0.3)
        panel.legend()
    for panel in axes.flat[len(frameworks) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of up to the last :data:`SMOOTHING` values at each step."""
    return [fmean(losses[max(0, end - SMOOTHING) : end]) for end in range(1, len(losses) + 1)]
