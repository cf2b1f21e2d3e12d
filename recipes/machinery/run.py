"""A run, as a task sees it: what is to be trained, where, and whom to tell."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from recipes.machinery.config import Settings
from recipes.machinery.progress import Progress
from recipes.machinery.record import Curve


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
