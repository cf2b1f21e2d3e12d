"""What a run is: a task, a configuration file, one of the optimizers in it, a seed, and changes to all that.

A configuration is ``recipes/tasks/TASK/configs/NAME.toml``. Its tables are the task's own (``data``, ``model``,
``train``), but for

- ``[optimizer]``: ``lr``, ``weight_decay``, ``options`` and whatever else the task's optimizers share,
- ``[optimizers.LABEL]``: what is different for one of them; ``opt``, the name that the framework is asked for, is the
  label unless it says otherwise, and ``[optimizers.LABEL.train]`` changes entries of ``[train]``,
- ``[tune]``, ``[[summary]]``, ``[reported]``, which are no part of a run: the grids of recipes/tune.py (an empty one:
  not tuned), the tables of recipes/summarize.py, what the paper reports by label.

``base = "NAME"`` at the top of a file takes over another configuration of the task. Entries of the file's own tables go
before those of the base; ``optimizers``, ``tune`` and ``summary`` replace the base's as a whole.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).resolve().parents[1]
TASKS = tuple(sorted(folder.parent.name for folder in RECIPES.glob("tasks/*/configs")))

NOT_OF_A_RUN = ("tune", "summary", "reported")
REPLACED = ("optimizers", "tune", "summary")

Table = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Everything that a run's outcome depends on, but for the machine and the versions.

    Attributes:
        task: one of :data:`TASKS`.
        config: the configuration's name.
        label: of the optimizer in the configuration.
        seed: of weights, order and noise; the data set has a seed of its own.
        tables: the configuration's tables with the optimizer's changes; ``optimizer`` and ``tune`` among them.
        changes: what was changed in them, as it was asked for.
        file: the configuration's, as it was asked for, where it is none of the task's.
    """

    task: str
    config: str
    label: str
    seed: int
    tables: dict[str, Table]
    changes: tuple[str, ...] = ()
    file: str = ""

    def __getitem__(self, table: str) -> Table:
        return self.tables.get(table, {})

    @property
    def optimizer(self) -> Table:
        return self.tables["optimizer"]

    def as_json(self) -> dict[str, Any]:
        """What a record keeps: all that is part of the run."""
        tables = {name: table for name, table in self.tables.items() if name not in NOT_OF_A_RUN}
        return {"task": self.task, "config": self.config, "label": self.label, "seed": self.seed, **tables}

    @property
    def arguments(self) -> list[str]:
        """Of recipes/run.py, for this run."""
        changes = [argument for change in self.changes for argument in ("--set", change)]
        return [self.task, self.file or self.config, "--optimizer", self.label, "--seed", str(self.seed), *changes]

    def at(self, lr: float, weight_decay: float, seed: int) -> Settings:
        """The same run with another learning rate, weight decay and seed."""
        optimizer = {**self.optimizer, "lr": float(lr), "weight_decay": float(weight_decay)}
        changes = (f"optimizer.lr={lr!r}", f"optimizer.weight_decay={weight_decay!r}")
        return replace(
            self, seed=seed, tables={**self.tables, "optimizer": optimizer}, changes=(*self.changes, *changes)
        )

    @property
    def study(self) -> str:
        """A name for the tuning of this optimizer, different for different settings."""
        tables = {name: {**table} for name, table in self.as_json().items() if isinstance(table, dict)}
        for tuned in ("lr", "weight_decay"):
            tables["optimizer"].pop(tuned)
        return f"{self.task}-{self.config}-{self.label}-{_digest(tables)}"

    @property
    def stem(self) -> str:
        """A name for the run's files, different for different settings."""
        lr, decay = self.optimizer["lr"], self.optimizer["weight_decay"]
        return f"{self.label}-lr{lr:g}-wd{decay:g}-seed{self.seed}-{_digest(self.as_json())}"


def task_folder(task: str) -> Path:
    """Where a task is, with its README, its configurations and its published records."""
    return RECIPES / "tasks" / task


def task_module(task: str, name: str = "task") -> Any:
    """A module of a task, which the machinery finds by name only: it works with whatever tasks there are."""
    return import_module(f"recipes.tasks.{task}.{name}")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def load(task: str, config: str, label: str | None = None, seed: int = 0, changes: Iterable[str] = ()) -> Settings:
    """Read a configuration.

    Args:
        task: one of :data:`TASKS`.
        config: a name in the task's ``configs``, or a path to a ``.toml`` file.
        label: an optimizer of the configuration; None for its first.
        seed: see :class:`Settings`.
        changes: ``"table.key=value"``, with a value as in TOML; what is no TOML is a string.

    Raises:
        ValueError: no such task, configuration, optimizer or key; lists those that there are.
    """
    name, tables = _name(config), read(task, config)
    shared, optimizers = tables.pop("optimizer", {}), tables.pop("optimizers", {})
    label = next(iter(optimizers)) if label is None else label
    if label not in optimizers:
        raise ValueError(f"Invalid --optimizer: {label!r}. {task} {name} has {', '.join(optimizers)}.")
    optimizer: Table = {"opt": label, "options": {}, **shared}
    for key, value in optimizers[label].items():
        if isinstance(value, Mapping) and key != "options":
            tables.setdefault(key, {}).update(value)
        else:
            optimizer[key] = value
    own = "" if config == name else str(Path(config).resolve())
    settings = Settings(task, name, label, seed, {**tables, "optimizer": optimizer}, tuple(changes), own)
    for change in settings.changes:
        _change(settings, change)
    return settings


def labels(task: str, config: str) -> list[str]:
    """The optimizers of a configuration."""
    return list(read(task, config).get("optimizers", {}))


def _name(config: str) -> str:
    return Path(config).stem if config.endswith(".toml") else config


def read(task: str, config: str) -> dict[str, Any]:
    """A configuration as its file has it.

    Raises:
        ValueError: no such task or configuration.
    """
    if task not in TASKS:
        raise ValueError(f"Invalid TASK: {task!r}. Accepted: {', '.join(TASKS)}.")
    folder = task_folder(task) / "configs"
    file = Path(config) if config.endswith(".toml") else folder / f"{config}.toml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
        raise ValueError(f"Invalid CONFIG: {config!r}. {task} has {names}; a path to a .toml file is accepted too.")
    own = tomllib.loads(file.read_text())
    if "base" not in own:
        return own
    base = read(task, own.pop("base"))
    merged = {name: table if name in REPLACED else {**base.get(name, {}), **table} for name, table in own.items()}
    return {**base, **merged}


def _change(settings: Settings, change: str) -> None:
    path, equals, text = change.partition("=")
    *parents, key = path.strip().split(".")
    table: Any = settings.tables
    for parent in parents:
        table = table.get(parent, {}) if isinstance(table, dict) else {}
    open_ended = parents == ["optimizer", "options"]
    if not (equals and parents and isinstance(table, dict) and (key in table or open_ended)):
        keys = [
            f"{name}.{key}" for name, entries in settings.tables.items() if name not in NOT_OF_A_RUN for key in entries
        ]
        raise ValueError(f"Invalid --set: {change!r}. Expected key=value with one of {', '.join(keys)}.")
    value = parse_value(text)
    was = table.get(key)
    if isinstance(was, (int, float)) and not isinstance(was, bool):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"Invalid --set: {change!r}. {path} is a number, such as {was!r}.")
        value = float(value) if isinstance(was, float) else value
    table[key] = value


def parse_value(text: str) -> Any:
    """A value as TOML writes it, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
